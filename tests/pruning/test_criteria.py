"""Criteria by name and by object; curvature against finite differences; two processes agree."""

import pytest
import torch
from processes import leave
from torch import nn

from lightning_compress.projection import ProjectedWeight, Projector
from lightning_compress.pruning.criteria import (
    CRITERIA,
    Fisher,
    Hutchinson,
    InputActivation,
    Random,
    Stateless,
    Taylor,
    magnitude,
    magnitude_l2,
    make_criterion,
)
from lightning_compress.pruning.optimal_brain_surgeon import OptimalBrainSurgeon
from lightning_compress.pruning.statistics import Criterion
from lightning_compress.targets import Target, select


def projected_weights_of(model):
    projector = Projector.of(model)
    return [projector.add(target) for target in select(model).targets]


def projected_of(weight, path="weight"):
    layer = nn.Module()
    layer.register_parameter("weight", nn.Parameter(weight))
    return ProjectedWeight(Target(path, layer, "weight", layer.weight))


@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_name_makes_a_criterion(name):
    criterion = make_criterion(name)
    assert isinstance(criterion, Criterion)
    assert isinstance(criterion.window, int)
    assert make_criterion(criterion) is criterion
    assert make_criterion(name) is not criterion


def test_magnitudes_order_alike():
    weight = torch.randn(4, 5)
    one, two = (
        make_criterion(name).scores(projected_of(weight)) for name in ("magnitude", "magnitude_l2")
    )
    assert torch.equal(one, weight.abs())
    assert torch.equal(one.flatten().argsort(), two.flatten().argsort())
    norm = torch.linalg.vector_norm(weight, dim=1)  # a group's squares sum up to its norm's
    torch.testing.assert_close(magnitude_l2(weight).sum(1), norm**2)
    assert not magnitude(nn.Parameter(weight)).requires_grad


def test_a_function_and_an_object_of_ones_own():
    class Own:
        window = 3

        def begin(self, projected_weights):
            pass

        def scores(self, projected):
            return projected.values()

        def end(self):
            pass

    own = Own()
    assert make_criterion(own) is own
    criterion = make_criterion(lambda weight: -weight)
    assert isinstance(criterion, Stateless)
    assert criterion.scores(projected_of(torch.ones(2, 2))).tolist() == [[-1.0] * 2] * 2


@pytest.mark.parametrize("function", [lambda w: w.sum(), lambda w: 3.0])
def test_scores_of_a_wrong_shape_are_named(function):
    with pytest.raises(ValueError, match=r"gave .* for weight of shape \(2, 2\)"):
        make_criterion(function).scores(projected_of(torch.ones(2, 2)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("magic", r"criterion='magic': valid are \['activation', 'fisher'"),
        (Taylor, "criterion=Taylor is a class: give an object of it"),
        (7, "criterion=7 has no window"),
    ],
)
def test_what_is_no_criterion_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        make_criterion(given)


def test_random_scores_depend_on_seed_and_path_alone():
    weight = torch.randn(50, 50)
    state = torch.get_rng_state()
    first = Random(seed=1).scores(projected_of(weight))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    assert torch.equal(first, Random(seed=1).scores(projected_of(2 * weight)))
    for other in (
        Random(seed=2).scores(projected_of(weight)),
        Random(seed=1).scores(projected_of(weight, "b")),
    ):
        assert not torch.equal(first, other)
    assert 0 <= first.min() < 0.01
    assert 0.99 < first.max() < 1
    assert abs(first.mean() - 0.5) < 0.02


