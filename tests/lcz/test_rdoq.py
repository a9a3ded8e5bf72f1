"""Choosing grid points by rate and distortion at save."""

import copy
import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from tiny import TinyAutoencoder, batches, quiet_trainer
from torch import nn

from lightning_compress import (
    QuantizationAwareTraining,
    compression_state,
    load_compressed,
    quantize_weights,
    save_compressed,
)
from lightning_compress.lab.commands import run_command
from lightning_compress.lcz import rdoq as rdoq_module
from lightning_compress.lcz.rdoq import cheaper, code_lengths, output_fisher
from lightning_compress.lcz.rdoq_compensation import compensated_choice


def gridded(seed=0, norm=True):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    quantize_weights(net, 8, scheme="entropy", step=0.5)
    return net.eval()


def images(seed=1, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(16, 1, 8, 8, generator=generator) for _ in range(count)]


def test_a_choice_is_the_best_of_all_for_its_lengths():
    torch.manual_seed(0)
    symbols = (torch.randn(5, 7) * 1.5).round().long()
    importance = torch.rand(5, 7) + 0.1
    chosen = cheaper(symbols, importance, 0.1)
    assert ((chosen == symbols) | (chosen == 0) | ((symbols - chosen).abs() == 1)).all()
    assert (chosen.abs() <= symbols.abs()).all()
    last = chosen
    for _ in range(20):  # to where choosing again changes nothing
        zero, size = code_lengths(last)
        again = symbols.clone()
        for place in itertools.product(range(5), range(7)):
            q, p0 = abs(int(symbols[place])), 2 ** -float(zero[place])

            def cost(c, q=q, p0=p0, place=place, size=size):
                bits = -torch.tensor(p0 if c == 0 else 1 - p0).log2() + (size[c] if c else 0)
                return float(importance[place] / 2 * (q - c) ** 2 + 0.1 * bits)

            again[place] = min({q, max(q - 1, 0), 0}, key=cost) * symbols[place].sign()
        if torch.equal(again, last):
            break
        last = again
    assert (again != chosen).float().mean() <= 0.1


def test_more_is_taken_as_a_bit_is_worth_more(tmp_path):
    net = gridded()
    before = copy.deepcopy(net.state_dict())
    sizes = [save_compressed(net, tmp_path / "plain.lcz").bytes]
    sizes += [
        save_compressed(net, tmp_path / "m.lcz", rdoq=rdoq).bytes for rdoq in (1e-6, 0.05, 0.2)
    ]
    assert abs(sizes[1] - sizes[0]) <= 0.01 * sizes[0]
    assert sizes[0] > 1.02 * sizes[2] > 1.04 * sizes[3]
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    back = load_compressed(tmp_path / "m.lcz", gridded(5))
    for path, grid in compression_state(net).grids.items():
        old, new = grid.quantize(net.get_parameter(path)), grid.quantize(back.get_parameter(path))
        assert torch.equal(grid.dequantize(new), back.get_parameter(path))
        assert ((new == 0) | ((old - new).abs() <= 1)).all()


def test_the_fisher_diagonal_is_that_of_the_jacobian():
    net = nn.Linear(3, 2)
    batch = torch.randn(2000, 3)
    # d out_i / d w_ij = x_j: summed over the batch, the same for both rows; signs average out.
    found = output_fisher(net, list(batch.split(1)), ["weight"])["weight"]
    wanted = batch.square().sum(0).expand(2, 3)
    assert torch.allclose(found, wanted, rtol=1e-4)
    joined = output_fisher(net, [batch] * 400, ["weight"])["weight"] / 400
    assert torch.allclose(joined, wanted, rtol=0.25)
    assert not any(one.grad is not None for one in net.parameters())


def test_data_spare_what_the_outputs_depend_on(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 8))
    scale = torch.logspace(-2, 1, 40)
    data = [torch.randn(64, 40) * scale for _ in range(8)]
    quantize_weights(net, 8, scheme="entropy", step=0.3)
    errors = {}
    for name, more in {"data": {"data": data}, "unit": {}}.items():
        found = []
        for rdoq in (0.05, 0.1, 0.2, 0.4):
            size = save_compressed(net, tmp_path / "m.lcz", rdoq=rdoq, **more).bytes
            back = load_compressed(tmp_path / "m.lcz", copy.deepcopy(net))
            error = (back(data[0]) - net(data[0])).detach().square().mean()
            found.append((size, error.item()))
        errors[name] = found
    for size, error in errors["unit"][1:]:
        assert any(s <= size and e < error for s, e in errors["data"])


