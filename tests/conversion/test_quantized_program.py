"""Programs for phones: the trained grids, integers in them, and nothing else in between."""

import io

import pytest
import torch
from torch import nn

from lightning_compress import (
    fake_quantized,
    quantize_dynamic,
    quantize_static,
    quantize_weights,
    quantized_program,
)


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def settle_norms(module, x):
    """Running statistics, factors of either sign."""
    module.train()
    for _ in range(3):
        module(x)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            part.weight.data[::2] *= -1
            nn.init.normal_(part.bias)
    return module.eval()


def expected(module, *x, **more):
    with torch.no_grad(), fake_quantized(module):
        return module(*x, **more)


def picture_generator():
    return nn.Sequential(
        nn.Linear(6, 4 * 9),
        nn.Unflatten(1, (4, 3, 3)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(6, 2, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
    )


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per_channel", [True, False])
def test_without_norms_the_numbers_are_those_of_the_trained_grids(scheme, bits, per_channel):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(3, 8, 3, groups=1), nn.GELU(), nn.ConvTranspose1d(8, 2, 4, 2))
    x = torch.randn(4, 3, 20)
    quantize_static(
        module, [x], weight_bits=bits, activation_bits=bits, scheme=scheme, per_channel=per_channel
    )
    program = quantized_program(module, x)
    assert torch.equal(program.module()(x), expected(module, x))
    stored = [one for one in program.state_dict.values() if one.dtype == torch.int8]
    assert sorted(one.numel() for one in stored) == [64, 72]
    assert not [one for one in program.parameters() if one.dim() > 1]
    kind = "per_channel" if per_channel else "per_tensor"
    assert sum(f"dequantize_{kind}" in one for one in targets(program)) >= 2


def test_batch_norms_are_folded():
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    module = settle_norms(picture_generator(), x)
    quantize_static(module, [x])
    before = {name: one.clone() for name, one in module.state_dict().items()}
    program = quantized_program(module, x)
    assert not [one for one in targets(program) if "batch_norm" in one]
    away = (program.module()(x) - expected(module, x)).abs()
    assert (away < 1e-6).float().mean() > 0.99  # a rounding may fall the other way
    assert away.max() < 0.05
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
    assert not any(isinstance(one, nn.Identity) for one in module.modules())


def test_a_norm_stays_where_folding_would_change_the_result():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.aside, self.other = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.norm(self.conv(x))
            z = self.aside(self.norm(self.conv(y)))
            return z + self.other(z)

    torch.manual_seed(0)
    x = torch.randn(8, 2, 4, 4)
    module = settle_norms(Twice(), x)
    quantize_static(module, [x])
    program = quantized_program(module, x)
    assert sum("batch_norm" in one for one in targets(program)) == 3
    assert torch.equal(program.module()(x), expected(module, x))


def test_recurrent_tied_and_keyword_modules():
    class Talker(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.gru = nn.Embedding(7, 5), nn.GRU(5, 5, batch_first=True)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens, *, temperature):
            return {"logits": self.head(self.gru(self.table(tokens))[0]) / temperature}

    torch.manual_seed(0)
    module = Talker().eval()
    quantize_weights(module)
    sample = {"tokens": torch.randint(7, (2, 3)), "temperature": torch.tensor(2.0)}
    program = quantized_program(module, sample)
    found, wanted = program.module()(**sample), expected(module, **sample)
    assert torch.allclose(found["logits"], wanted["logits"], rtol=0, atol=1e-6)
    assert sum(one.dtype == torch.int8 for one in program.state_dict.values()) == 3


def test_a_codebook_stays_float_and_a_program_can_be_saved():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4)
    quantize_weights(module[0], bits=3, scheme="codebook")
    quantize_static(module[2], [module[:2](x).detach()])
    program = quantized_program(module, x)
    assert sum(one.dtype == torch.int8 for one in program.state_dict.values()) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), expected(module, x))


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        (lambda module, x: None, "QuantizationAwareTraining"),
        (lambda module, x: quantize_dynamic(module), "quantize_static"),
        (lambda module, x: (quantize_static(module, [x]), module.double()), "float64"),
    ],
    ids=["no_grids", "dynamic", "double"],
)
def test_bad_input_is_named(prepare, named):
    module, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    prepare(module, x)
    with pytest.raises(ValueError, match=named):
        quantized_program(module, x)
