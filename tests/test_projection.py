"""The projection engine in plain training loops, against fake quantization in the forward pass."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_compress.errors import TargetError
from lightning_compress.projection import Projector
from lightning_compress.quantization.ranges import affine_grid
from lightning_compress.state import compression_state
from lightning_compress.targets import Target, select


def attach(module, *optimizers, bits=None, mask=False, include=None):
    projector = Projector.of(module)
    for target in select(module, include).targets:
        projected = projector.add(target)
        if mask:
            projected.set_mask(torch.rand(target.parameter.shape) > 0.5)
        if bits:
            projected.set_quantizer(lambda weight: affine_grid(weight, bits=bits))
    projector.attach(optimizers)
    projector.project()
    return projector


class FakeQuantized(nn.Module):
    """The textbook form: a mask and a fake quantization in every forward, straight through."""

    def __init__(self, mask, bits):
        super().__init__()
        self.mask, self.bits = mask, bits

    def forward(self, weight):
        masked = weight * self.mask
        if self.bits is None:
            return masked
        projected = affine_grid(masked.detach(), bits=self.bits).project(masked.detach())
        return masked + (projected - masked).detach()


def layers():
    return {
        "linear": (nn.Linear(6, 5), torch.randn(4, 6)),
        "conv": (nn.Conv2d(3, 4, 3, groups=1), torch.randn(2, 3, 6, 6)),
        "grouped": (nn.Conv2d(4, 4, 3, groups=4), torch.randn(2, 4, 6, 6)),
        "transposed": (nn.ConvTranspose2d(3, 4, 4, 2, 1), torch.randn(2, 3, 5, 5)),
    }


@pytest.mark.parametrize("name", list(layers()))
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("make", ["SGD", "AdamW"])
def test_twenty_steps_equal_a_fake_quantized_forward(name, bits, make):
    torch.manual_seed(0)
    layer, x = layers()[name]
    twin = copy.deepcopy(layer)
    torch.manual_seed(1)
    arguments = {"momentum": 0.9} if make == "SGD" else {}
    optimizer = getattr(torch.optim, make)(layer.parameters(), lr=0.01, **arguments)
    projector = attach(layer, optimizer, bits=bits, mask=True)
    mask = (~projector.projected_weights["weight"].pruned).float()
    with torch.no_grad():
        twin.weight.mul_(mask)  # weight decay and momentum of what is masked play no part then
    parametrize.register_parametrization(twin, "weight", FakeQuantized(mask, bits))
    twin_optimizer = getattr(torch.optim, make)(twin.parameters(), lr=0.01, **arguments)
    for _ in range(20):
        for module, one in ((layer, optimizer), (twin, twin_optimizer)):
            one.zero_grad()
            module(x).square().mean().backward()
            one.step()
        torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=0)
    projector.detach()


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_and_embedding_weights_stay_on_mask_and_grid(kind):
    module = nn.ModuleDict({"table": nn.Embedding(7, 5), "cell": kind(5, 4, bidirectional=True)})
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    projector = attach(module, optimizer, bits=3, mask=True, include=["*", "table"])
    for _ in range(5):
        optimizer.zero_grad()
        output, _ = module["cell"](module["table"](torch.randint(0, 7, (6, 2))))
        output.square().sum().backward()
        optimizer.step()
    assert len(projector.projected_weights) == 5
    for projected in projector.projected_weights.values():
        assert torch.equal(
            projected.parameter[projected.pruned], torch.zeros(int(projected.pruned.sum()))
        )
        assert projected.parameter.unique().numel() <= 7
        assert projected.parameter.unique().numel() > 1
    projector.detach()


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrized_weights_keep_their_zeros(wrap):
    torch.manual_seed(0)  # weight_norm divides by 0 where a whole row is pruned
    layer = wrap(nn.Linear(6, 5))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    projector = attach(layer, optimizer, mask=True)
    (projected,) = projector.projected_weights.values()
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight == 0, projected.pruned)
    projector.detach()


def test_a_closure_sees_visible_weights_each_time_it_is_called():
    layer = nn.Linear(6, 5)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=5)
    projector = attach(layer, optimizer, bits=3, mask=True)
    x, levels = torch.randn(8, 6), []

    def closure():
        optimizer.zero_grad()
        levels.append(layer.weight.unique().numel())
        assert (layer.weight[projector.projected_weights["weight"].pruned] == 0).all()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert len(levels) > 4
    assert max(levels) <= 7
    assert projector.steps == [2]
    projector.detach()


def test_a_skipped_step_leaves_visible_weights_and_the_clock_alone():
    layer = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    projector = attach(layer, optimizer, bits=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = layer.weight.detach().clone()
    scaler.scale(layer(torch.full((2, 6), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert projector.steps == [0]
    assert torch.equal(layer.weight, before)
    optimizer.zero_grad()
    scaler.scale(layer(torch.randn(2, 6)).sum()).backward()
    scaler.step(optimizer)
    assert projector.steps == [1]
    assert layer.weight.unique().numel() <= 7
    projector.detach()


def test_pruned_positions_stay_out_of_the_clipping_norm():
    layer = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    projector = attach(layer, optimizer, mask=True)
    layer(torch.randn(4, 6)).square().sum().backward()
    pruned = projector.projected_weights["weight"].pruned
    assert (layer.weight.grad[pruned] == 0).all()
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    assert norm == pytest.approx(float(layer.weight.grad[~pruned].norm() * norm), rel=1e-4)
    projector.detach()


@pytest.mark.parametrize("write", ["clamp", "data"])
def test_what_others_write_survives_and_the_rest_keeps_its_latent(write):
    layer = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    projector = attach(layer, optimizer, bits=4)
    latent = projector.projected_weights["weight"].latent.clone()
    bound = layer.weight.detach().abs().max().item() / 2
    touched = layer.weight.detach().abs() > bound
    with torch.no_grad():
        (layer.weight.data if write == "data" else layer.weight).clamp_(-bound, bound)
    layer(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    after = projector.projected_weights["weight"].latent
    assert torch.equal(after[~touched], latent[~touched])
    assert torch.allclose(after[touched].abs(), torch.tensor(bound))
    assert touched.any()
    projector.detach()


def test_two_optimizers_have_two_clocks_and_shared_weights_take_the_slower():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    both = torch.optim.SGD(module.parameters(), lr=0.1)
    only_a = torch.optim.SGD(module["a"].parameters(), lr=0.1)
    projector = attach(module, both, only_a, mask=True)
    for optimizer, times in ((both, 1), (only_a, 3)):
        for _ in range(times):
            optimizer.step()
    assert projector.steps == [1, 3]
    assert projector.clock(["a.weight"]) == 1
    assert projector.clock(["b.weight"]) == 1
    projector.detach()


def test_module_copies_pickles_and_state_dict_are_plain():
    layer = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    keys = list(layer.state_dict())
    projector = attach(layer, optimizer, bits=4, mask=True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert list(twin.state_dict()) == keys
        assert torch.equal(twin.weight, layer.weight)
        assert compression_state(twin).grids["weight"].bits == 4
        twin(torch.randn(1, 6)).sum().backward()
        assert (twin.weight.grad != 0).all()  # the copy has no hook of the original
    projector.detach()
    assert Projector.find(layer) is None
    fresh = nn.Linear(6, 5)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), layer(x))


def test_a_failing_update_leaves_visible_weights_after_detach():
    layer = nn.Linear(6, 5)

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("disk on fire")

    optimizer = Failing(layer.parameters(), lr=0.1)
    projector = attach(layer, optimizer, bits=2)
    with pytest.raises(RuntimeError, match="disk on fire"):
        optimizer.step()
    assert layer.weight.unique().numel() > 3
    projector.detach()
    assert layer.weight.unique().numel() <= 3


def test_compiled_modules_train_without_graph_breaks_in_the_forward():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    projector = attach(layer, optimizer, bits=4, mask=True)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(torch.randn(2, 6)).square().sum().backward()
        optimizer.step()
    projected = projector.projected_weights["weight"]
    assert (layer.weight[projected.pruned] == 0).all()
    assert (layer.weight.grad[projected.pruned] == 0).all()
    assert layer.weight.unique().numel() <= 15
    projector.detach()


def test_optimizers_that_keep_their_own_weights_are_refused_by_name():
    layer = nn.Linear(2, 2)

    class AdamWScheduleFree(torch.optim.SGD):
        pass

    class Bare:
        param_groups = ()

    for optimizer, message in (
        (AdamWScheduleFree(layer.parameters(), lr=0.1), "AdamWScheduleFree keeps a second copy"),
        (Bare(), "Bare has no step hooks"),
    ):
        with pytest.raises(TargetError, match=message):
            attach(layer, optimizer)
        Projector.of(layer).detach()


def test_weights_without_an_optimizer_are_named():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(module["a"].parameters(), lr=0.1)
    with pytest.raises(TargetError, match=r"no optimizer owns \['b.weight'\]"):
        attach(module, optimizer)
    Projector.of(module).detach()


def test_a_mask_of_the_wrong_shape_is_refused():
    layer = nn.Linear(2, 2)
    projected = Projector.of(layer).add(select(layer).targets[0])
    with pytest.raises(TargetError, match="mask of weight has shape"):
        projected.set_mask(torch.ones(3, dtype=torch.bool))
    Projector.of(layer).detach()


@pytest.mark.parametrize("name", list(layers()))
@pytest.mark.parametrize("bits", [None, 4])
def test_dense_gradients_equal_a_straight_through_mask(name, bits):
    torch.manual_seed(0)
    layer, x = layers()[name]
    twin = copy.deepcopy(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    projector = attach(layer, optimizer, bits=bits)
    projected = projector.projected_weights["weight"]
    projected.dense_gradient = True
    fake = DenselyFakeQuantized(bits)
    parametrize.register_parametrization(twin, "weight", fake)
    for step in range(20):
        if step % 4 == 1:  # masks move, and what returns has trained on meanwhile
            torch.manual_seed(step)
            fake.mask = (torch.rand(layer.weight.shape) > 0.5).float()
            projected.set_mask(fake.mask.bool())
            projected.project()
        for module, one in ((layer, optimizer), (twin, twin_optimizer)):
            one.zero_grad()
            module(x).square().mean().backward()
            one.step()
        torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=0)
    hidden = twin.parametrizations.weight.original.detach()
    assert torch.equal(projected.values(), hidden)
    assert hidden[projected.pruned].abs().sum() > 0
    projected.dense_gradient = False
    projected.project()
    assert not projected.values()[projected.pruned].any()
    projector.detach()


class DenselyFakeQuantized(nn.Module):
    """As `FakeQuantized`, but what is masked gets its gradient too."""

    def __init__(self, bits):
        super().__init__()
        self.mask, self.bits = torch.tensor(1.0), bits

    def forward(self, weight):
        shown = weight.detach() * self.mask
        if self.bits is not None:
            shown = affine_grid(shown, bits=self.bits).project(shown)
        return weight + (shown - weight).detach()


def test_what_others_write_over_hidden_values_counts():
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    projector = attach(layer, optimizer)
    projected = projector.projected_weights["weight"]
    projected.dense_gradient = True
    projected.set_mask(torch.tensor([True, True, False, False]).expand(3, 4))
    projected.project()
    hidden = projected.latent.clone()
    with torch.no_grad():
        layer.weight[0, 0] = 9.0
        layer.weight[0, 3] = 7.0
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    hidden[0, 0], hidden[0, 3] = 9.0, 7.0
    assert torch.equal(projected.latent, hidden)
    assert torch.equal(layer.weight, hidden * ~projected.pruned)
    projected.set_values(torch.full((3, 4), 2.0))
    projected.project()
    assert torch.equal(layer.weight, torch.full((3, 4), 2.0) * ~projected.pruned)
    projector.detach()


@pytest.mark.parametrize("attached", [False, True])
def test_a_projector_ends_with_its_module_without_detach(attached):
    layer = nn.Linear(3, 2)
    projector = Projector.of(layer)
    projected = projector.add(Target("weight", layer, "weight", layer.weight))
    projected.set_mask(torch.ones(2, 3, dtype=torch.bool))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    if attached:
        projector.attach([optimizer])
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    ends = [weakref.ref(layer), weakref.ref(projector), weakref.ref(projected)]
    del layer, projector, projected, optimizer
    gc.collect()
    assert [one() for one in ends] == [None] * 3


def test_copies_and_pickles_of_a_module_have_no_projector():
    layer = nn.Linear(3, 2)
    projector = Projector.of(layer)
    projector.add(Target("weight", layer, "weight", layer.weight))
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert Projector.find(other) is None
        assert Projector.of(other) is not projector
    assert Projector.find(layer) is projector
    projector.detach()
    assert Projector.find(layer) is None
    assert Projector.of(layer) is not projector
