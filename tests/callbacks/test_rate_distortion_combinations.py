"""Rate-distortion grids beside each other callback, and resumed at each stage of a run."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    LowRank,
    ProjectedEMA,
    QuantizationAwareTraining,
    compression_state,
    load_compressed,
    save_compressed,
    sparsity,
)

LMBDA = 0.3


class Wide(TinyAutoencoder):
    """A first weight that is large enough for its rate's gradient to be read in blocks."""

    def __init__(self, hidden=64):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 32))
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(32, 6))


def rounding(lmbda=LMBDA, **rules):
    return QuantizationAwareTraining(
        activation_bits=None, scheme="rate_distortion", lmbda=lmbda, lr=0.02, **rules
    )


def fitted(folder, *callbacks, model=None, epochs=10, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    model = Wide() if model is None else model
    trainer = quiet_trainer(folder, *callbacks, max_epochs=epochs, **arguments)
    trainer.fit(model, batches(7), ckpt_path=ckpt_path)  # no multiple of the blocks
    return model


def on_its_grids(model):
    """Whether all targeted weights lie on the grids that a file would be written with."""
    grids = compression_state(model).grids
    assert grids
    return all(
        torch.equal(grid.project(model.get_parameter(path)), model.get_parameter(path))
        for path, grid in grids.items()
    )


def symbols(model):
    grids = compression_state(model).grids
    return {path: grid.quantize(model.get_parameter(path)) for path, grid in grids.items()}


@pytest.mark.parametrize("per_channel", [False, True])
def test_removed_channels_take_their_steps_and_their_rate_along(tmp_path, per_channel):
    class Weights(Callback):
        """What a bit weighs, times the weights that are left: lambda, once it has grown."""

        found = 0.0

        def on_train_batch_end(self, trainer, pl_module, *_):
            (maker,) = {one.weight for one in quantize.weights.quantizers.values()}
            left = sum(projected.target.numel for projected in quantize.projected_weights)
            self.found = maker * left

    quantize, seen = rounding(per_channel=per_channel), Weights()
    channels = ChannelPruning(final_sparsity=0.5, round_to=4, end=0.5)
    model = fitted(tmp_path, channels, quantize, seen)
    assert model.encoder[0].out_features < 64
    assert on_its_grids(model)
    for path, grid in compression_state(model).grids.items():
        rows = model.get_parameter(path).shape[0]
        assert grid.scale.numel() == (rows if per_channel else 1)
    assert seen.found == pytest.approx(LMBDA)


def test_a_teacher_adds_its_loss_and_leaves_the_rate_alone(tmp_path):
    dense, sizes = fitted(tmp_path), {}
    teacher = copy.deepcopy(dense).eval()
    for lmbda in (0.0, 3.0):
        pupil = copy.deepcopy(dense)
        distill = KnowledgeDistillation(teacher, pairs=["decoder"], losses="mse", weight=1.0)
        model = fitted(tmp_path, distill, rounding(lmbda), model=pupil)
        assert on_its_grids(model)
        sizes[lmbda] = save_compressed(model, tmp_path / "model.lcz").bytes
    assert sizes[3.0] < 0.8 * sizes[0.0]
    silent = KnowledgeDistillation(teacher, pairs=["decoder"], losses="mse", weight=0.0)
    one, other = (
        fitted(tmp_path, *callbacks, model=copy.deepcopy(dense)).state_dict()
        for callbacks in ([rounding()], [silent, rounding()])
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_factors_are_quantized_like_any_weight(tmp_path):
    model = fitted(tmp_path, LowRank(rank=4, begin=0.3, include=["encoder.2.*"]), rounding())
    assert {"encoder.2.0.weight", "encoder.2.1.weight"} <= set(compression_state(model).grids)
    assert on_its_grids(model)


@pytest.mark.parametrize("first", ["prune", "quantize"])
def test_masks_stay_and_rounding_adds_zeros(tmp_path, first):
    pair = [GradualPruning(final_sparsity=0.6, end=0.5), rounding(3.0)]
    model = fitted(tmp_path, *(pair if first == "prune" else pair[::-1]))
    assert on_its_grids(model)
    for path, mask in compression_state(model).masks.items():
        assert (model.get_parameter(path)[~mask] == 0).all()
    assert sparsity(model) > 0.6


def test_an_average_lies_on_the_trained_steps(tmp_path):
    quantize, average = rounding(), ProjectedEMA(decay=0.9)
    model = fitted(tmp_path, quantize, average)
    assert on_its_grids(model)
    save_compressed(model, tmp_path / "model.lcz")
    fresh = load_compressed(tmp_path / "model.lcz", Wide())
    for path, grid in compression_state(model).grids.items():
        assert torch.equal(grid.scale, quantize.weights.quantizers[path].grid(grid.scale).scale)
        assert torch.equal(fresh.get_parameter(path), model.get_parameter(path))


class StopAfter(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise ConnectionError("preempted")


@pytest.mark.parametrize(("epoch", "stage"), [(1, "warm-up"), (5, "trains"), (9, "frozen")])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, epoch, stage):
    def run(folder, *others, ckpt_path=None):
        quantize = rounding()
        saver = ModelCheckpoint(folder, save_last=True)
        model = fitted(
            folder, quantize, saver, *others, model=Wide(2048), ckpt_path=ckpt_path,
            enable_checkpointing=True,
        )  # fmt: skip
        return model, quantize

    torch.manual_seed(0)
    whole, quantize = run(tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(ConnectionError):
        run(tmp_path / "parts", StopAfter(epoch))
    checkpoint = tmp_path / "parts" / "last.ckpt"
    (saved,) = (
        state
        for name, state in torch.load(checkpoint, weights_only=True)["callbacks"].items()
        if name == quantize.state_key
    )
    assert (stage == "frozen") == saved["flags"][1]
    resumed, again = run(tmp_path / "parts", ckpt_path=checkpoint)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    assert str(quantize.weights.state_dict()) == str(again.weights.state_dict())
    now = symbols(resumed)
    assert all(torch.equal(value, now[path]) for path, value in symbols(whole).items())