def test_statistics_are_those_of_the_chosen_weights(tmp_path):
    net, data = gridded(), images()
    save_compressed(net, tmp_path / "m.lcz", rdoq=0.2, data=data)
    back = load_compressed(tmp_path / "m.lcz", gridded(3)).eval()
    reads = torch.cat([back[0](one) for one in data])
    assert torch.allclose(back[1].running_mean, reads.mean((0, 2, 3)), atol=1e-4)
    assert torch.equal(net[1].running_mean, torch.zeros(32))
    assert not net.training


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    quantize_weights(net, 4, scheme="entropy")
    info = save_compressed(net, tmp_path / "m.lcz", rdoq=0.3)
    assert info.per_tensor["1.weight"].kind == "tied"


def test_pack_takes_it(tmp_path, capsys):
    model = TinyAutoencoder()
    rounding = QuantizationAwareTraining(
        activation_bits=None, scheme="entropy", include=["decoder.*"]
    )
    model.encoder = nn.Sequential(nn.Linear(6, 64), nn.ReLU())
    model.decoder = nn.Linear(64, 6)
    trainer = quiet_trainer(tmp_path, rounding)
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    sizes = []
    for more in ([], ["--rdoq", "0.3"]):
        words = ["pack", str(tmp_path / "m.ckpt"), "--out", str(tmp_path / "m.lcz"), *more]
        assert run_command(words) == 0
        sizes.append((tmp_path / "m.lcz").stat().st_size)
    assert sizes[1] < 0.98 * sizes[0]
    capsys.readouterr()
    assert run_command(["pack", str(tmp_path / "m.ckpt"), "--rdoq", "0"]) == 2
    assert "rdoq=0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rdoq": 0.0}, r"rdoq=0\.0 must be"),
        ({"rdoq": -1}, "rdoq=-1"),
        ({"rdoq": float("nan")}, "rdoq=nan"),
        ({"data": [torch.zeros(1, 6)]}, "data= is for rdoq="),
        ({"rdoq": 0.1}, "no tensor lies on one"),
    ],
)
def test_bad_arguments_are_named(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        save_compressed(TinyAutoencoder(), tmp_path / "m.lcz", **more)


def autoencoder():
    """On digits, a few hundred steps: what a file of it loses can be measured."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 24), nn.ReLU(), nn.Linear(24, 256), nn.ReLU(), nn.Unflatten(1, (16, 4, 4)),
        nn.ConvTranspose2d(16, 1, 4, 2, 1),
    )  # fmt: skip
    x = torch.from_numpy(load_digits().images).float()[:, None] / 16
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(300):
        batch = x[torch.randint(0, 1400, (64,))]
        optimizer.zero_grad()
        (net(batch) - batch).square().mean().backward()
        optimizer.step()
    quantize_weights(net, 8, scheme="entropy", step=0.3)
    return net.eval(), x


def test_later_weights_make_up_for_earlier_ones(tmp_path, monkeypatch):
    net, x = autoencoder()
    data, test = [x[i : i + 100] for i in range(0, 1400, 100)], x[1400:]
    wanted = net(test).detach()

    def found(rdoq):
        size = save_compressed(net, tmp_path / "m.lcz", rdoq=rdoq, data=data).bytes
        back = load_compressed(tmp_path / "m.lcz", copy.deepcopy(net)).eval()
        return size, float((back(test) - wanted).square().mean().detach())

    with_them = [found(rdoq) for rdoq in (0.01, 0.02, 0.05)]
    monkeypatch.setattr(rdoq_module, "layer_hessians", lambda *_: iter(()))
    without = [found(rdoq) for rdoq in (0.05, 0.1)]
    for size, error in without:
        assert any(s < size and e < 0.7 * error for s, e in with_them)


@pytest.mark.parametrize("rdoq", [0.01, 0.1, 1.0])
def test_zeros_and_the_range_stay_under_compensation(tmp_path, rdoq):
    net = gridded()
    save_compressed(net, tmp_path / "m.lcz", rdoq=rdoq, data=images())
    back = load_compressed(tmp_path / "m.lcz", gridded(3))
    for path, grid in compression_state(net).grids.items():
        old, new = grid.quantize(net.get_parameter(path)), grid.quantize(back.get_parameter(path))
        assert torch.equal(grid.dequantize(new), back.get_parameter(path))
        assert bool((new[old == 0] == 0).all())
        assert int(new.abs().max()) <= int(old.abs().max())
        assert not torch.equal(old, new)


def test_with_unrelated_inputs_the_choice_is_each_weights_own():
    torch.manual_seed(0)
    symbols, scale = (torch.randn(6, 9) * 2).round().int(), torch.ones(6, 9)
    lengths = code_lengths(symbols)
    hessian = 2 * torch.eye(9, dtype=torch.float64)
    worth, most = torch.full((6, 1), 0.3), int(symbols.abs().max())
    new = compensated_choice(symbols, scale, hessian, lengths, worth, (-most, most))
    zero, size = lengths
    other = -(1 - torch.exp2(-zero)).log2()
    for place in itertools.product(range(6), range(9)):
        q = abs(int(symbols[place]))

        def cost(c, q=q, place=place):
            bits = float(zero[place] if c == 0 else other[place] + size[c])
            return (q - c) ** 2 + 0.3 * bits

        options = {q, max(q - 1, 0), 0} if q else {0}
        assert cost(abs(int(new[place]))) <= min(map(cost, options)) + 1e-5


def test_a_largest_symbol_that_falls_away_is_no_error():
    symbols = torch.zeros(4, 50, dtype=torch.int32)
    symbols[0, 0], symbols[1, 3], symbols[2, 9] = 40, 3, 1
    chosen = cheaper(symbols, torch.full((4, 50), 1e-4), 0.1)
    assert int(chosen.abs().max()) < 40


def test_biases_are_refitted_where_no_norm_follows(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    quantize_weights(net, 8, scheme="entropy", step=0.5)
    data = [torch.randn(200, 20) + 1 for _ in range(4)]
    save_compressed(net, tmp_path / "m.lcz", rdoq=0.3, data=data)
    back = load_compressed(tmp_path / "m.lcz", copy.deepcopy(net))
    x = torch.cat(data)
    assert torch.allclose(back(x).mean(0), net(x).mean(0), atol=1e-4)
    assert not torch.equal(back[2].weight, net[2].weight)


def test_networks_of_a_container_have_inputs_of_their_own(tmp_path):
    nets = nn.ModuleDict({"one": gridded(), "two": gridded(1)})
    save_compressed(nets, tmp_path / "m.lcz", rdoq=0.1, data={"one": images(), "two": images(2)})
    back = load_compressed(tmp_path / "m.lcz", nn.ModuleDict({"one": gridded(), "two": gridded()}))
    for name, data in {"one": images(), "two": images(2)}.items():
        save_compressed(nets[name], tmp_path / "alone.lcz", rdoq=0.1, data=data)
        alone = load_compressed(tmp_path / "alone.lcz", gridded())
        for key, value in alone.state_dict().items():
            assert torch.equal(back[name].state_dict()[key], value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images(), "ModuleDict has no forward.*'encoder'"),
        ({"decoder": images()}, "decoder.*encoder"),
        ({"encoder.0": [torch.rand(4, 1, 8, 8)]}, "no inputs of the networks that hold"),
    ],
)
def test_data_for_what_has_no_forward_are_an_error(tmp_path, data, message):
    net = nn.ModuleDict({"encoder": gridded()})
    with pytest.raises(ValueError, match=message):
        save_compressed(net, tmp_path / "m.lcz", rdoq=0.1, data=data)
    assert not (tmp_path / "m.lcz").exists()


def test_what_cannot_be_traced_keeps_its_biases_and_has_the_statistics_of_its_reads(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = (
                nn.Linear(20, 32),
                nn.BatchNorm1d(32),
                nn.Linear(32, 5),
            )

        def forward(self, x):
            x = self.norm(self.first(x))
            return self.last(x.relu() if x.sum() > -1e9 else x)

    torch.manual_seed(0)
    net, data = Branching().eval(), [torch.randn(200, 20) + 1 for _ in range(4)]
    quantize_weights(net, 8, scheme="entropy", step=0.5)
    save_compressed(net, tmp_path / "m.lcz", rdoq=0.3, data=data)
    back = load_compressed(tmp_path / "m.lcz", Branching()).eval()
    assert torch.equal(back.first.bias, net.first.bias)
    assert torch.equal(back.last.bias, net.last.bias)
    reads = back.first(torch.cat(data))
    assert torch.allclose(back.norm.running_mean, reads.mean(0), atol=1e-4)
