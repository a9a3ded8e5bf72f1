"""On a CUDA device: short fits of each callback in each precision, resume, files, equal grids.

These run by `make test-gpu` alone; without a device they are skipped.
"""

import itertools

import pytest
import torch
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer

from lightning_compress import (
    GradualPruning,
    KnowledgeDistillation,
    ProjectedEMA,
    QuantizationAwareTraining,
    ThresholdPruning,
    load_compressed,
    save_compressed,
    sparsity,
)
from lightning_compress.pruning.masks import global_masks
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import compression_state

pytestmark = pytest.mark.gpu
STEPS = 20


def qat(scheme):
    return lambda: QuantizationAwareTraining(scheme=scheme)


CALLBACKS = {
    "pruning": lambda: GradualPruning(final_sparsity=0.5),
    "taylor": lambda: GradualPruning(final_sparsity=0.5, criterion="taylor"),
    "obs": lambda: GradualPruning(final_sparsity=0.5, criterion="obs"),
    "rigl": lambda: GradualPruning(final_sparsity=0.5, regrow="gradient"),
    "threshold": lambda: ThresholdPruning(threshold=0.05),
    **{name: qat(name) for name in ("symmetric", "affine", "learned_step", "codebook", "entropy")},
    "average": lambda: ProjectedEMA(decay=0.9),
    "distillation": lambda: KnowledgeDistillation(TinyAutoencoder("SGD"), pairs=["decoder"]),
}
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]


def fit(folder, model, *callbacks, accelerator="cuda", ckpt_path=None, **more):
    torch.manual_seed(0)
    trainer = quiet_trainer(
        folder, *callbacks, accelerator=accelerator, devices=1, **{"max_epochs": 1, **more}
    )
    trainer.fit(model, batches(STEPS), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(("name", "precision"), [*itertools.product(CALLBACKS, PRECISIONS)])
def test_each_callback_trains_in_each_precision(tmp_path, name, precision):
    model = TinyAutoencoder()
    fit(tmp_path, model, CALLBACKS[name](), precision=precision)
    assert all(torch.isfinite(one).all() for one in model.parameters())


@pytest.mark.parametrize("name", ["pruning", "entropy"])
def test_a_gan_trains(tmp_path, name):
    model = TinyGAN()
    fit(tmp_path, model, CALLBACKS[name]())
    assert all(torch.isfinite(one).all() for one in model.parameters())


class Fused(TinyAutoencoder):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fused_optimizers_keep_the_masks(tmp_path, precision):
    model = Fused()
    fit(tmp_path, model, GradualPruning(final_sparsity=0.5), precision=precision)
    assert sparsity(model) == pytest.approx(0.5, abs=0.02)


def test_a_compiled_model_trains(tmp_path):
    model = TinyAutoencoder()
    model.decoder = torch.compile(model.decoder)
    fit(tmp_path, model, GradualPruning(final_sparsity=0.5), QuantizationAwareTraining())
    assert sparsity(model) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_device(tmp_path, first, second):
    def callbacks():
        return [GradualPruning(final_sparsity=0.5), QuantizationAwareTraining(scheme="entropy")]

    trainer = fit(tmp_path, TinyAutoencoder(), *callbacks(), accelerator=first)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model = TinyAutoencoder()
    path = tmp_path / "a.ckpt"
    fit(tmp_path, model, *callbacks(), accelerator=second, ckpt_path=path, max_epochs=2)
    assert sparsity(model) == pytest.approx(0.5, abs=0.02)


def test_files_of_a_model_on_cuda_are_those_of_the_cpu(tmp_path):
    model = TinyAutoencoder()
    fit(tmp_path, model, GradualPruning(final_sparsity=0.5), QuantizationAwareTraining())
    save_compressed(model.cuda(), tmp_path / "cuda.lcz")
    save_compressed(model.cpu(), tmp_path / "cpu.lcz")
    assert (tmp_path / "cuda.lcz").read_bytes() == (tmp_path / "cpu.lcz").read_bytes()
    loaded = load_compressed(tmp_path / "cuda.lcz", TinyAutoencoder().cuda())
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one.cpu(), other)
    assert list(compression_state(loaded).grids) == list(compression_state(model).grids)


def test_masks_and_grids_are_those_of_the_cpu():
    values = torch.randn(64, 128)
    (mask,), (there,) = (global_masks([one.abs()], 0.7) for one in (values, values.cuda()))
    assert torch.equal(mask, there.cpu())
    for bits, axis in itertools.product((2, 4, 8), (None, 0)):
        grid, other = (affine_grid(one, bits=bits, axis=axis) for one in (values, values.cuda()))
        torch.testing.assert_close(grid.project(values), other.project(values.cuda()).cpu())


def test_a_step_waits_for_nothing(tmp_path):
    layer = torch.nn.Linear(64, 64).cuda()
    from lightning_compress.quantization.entropy import EntropyGrids

    maker = EntropyGrids(bits=8, relative_step=0.2, rate=0.1)
    gradient = torch.zeros_like(layer.weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        maker.gradient(gradient, layer.weight.detach())
        maker.grid(layer.weight.detach()).project(layer.weight.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_event_over_many_weights_takes_little_memory():
    scores = [torch.rand(10_000_000, device="cuda") for _ in range(10)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    global_masks(scores, 0.9)
    extra = torch.cuda.max_memory_allocated() - before
    print(f"prune event over 100 million weights: {extra / 2**20:.0f} MiB beside the scores")
    assert extra < 4 * 100_000_000  # below one more copy of the weights
