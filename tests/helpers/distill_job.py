"""Run by test_distillation_distributed.py: distills on some processes and saves what each has."""

from pathlib import Path

import torch
from distilling import Student, TaughtGAN, WideStudent, make
from lightning.pytorch import Callback
from processes import on, share_of, work
from tiny import quiet_trainer

from lightning_compress import KnowledgeDistillation, Pair


def fit(folder: Path, kind: str, processes: int) -> None:
    pair = Pair("decoder", features=[("1", "1")])
    if kind == "gan":
        model, teacher, pair = make(TaughtGAN), make(TaughtGAN, seed=1), Pair("generator")
    else:
        model, teacher = make(Student, optimizer="SGD"), make(WideStudent, seed=1)
    balance = "gradient_norm" if kind == "balanced" else None
    kd = KnowledgeDistillation(teacher, pairs=[pair], weight=2.0, balance=balance)
    saved = {}

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            saved["adapters"] = {
                name: value.clone()
                for paired in kd.session.paired_modules
                for name, value in paired.adapters.state_dict().items()
            }
            saved["teacher_calls"] = [paired.teacher_calls for paired in kd.session.paired_modules]

    trainer = quiet_trainer(folder, kd, Look(), **on(processes, gan=kind == "gan"))
    trainer.fit(model, share_of(processes))
    saved["model"] = model.state_dict()
    torch.save(saved, folder / f"{kind}-{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    work(fit)
