"""Flow matching: paths, sampler, cost of an image, files that draw, and fewer steps."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import KnowledgeDistillation, Pair, export_onnx, onnx_session
from lightning_compress.channels.graph import channel_graph
from lightning_compress.channels.plan import exact_outputs, removed, zeroed_channels
from lightning_compress.lab.config import config_dir
from lightning_compress.lab.evaluation.cost import macs
from lightning_compress.lab.models import FlowMatching
from lightning_compress.lab.models.flow_matching import EulerStep, TwoSteps
from lightning_compress.lab.workflow.costs import deployed_cost
from lightning_compress.lab.workflow.experiment import run_experiment
from tests.helpers.tiny import quiet_trainer


def small(**changes):
    torch.manual_seed(0)
    sizes = {"channels": 1, "image_size": 8, "width": 8, "levels": 2, "heads": 2}
    model = FlowMatching(**(sizes | {"sampling_steps": 4} | changes))
    torch.nn.init.normal_(model.step.field.last.weight, std=0.1)  # else it does not move at all
    return model.eval()


def images(count=64):
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.zeros(count)), batch_size=16)


def test_a_field_that_points_to_an_image_is_followed_to_it():
    model = small(sampling_steps=5)
    target = torch.rand(3, 1, 8, 8)
    noise = model.latents(3, seed=0).reshape(target.shape)
    model.step.field = torch.nn.Identity()
    model.step.field.forward = lambda x, t: (2 * target - 1) - noise  # of straight paths
    torch.testing.assert_close(model.images(noise.flatten(1)), target, atol=1e-5, rtol=0)


def test_the_loss_is_that_of_the_velocity():
    model = small()
    x, noise, t = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.rand(4)
    target = (2 * x - 1) - noise
    at = t.reshape(-1, 1, 1, 1)
    found = model.step.field((1 - at) * noise + at * (2 * x - 1), t)
    wanted = (found - target).square().mean()
    torch.testing.assert_close(model._loss(x, noise, t), wanted, rtol=1e-4, atol=1e-6)


def test_an_image_costs_all_steps():
    model = small()
    step, inputs = model.parts()["step"]
    found = deployed_cost(model)
    assert found["macs"] == 4 * macs(step, inputs)
    assert found["calls"] == {"step": 4}


def test_a_file_of_one_step_draws_in_a_loop(tmp_path):
    model = small()
    step, inputs = model.parts()["step"]
    export_onnx(step, tmp_path / "step.onnx", inputs)
    session = onnx_session(tmp_path / "step.onnx")
    names = [one.name for one in session.get_inputs()]
    z = model.latents(3, seed=0)
    x = z.reshape(3, 1, 8, 8).numpy()
    for i in range(4):
        x = session.run(None, dict(zip(names, (x, np.full(3, i / 4, np.float32)), strict=True)))[0]
    drawn = torch.from_numpy((x + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(drawn, model.images(z), atol=1e-5, rtol=0)


def test_two_steps_of_the_teacher_are_one_of_the_student():
    teacher, student = small(sampling_steps=4), small(sampling_steps=2)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 0.5])
    wanted = teacher.step(teacher.step(x, t), t + 0.25)
    assert torch.equal(TwoSteps(teacher.step, student.step)(x, t), wanted)
    with pytest.raises(ValueError, match=r"4 steps.*student.sampling_steps=2"):
        TwoSteps(teacher.step, EulerStep(student.step.field, 3))


def test_a_student_learns_to_make_two_steps_in_one(tmp_path):
    torch.manual_seed(0)
    teacher = small(sampling_steps=4)
    student = small(sampling_steps=2, times="steps", flow_weight=0.0, lr=3e-3)
    pair = Pair("step", "step", wrap=TwoSteps)
    distill = KnowledgeDistillation(teacher, pairs=[pair])
    x = images().dataset.tensors[0]
    noise, t = torch.randn(64, 1, 8, 8), torch.zeros(64)

    def away():
        with torch.no_grad():
            wanted = teacher.step(teacher.step(noise, t), t + 0.25)
            return float((student.eval().step(noise, t) - wanted).square().mean())

    torch.nn.init.normal_(student.step.field.last.weight, std=0.1)  # another field
    before = away()
    student.train()
    quiet_trainer(tmp_path, distill, max_epochs=30).fit(student, images())
    assert away() < 0.5 * before
    assert len(x) == 64


def test_channels_of_the_field_go_exactly():
    model = small(width=16)
    step, inputs = model.parts()["step"]
    graph = channel_graph(step, inputs)
    gone = graph.flags(
        torch.cat([torch.from_numpy(group.free[::2]) for group in graph.groups]).numpy()
    )
    zeroed = zeroed_channels(step, graph, gone)
    little = removed(zeroed, graph, gone)
    for ours, theirs in zip(
        exact_outputs(little, inputs), exact_outputs(zeroed, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert macs(little, inputs) < 0.7 * macs(step, inputs)


QUICK = [
    "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1",
    "model.width=8", "model.levels=2", "model.heads=2", "model.sampling_steps=4",
    "evaluate.samples=64", "evaluate.latency_repeats=2", "+trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.mark.parametrize("name", ["flow_matching", "flow_matching_steps"])
def test_a_recipe_runs_to_its_files(name, tmp_path):
    few = name.endswith("steps")
    words = ["student.sampling_steps=2" if few else "compression.channels.budget={macs: 0.8}"]
    if few:
        words.append("export.onnx=false")  # the other recipe's files are of the same step
    else:
        words += [f"compression.{one}.begin=0" for one in ("channels", "quantize")]
        words.append("model.width=16")
    words.append(f"evaluate.cache_dir={tmp_path}")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", [f"experiment={name}", *QUICK, *words])
    results = run_experiment(cfg, tmp_path / "run")
    dense, compressed = results["dense"], results["compressed"]
    assert dense["calls"] == {"step": 4}
    assert compressed["calls"] == {"step": 2 if few else 4}
    assert compressed["macs"] < 0.9 * dense["macs"]
    assert (tmp_path / "run" / "compressed" / "step.int8.onnx").exists() is not few
    assert dense["quality"]["fid"] > 0
