"""Operations against hand formulas, bytes against files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.lab.evaluation.cost import (
    file_sizes,
    macs,
    parameter_counts,
    safetensors_bytes,
    torch_bytes,
)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class ScaledDotProduct(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


STEPS, IN, HIDDEN = 6, 4, 8

HAND = {
    "linear": (nn.Linear(8, 4), (8,), 8 * 4),
    "linear over steps": (nn.Linear(8, 4), (3, 8), 3 * 8 * 4),
    "conv": (nn.Conv2d(8, 4, 3, stride=2, padding=1), (8, 5, 5), (3 * 3) * 4 * 8 * 9),
    "conv in groups": (nn.Conv2d(8, 4, 3, padding=1, groups=4), (8, 5, 5), 25 * 4 * 2 * 9),
    "conv over steps": (nn.Conv1d(8, 4, 3), (8, 5), 3 * 4 * 8 * 3),
    "transposed conv": (nn.ConvTranspose2d(8, 4, 4, 2, 1), (8, 5, 5), 25 * 8 * 4 * 16),
    "transposed conv in groups": (
        nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2),
        (8, 5, 5),
        25 * 8 * 2 * 16,
    ),
    "gru": (
        nn.GRU(IN, HIDDEN, batch_first=True),
        (STEPS, IN),
        STEPS * 3 * HIDDEN * (IN + HIDDEN),
    ),
    "gru, two layers and directions": (
        nn.GRU(IN, HIDDEN, num_layers=2, bidirectional=True, batch_first=True),
        (STEPS, IN),
        2 * STEPS * 3 * HIDDEN * (IN + HIDDEN) + 2 * STEPS * 3 * HIDDEN * (2 * HIDDEN + HIDDEN),
    ),
    "lstm": (
        nn.LSTM(IN, HIDDEN, num_layers=2, batch_first=True),
        (STEPS, IN),
        STEPS * 4 * HIDDEN * (IN + HIDDEN) + STEPS * 4 * HIDDEN * (HIDDEN + HIDDEN),
    ),
    "gru cell": (nn.GRUCell(IN, HIDDEN), (IN,), 3 * HIDDEN * (IN + HIDDEN)),
    "attention": (SelfAttention(), (5, 8), 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8),
    "fused attention": (ScaledDotProduct(), (2, 5, 8), 2 * (2 * 5 * 5 * 8)),
    "norm": (nn.BatchNorm2d(8), (8, 5, 5), 0),
    "spectral norm": (parametrizations.spectral_norm(nn.Linear(8, 4)), (8,), 8 * 4),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", HAND)
def test_macs_of_one_example_equal_the_hand_formula(case, batch):
    module, shape, expected = HAND[case]
    assert macs(module.train(), torch.randn(batch, *shape)) == expected
    assert module.training


def test_macs_of_several_inputs_and_of_a_whole_generator():
    bilinear = nn.Bilinear(8, 4, 3)
    assert macs(bilinear, (torch.randn(2, 8), torch.randn(2, 4))) == 8 * 4 * 3
    generator = nn.Sequential(
        nn.Linear(6, 8 * 16),
        nn.BatchNorm1d(8 * 16),
        nn.ReLU(),
        nn.Unflatten(1, (8, 4, 4)),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
    )
    assert macs(generator, torch.randn(2, 6)) == 6 * 128 + 16 * 8 * 16
    assert generator[1].num_batches_tracked == 0


def test_macs_leave_the_attention_fast_path_as_it_was():
    macs(nn.Linear(2, 2), torch.zeros(1, 2))
    assert torch.backends.mha.get_fastpath_enabled()


def tied():
    net = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False))
    net[1].weight = net[0].weight
    return net


def test_parameters_count_once_and_zeros_do_not():
    net = tied()
    with torch.no_grad():
        net[0].weight[:10] = 0
    assert parameter_counts(net) == {"params": 800, "nonzero_params": 640}
    assert parameter_counts(nn.BatchNorm2d(4)) == {"params": 8, "nonzero_params": 4}


@pytest.mark.parametrize("build", [lambda: nn.GRU(4, 8), lambda: nn.BatchNorm2d(3)])
def test_bytes_equal_the_files(build, tmp_path):
    module = build()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    assert torch_bytes(module) == (tmp_path / "model.pt").stat().st_size
    assert safetensors_bytes(module) == (tmp_path / "m.safetensors").stat().st_size
    assert file_sizes(module) == {
        "torch": torch_bytes(module),
        "safetensors": safetensors_bytes(module),
    }


def test_shared_tensors_are_stored_once():
    sizes = file_sizes(tied())
    assert 800 * 4 < sizes["safetensors"] < 1.2 * 800 * 4
    assert 800 * 4 < sizes["torch"] < 2 * 800 * 4
