"""Grids of weights that read an enlarged picture: their sums fit int8."""

import copy

import pytest
import torch
from exported import taps
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import batches, quiet_trainer
from torch import nn
from torch.nn import functional

from lightning_compress import QuantizationAwareTraining, quantize_static, quantize_weights
from lightning_compress.conversion.export import export_onnx
from lightning_compress.quantization.upsampled_conv import EnlargedReaders, summed_taps
from lightning_compress.quantization.weight_quantizers import RangeGrids
from lightning_compress.state import compression_state


@settings(deadline=None)
@given(
    bits=st.integers(2, 8),
    factor=st.integers(1, 4),
    axis=st.sampled_from([None, 0]),
    observer=st.sampled_from(["minmax", "percentile"]),
    seed=st.integers(0, 99),
)
def test_sums_of_whole_numbers_fit(bits, factor, axis, observer, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    weight += torch.randn(4, 1, 1, 1, generator=generator)
    plain, roomy = (
        RangeGrids(bits=bits, symmetric=True, axis=axis, observer=observer) for _ in range(2)
    )
    roomy.enlarged = factor
    for quantizer in (plain, roomy):
        quantizer.start(weight)
    grid = roomy.grid(weight)
    sums = summed_taps(grid.quantize(weight), factor)
    assert int(sums.abs().max()) <= 127
    narrow = plain.grid(weight).scale
    assert bool((grid.scale >= narrow).all())
    if factor**2 * (2 ** (bits - 1) - 1) <= 127:
        assert torch.equal(grid.scale, narrow)


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (nn.Upsample(scale_factor=2), 2),
        (nn.Upsample(size=(12, 12)), 3),
        (nn.Upsample(scale_factor=1.5), None),
        (nn.Upsample(scale_factor=2, mode="bilinear"), None),
        (nn.Upsample(scale_factor=(1, 2)), None),
        (nn.ReLU(), None),
    ],
    ids=str,
)
def test_what_a_layer_reads_is_seen_when_gradients_flow(between, found):
    layers = [nn.Conv2d(2, 2, 3, padding=1) for _ in range(2)]
    module = nn.Sequential(nn.Conv2d(1, 2, 1), between, *layers)
    told = {}
    finder = EnlargedReaders(dict(module.named_modules()), told.__setitem__)
    with torch.no_grad():
        module(torch.rand(1, 1, 4, 4))
    assert told == {}
    twin = copy.deepcopy(module)
    twin(torch.rand(1, 1, 4, 4))
    assert told == {}  # a copy tells nobody
    module(torch.rand(1, 1, 4, 4))
    assert told == ({} if found is None else {"2": found})
    assert not module[2]._forward_pre_hooks
    finder.stop()
    assert not any(layer._forward_pre_hooks for layer in module.modules())


