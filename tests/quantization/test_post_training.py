"""Quantization after training: by function and by callback, with the mask left alone."""

import pytest
import torch
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    GradualPruning,
    PostTrainingQuantization,
    TargetError,
    compression_state,
    load_compressed,
    quantize_weights,
    save_compressed,
    sparsity,
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_lie_on_their_grids_and_biases_are_left_alone(bits, scheme, per_channel):
    module = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 4, groups=2), nn.GRU(5, 3)
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    quantize_weights(module, bits, scheme=scheme, per_channel=per_channel)
    grids = compression_state(module).grids
    assert set(grids) == {"0.weight", "2.weight", "3.weight_ih_l0", "3.weight_hh_l0"}
    for name, value in module.state_dict().items():
        if name not in grids:
            assert torch.equal(value, before[name]), name
            continue
        grid = grids[name]
        assert torch.equal(grid.project(value), value)
        assert (value - before[name]).abs().max() <= grid.scale.max() * 0.501
        axis = 1 if name == "2.weight" else 0
        assert grid.scale.numel() == (value.shape[axis] if per_channel else 1)


def test_the_callback_quantizes_when_training_has_ended_and_keeps_the_mask(tmp_path):
    model = TinyAutoencoder()
    callbacks = [PostTrainingQuantization(weight_bits=4), GradualPruning(final_sparsity=0.75)]
    quiet_trainer(tmp_path, *callbacks).fit(model, batches())
    assert sparsity(model) >= 0.75
    assert all(grid.bits == 4 for grid in compression_state(model).grids.values())
    pruned = {projected.path: projected.pruned for projected in callbacks[1].projected_weights}
    for path, mask in pruned.items():
        assert (model.get_parameter(path)[mask] == 0).all()
    info = save_compressed(model, tmp_path / "model.lcz")
    assert info.per_tensor["decoder.weight"].bits == 4
    fresh = load_compressed(tmp_path / "model.lcz", TinyAutoencoder())
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 9}, "weight_bits=9: valid are integers 2 to 8"),
        ({"scheme": "round"}, "scheme='round': valid are"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PostTrainingQuantization(**arguments)


def test_mistakes_name_the_place():
    module = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TargetError, match=r"'decoder\.\*' matches no parameter"):
        quantize_weights(module, include=["decoder.*"])
    with pytest.raises(ValueError, match="scheme='floor'"):
        quantize_weights(module, scheme="floor")
    with torch.no_grad():
        module[0].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"0\.weight: cannot find the range of NaN"):
        quantize_weights(module)