def curved(seed=0):
    """A small net in double precision with a smooth loss, and that loss."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    return net, lambda: (net(x) - y).square().mean()


def second_differences(weight, loss, step=1e-4):
    """Diagonal of the Hessian by central differences of the loss itself."""
    diagonal, flat = torch.zeros(weight.numel(), dtype=torch.double), weight.data.view(-1)
    with torch.no_grad():
        middle = loss().item()
        for i, value in enumerate(flat.tolist()):
            around = []
            for offset in (step, -step):
                flat[i] = value + offset
                around.append(loss().item())
            flat[i] = value
            diagonal[i] = (sum(around) - 2 * middle) / step**2
    return diagonal.view_as(weight)


def off_diagonal(projected, projected_weights, loss):
    """Standard deviation of one sample: the norm of each Hessian row without its diagonal."""
    weights = [one.parameter for one in projected_weights]
    (first,) = torch.autograd.grad(loss(), [projected.parameter], create_graph=True)
    rows = [torch.autograd.grad(one, weights, retain_graph=True) for one in first.flatten()]
    whole = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    start = sum(w.numel() for w in weights[: projected_weights.index(projected)])
    own = whole[:, start : start + len(whole)].diagonal()
    return (whole.square().sum(1) - own**2).sqrt().view_as(projected.parameter)


def test_hutchinson_estimates_the_hessians_diagonal():
    net, loss = curved()
    projected_weights = projected_weights_of(net)
    criterion = Hutchinson(loss, samples=400)
    state = torch.get_rng_state()
    criterion.begin(projected_weights)
    with torch.no_grad():  # as in a prune event
        scores = [criterion.scores(projected) for projected in projected_weights]
    assert torch.equal(state, torch.get_rng_state())
    for projected, got in zip(projected_weights, scores, strict=True):
        expected = projected.values() ** 2 * second_differences(projected.parameter, loss) / 2
        spread = (
            projected.values() ** 2
            * off_diagonal(projected, projected_weights, loss)
            / 2
            / 400**0.5
        )
        assert ((got - expected).abs() < 5 * spread + 1e-6).all()
    assert all(projected.parameter.grad is None for projected in projected_weights)
    criterion.end()
    with pytest.raises(RuntimeError, match=r"no begin\(\) with 0\.weight"):
        criterion.scores(projected_weights[0])


def test_hutchinson_is_exact_where_the_hessian_is_diagonal_and_feeds_no_taps():
    projected = projected_of(torch.tensor([[1.0, 2.0, 3.0]]))
    projected.parameter.register_hook(projected.mask_gradient)
    projected.taps.append(lambda gradient: pytest.fail("a gradient of no training step"))
    criterion = Hutchinson(lambda: (projected.parameter**3).sum(), samples=1)
    criterion.begin([projected])
    torch.testing.assert_close(
        criterion.scores(projected), projected.values() ** 2 * 6 * projected.values() / 2
    )
    assert len(projected.taps) == 1
    linear = Hutchinson(lambda: projected.parameter.sum())
    linear.begin([projected])
    projected.taps.clear()
    assert linear.scores(projected).tolist() == [[0.0] * 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": 3.0}, r"loss_fn=3\.0 must be a callable"),
        ({"loss_fn": lambda: None, "samples": 0}, "samples=0"),
    ],
)
def test_bad_arguments_of_hutchinson_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Hutchinson(**arguments)


def test_hutchinson_names_a_loss_without_a_graph():
    projected = projected_of(torch.ones(1, 2))
    criterion = Hutchinson(lambda: torch.tensor(1.0))
    criterion.begin([projected])
    with pytest.raises(RuntimeError, match="depends on no weight"):
        criterion.scores(projected)


def test_fisher_estimates_the_hessian_of_a_likelihood_at_its_optimum():
    """For a Gaussian likelihood with the true weights, E[g^2] is the Hessian's diagonal."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 1, bias=False)
    (projected,) = projected_weights_of(layer)
    criterion = Fisher()
    criterion.begin([projected])
    x = torch.randn(8000, 3) * torch.tensor([1.0, 2.0, 3.0])
    noise = torch.randn(8000, 1)
    target = layer(x).detach() + noise
    for i in range(8000):
        ((layer(x[i : i + 1]) - target[i : i + 1]).square().sum() / 2).backward()
    hessian = second_differences(
        layer.weight, lambda: (layer(x) - target).double().square().mean() / 2, step=0.1
    )
    expected = layer.weight.detach() ** 2 * hessian / 2
    got = criterion.scores(projected)
    criterion.end()
    torch.testing.assert_close(got.double(), expected, rtol=0.1, atol=0)


def test_taylor_predicts_the_loss_without_a_weight_to_first_order():
    net, loss = curved()
    projected = projected_weights_of(net)[0]
    criterion = Taylor()
    criterion.begin([projected])
    loss().backward()
    scores, flat = criterion.scores(projected), projected.parameter.data.view(-1)
    criterion.end()
    part = 1e-5  # of the way to zero
    with torch.no_grad():
        for i, value in enumerate(flat.tolist()):
            before = loss().item()
            flat[i] = value * (1 - part)
            change = abs(loss().item() - before) / part
            flat[i] = value
            assert change == pytest.approx(scores.flatten()[i].item(), rel=1e-3, abs=1e-7)


def work(rank, folder):
    """One of two processes: its own batches, the same scores and the same update."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    x = torch.randn(12, 4).chunk(2)[rank]
    (projected,) = projected_weights_of(layer)
    found = {}
    for kind in (InputActivation, OptimalBrainSurgeon, Taylor, Fisher):
        criterion = kind()
        criterion.begin([projected])
        layer(x).square().sum().backward()
        found[kind.__name__] = criterion.scores(projected).clone()
        if kind is OptimalBrainSurgeon:
            mask = torch.ones(3, 4, dtype=torch.bool).triu()
            found["update"] = criterion.update(projected, mask)
        assert torch.equal(criterion.scores(projected), found[kind.__name__])  # summed up once
        criterion.end()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    leave()


def test_two_processes_score_by_all_batches_and_agree(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    x = torch.randn(12, 4)
    expected = layer.weight.detach().abs() * x.square().sum(0).sqrt()
    torch.testing.assert_close(one["InputActivation"], expected)
    assert (one["update"].tril(-1) == 0).all()