class Drawer(LightningModule):
    """Draws pictures of rows, by upsampling and convolving."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 4 * 9)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        x = functional.relu(self.project(x)).unflatten(1, (4, 3, 3))
        x = functional.relu(self.first(functional.interpolate(x, scale_factor=2)))
        return torch.tanh(self.last(x))

    def training_step(self, batch, _):
        target = torch.nn.functional.pad(batch[0].unsqueeze(1).unsqueeze(1), (0, 0, 0, 5))
        return (self(batch[0]) - target).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trained(tmp_path, *more, seed=0, **arguments):
    torch.manual_seed(seed)
    model = Drawer()
    callback = QuantizationAwareTraining(frequency=4, **arguments)
    trainer = quiet_trainer(tmp_path, callback, *more, enable_checkpointing=bool(more))
    trainer.fit(model, batches())
    return model.eval(), callback


@pytest.mark.parametrize("begin", [0.0, 0.4])
@pytest.mark.parametrize("observer", ["minmax", "percentile"])
def test_training_leaves_a_grid_that_the_file_can_add_up(begin, observer, tmp_path):
    model, callback = trained(tmp_path, begin=begin, observer=observer)
    assert {
        path: quantizer.enlarged for path, quantizer in callback.weights.quantizers.items()
    } == {
        "project.weight": 1,
        "first.weight": 2,
        "last.weight": 1,
    }
    info = export_onnx(model, tmp_path / "m.onnx", torch.randn(4, 6), int8=True)
    assert taps(info.path)[0] == (2, 2)
    assert "trained grid" in info.weights["first.weight"]
    assert info.parity["onnxruntime"].more < 0.01
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_other_bits_and_an_older_state_take_no_room_away(tmp_path):
    model, callback = trained(tmp_path)
    quantizer = callback.weights.quantizers["first.weight"]
    quantizer.load_state_dict({"range": quantizer.range, "frozen": True})
    assert quantizer.enlarged == 2
    callback.steer(bits={"first.weight": 7})
    assert callback.weights.quantizers["first.weight"].enlarged == 2
    symbols = compression_state(model.first).grids["weight"].quantize(model.first.weight)
    assert int(summed_taps(symbols, 2).abs().max()) <= 127


def test_a_layer_that_never_runs_is_not_looked_for_after_training(tmp_path):
    torch.manual_seed(0)
    model = Drawer()
    model.spare = nn.Conv2d(4, 8, 3, padding=1)
    callback = QuantizationAwareTraining(include=["spare", "first"])
    with pytest.warns(UserWarning, match="spare stay as they are: never seen"):
        quiet_trainer(tmp_path, callback).fit(model, batches())
    assert not model.spare._forward_pre_hooks
    assert not model.first._forward_pre_hooks


def test_hooks_go_when_the_module_fails():
    module = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 8, 3))
    with pytest.raises(RuntimeError):
        quantize_static(module, [torch.rand(1, 3, 4, 4)])
    assert not module[1]._forward_pre_hooks


def test_without_activations_on_grids_weights_keep_their_range(tmp_path):
    model, callback = trained(tmp_path, activation_bits=None)
    assert {quantizer.enlarged for quantizer in callback.weights.quantizers.values()} == {1}
    largest = model.first.weight.abs().amax((1, 2, 3)).double()
    scale = compression_state(model.first).grids["weight"].scale.double()
    torch.testing.assert_close(largest / scale, torch.full((8,), 127.0).double())


def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    whole, _ = trained(tmp_path)
    rules = {"filename": "half", "every_n_train_steps": 8, "save_top_k": -1}
    trained(tmp_path, ModelCheckpoint(tmp_path, **rules))
    path = tmp_path / "half.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]
    (saved,) = [one for key, one in state.items() if key.startswith("Quantization")]
    assert saved["weights"]["makers"]["first.weight"]["enlarged"] == 2
    torch.manual_seed(1)
    model = Drawer()
    callbacks = QuantizationAwareTraining(frequency=4), ModelCheckpoint(tmp_path, **rules)
    trainer = quiet_trainer(tmp_path, *callbacks, enable_checkpointing=True)
    trainer.fit(model, batches(), ckpt_path=path, weights_only=True)
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("first", [nn.Linear(6, 36), nn.Identity()], ids=["layer", "input"])
def test_static_quantization_sees_it_too(first, tmp_path):
    torch.manual_seed(0)
    rows = [torch.rand(16, 6) if isinstance(first, nn.Linear) else torch.rand(16, 36)]
    module = nn.Sequential(
        first,
        nn.Unflatten(1, (4, 3, 3)),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Sigmoid(),
    ).eval()
    quantize_static(module, rows)
    info = export_onnx(module, tmp_path / "m.onnx", rows[0], int8=True)
    assert taps(info.path) == [(2, 2)]
    assert module[3].weight.requires_grad
    assert module[3].weight.grad is None


def test_rounding_alone_knows_of_no_input():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 8, 3))
    quantize_weights(module, 8)
    symbols = compression_state(module[1]).grids["weight"].quantize(module[1].weight)
    assert set(symbols.abs().amax((1, 2, 3)).tolist()) == {127}
