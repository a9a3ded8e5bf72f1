"""Gathered statistics against sums by hand, and hooks that come and go."""

import copy
import pickle

import pytest
import torch
from tiny import TinyGAN
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_compress.projection import Projector
from lightning_compress.pruning.criteria import (
    Fisher,
    InputActivation,
    Movement,
    OutputActivation,
    Taylor,
    make_criterion,
)
from lightning_compress.pruning.optimal_brain_surgeon import OptimalBrainSurgeon
from lightning_compress.targets import select

GATHERING = ["activation", "output_activation", "taylor", "fisher", "obs", "movement"]


def projected_weights_of(model, include=None):
    projector = Projector.of(model)
    return [projector.add(target) for target in select(model, include).targets]


def gathered(criterion, projected_weights, run):
    """Scores by path after a run inside the window."""
    criterion.begin(projected_weights)
    run()
    scores = {projected.path: criterion.scores(projected) for projected in projected_weights}
    criterion.end()
    return scores


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", GATHERING)
def test_hooks_and_memory_are_gone_after_the_end(name):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    criterion, projected_weights = make_criterion(name), projected_weights_of(model)
    before = {key: value for key, value in vars(criterion).items() if key != "_warned"}
    before = copy.deepcopy(before)
    criterion.begin(projected_weights)
    model(torch.randn(3, 4)).sum().backward()
    assert hooks(model) + sum(len(projected.taps) for projected in projected_weights) == len(
        projected_weights
    )
    for projected in projected_weights:
        criterion.scores(projected)
    criterion.end()
    criterion.end()
    assert hooks(model) == 0
    assert not any(projected.taps for projected in projected_weights)
    if name == "movement":
        criterion.reset()
    assert {key: vars(criterion)[key] for key in before} == before
    with pytest.raises(RuntimeError, match=r"no begin\(\) with 0\.weight"):
        criterion.scores(projected_weights[0])


@pytest.mark.parametrize("name", ["activation", "output_activation", "obs"])
def test_forwards_in_eval_mode_are_ignored(name):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    projected_weights = projected_weights_of(model)
    clean = gathered(make_criterion(name), projected_weights, lambda: model(x))

    def with_validation():
        model(x)
        model.eval()(100 * torch.randn(6, 4))
        model.train()

    disturbed = gathered(make_criterion(name), projected_weights, with_validation)
    assert torch.equal(clean["0.weight"], disturbed["0.weight"])


def by_hand(name, weight, batches, gradients):
    """What each criterion says about a Linear weight without bias, from its definition."""
    x = torch.cat(batches)
    if name == "activation":
        return weight.abs() * x.square().sum(0).sqrt()
    if name == "output_activation":
        return weight.abs() * (x @ weight.T).abs().mean(0).unsqueeze(1)
    if name == "taylor":
        return sum((weight * g).abs() for g in gradients)
    if name == "fisher":
        return weight**2 / 2 * sum(g**2 for g in gradients) / len(gradients)
    if name == "movement":
        return -sum(weight * g for g in gradients)
    hessian = 2 * x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    return weight**2 / hessian.inverse().diagonal().float()


@pytest.mark.parametrize("name", GATHERING)
def test_several_batches_accumulate_as_the_definition_says(name):
    layer = nn.Linear(4, 3, bias=False)
    weight = layer.weight.detach().clone()
    batches = [torch.randn(5, 4) for _ in range(4)]
    gradients = []
    for x in batches:
        output = x @ (free := weight.clone().requires_grad_()).T
        gradients.append(torch.autograd.grad((output**2).sum(), free)[0])

    def run():
        for x in batches:
            (layer(x) ** 2).sum().backward()

    scores = gathered(make_criterion(name), projected_weights_of(layer), run)["weight"]
    expected = by_hand(name, weight, batches, gradients)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", GATHERING)
def test_a_resume_inside_the_window_goes_on(name):
    layer = nn.Linear(4, 3)
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    projected_weights = projected_weights_of(layer)

    def step(x):
        layer(x).square().sum().backward()

    whole = gathered(make_criterion(name), projected_weights, lambda: [step(first), step(second)])
    early = make_criterion(name)
    early.begin(projected_weights)
    step(first)
    state = pickle.loads(pickle.dumps(early.state_dict()))
    early.end()
    late = make_criterion(name)
    late.load_state_dict(state)
    assert late.state_dict()["calls"] == {"weight": 1}
    resumed = gathered(late, projected_weights, lambda: step(second))
    assert torch.equal(whole["weight"], resumed["weight"])
    other = nn.Linear(2, 2)
    late.load_state_dict(state)
    with pytest.raises(ValueError, match=r"saved statistics of weight have shape"):
        late.begin(projected_weights_of(other))


def test_movement_goes_on_over_the_events_of_a_run():
    layer, criterion = nn.Linear(4, 3), Movement()
    projected_weights, sums = projected_weights_of(layer), 0
    for _ in range(3):
        criterion.begin(projected_weights)
        layer.zero_grad()
        layer(torch.randn(5, 4)).square().sum().backward()
        sums = sums - layer.weight.detach() * layer.weight.grad
        torch.testing.assert_close(criterion.scores(projected_weights[0]), sums)
        criterion.end()


@pytest.mark.parametrize("criterion", [Taylor(), Fisher(), Movement()])
def test_gradients_are_read_before_the_mask_and_overflows_are_left_out(criterion):
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    (projected,) = projected_weights_of(layer)
    projected.set_mask(
        torch.tensor([[True, False]])
    )  # not projected yet: the weight is still there
    criterion.begin([projected])
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 0.0]]
    before = criterion.scores(projected).clone()
    assert (before != 0).all()
    (layer(torch.ones(1, 2)).sum() * torch.inf).backward()
    assert torch.isfinite(criterion.scores(projected)).all()
    criterion.end()


def test_a_layer_used_twice_counts_both_calls():
    layer = nn.Linear(3, 3)
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    scores = gathered(InputActivation(), projected_weights_of(layer), lambda: [layer(x), layer(y)])
    norm = torch.cat([x, y]).square().sum(0).sqrt()
    torch.testing.assert_close(scores["weight"], layer.weight.detach().abs() * norm)


@pytest.mark.parametrize("name", GATHERING)
def test_a_generator_scores_the_same_when_discriminator_steps_run_it_too(name):
    model = TinyGAN()
    projected_weights, z = projected_weights_of(model.generator), torch.randn(16, 3)

    def run(critic_steps):
        for _ in range(critic_steps):
            (model.discriminator(model.generator(z).detach())).mean().backward()
        (-model.discriminator(model.generator(z))).mean().backward()

    alone = gathered(make_criterion(name), projected_weights, lambda: run(0))
    beside = gathered(make_criterion(name), projected_weights, lambda: run(3))
    ratio = {"activation": 2.0, "obs": 4.0}.get(name, 1.0)  # sums over 4 forwards in place of 1
    for path, scores in alone.items():
        torch.testing.assert_close(beside[path], ratio * scores, rtol=1e-4, atol=1e-7)


def columns_of(layer, x, output):
    """Norm of what each weight of a convolution meets, by autograd: d(sum y)/dw for one output."""
    total = torch.zeros_like(layer.weight)
    for position in output.detach().flatten().nonzero().flatten():  # each output by itself
        (gradient,) = torch.autograd.grad(
            output.flatten()[position], layer.weight, retain_graph=True
        )
        total += gradient**2
    return total


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="reflect"),
        nn.Conv3d(2, 2, 2),
        nn.ConvTranspose1d(2, 4, 4, stride=2, padding=1),
        nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ConvTranspose3d(2, 2, 2, dilation=2),
        nn.Linear(4, 3),
        nn.Bilinear(2, 2, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_wanda_norms_equal_autograd_on_each_output(layer):
    sizes = {nn.Linear: (3, 5, 4), nn.Bilinear: (5, 2)}
    channels = getattr(layer, "in_channels", 0)
    x = torch.randn(sizes.get(type(layer), (2, channels, *(4,) * (layer.weight.dim() - 2))))
    arguments = (x, torch.randn(5, 2)) if isinstance(layer, nn.Bilinear) else (x,)
    projected_weights = projected_weights_of(layer)
    scores = gathered(InputActivation(), projected_weights, lambda: layer(*arguments))["weight"]
    squares = columns_of(layer, x, layer(*arguments))  # each unit's own inputs, no others
    torch.testing.assert_close(scores, layer.weight.detach().abs() * squares.sqrt())


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(4, 3), (3, 5, 4), -1),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 1),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), 1),
    ],
)
def test_mean_outputs_belong_to_the_units_that_a_weight_feeds(layer, shape, axis):
    x = torch.randn(shape)
    scores = gathered(OutputActivation(), projected_weights_of(layer), lambda: layer(x))["weight"]
    means = layer(x).detach().abs().movedim(axis, -1).flatten(0, -2).mean(0)
    ratio = scores / layer.weight.detach().abs()
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out / groups, kh, kw): 2 inputs a group
        for row, group in enumerate([0, 0, 1, 1]):
            torch.testing.assert_close(ratio[row, :, 0, 0], means[3 * group : 3 * group + 3])
    else:
        torch.testing.assert_close(ratio.flatten(1)[:, 0], means)


def test_embedding_rows_by_use_and_outputs_by_dimension():
    layer, tokens = nn.Embedding(4, 2), torch.tensor([[0, 1, 1], [3, 1, 0]])
    projected_weights, weight = projected_weights_of(layer, ["weight"]), layer.weight.detach().abs()
    scores = gathered(InputActivation(), projected_weights, lambda: layer(tokens))["weight"]
    torch.testing.assert_close(scores, weight * torch.tensor([2.0, 3, 0, 1]).sqrt()[:, None])
    scores = gathered(OutputActivation(), projected_weights, lambda: layer(tokens))["weight"]
    torch.testing.assert_close(scores, weight * layer(tokens).detach().abs().mean((0, 1)))


def test_attention_projects_three_inputs_and_hides_the_fourth():
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    q, k = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    projected_weights = projected_weights_of(layer)
    with pytest.warns(UserWarning, match=r"scores out_proj\.weight by magnitude"):
        scores = gathered(InputActivation(), projected_weights, lambda: layer(q, k, value=2 * k))
    norms = [part.square().sum((0, 1)).sqrt() for part in (q, k, 2 * k)]
    expected = layer.in_proj_weight.detach().abs() * torch.stack(norms).repeat_interleave(4, 0)
    torch.testing.assert_close(scores["in_proj_weight"], expected)


def cells_by_hand(layer, x, initial):
    """x (T, N, F) through RNN cells step by step: name -> (inputs, states before each step)."""
    cell_of = {nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell, nn.RNN: nn.RNNCell}[type(layer)]
    seen, ways = {}, 2 if layer.bidirectional else 1
    for depth in range(layer.num_layers):
        outputs = []
        for way in range(ways):
            end = f"l{depth}" + ("_reverse" if way else "")
            cell = cell_of(x.shape[2], layer.hidden_size)
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(cell, part).data.copy_(getattr(layer, f"{part}_{end}"))
            state = tuple(one[ways * depth + way] for one in initial)
            before, after = [None] * len(x), [None] * len(x)
            for t in range(len(x))[:: -1 if way else 1]:
                before[t] = state[0]
                new = cell(x[t], state if len(state) == 2 else state[0])
                state = new if isinstance(new, tuple) else (new,)
                after[t] = state[0]
            seen[f"weight_ih_{end}"] = x, torch.stack(after)
            seen[f"weight_hh_{end}"] = torch.stack(before), torch.stack(after)
            outputs.append(torch.stack(after))
        x = torch.cat(outputs, 2)
    return {name: [one.detach().flatten(0, 1) for one in pair] for name, pair in seen.items()}


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers_against_cells_run_by_hand(kind, layers, bidirectional, batch_first):
    layer = kind(3, 4, layers, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(5, 2, 3)
    count = layers * (2 if bidirectional else 1)
    initial = tuple(torch.randn(count, 2, 4) for _ in range(2 if kind is nn.LSTM else 1))
    hx = initial if kind is nn.LSTM else initial[0]
    projected_weights = projected_weights_of(layer)
    given_x = x.transpose(0, 1) if batch_first else x
    state = torch.get_rng_state()
    inputs = gathered(InputActivation(), projected_weights, lambda: layer(given_x, hx))
    outputs = gathered(OutputActivation(), projected_weights, lambda: layer(given_x, hx=hx))
    assert torch.equal(state, torch.get_rng_state())
    seen = cells_by_hand(layer, x, initial)
    assert set(seen) == set(inputs)
    for name, (into, states) in seen.items():
        weight = getattr(layer, name).detach().abs()
        norm = into.square().sum(0).sqrt()
        torch.testing.assert_close(inputs[name], weight * norm, rtol=1e-4, atol=1e-5)
        mean = states.abs().mean(0).repeat(len(weight) // 4).unsqueeze(1)
        torch.testing.assert_close(outputs[name], weight * mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_packed_sequences_count_their_own_steps_alone(layers):
    gru = nn.GRU(3, 4, layers, bidirectional=True)
    lengths, x = [2, 5, 3], torch.randn(5, 3, 3)
    projected_weights, hx = projected_weights_of(gru), torch.randn(2 * layers, 3, 4)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    assert isinstance(packed, PackedSequence)
    together = gathered(InputActivation(), projected_weights, lambda: gru(packed, hx))

    def one_by_one():
        for i, length in enumerate(lengths):
            gru(x[:length, i], hx[:, i])  # without a batch axis

    apart = gathered(InputActivation(), projected_weights, one_by_one)
    for name, scores in together.items():
        torch.testing.assert_close(scores, apart[name], rtol=1e-4, atol=1e-5)
    assert pad_packed_sequence(packed)[1].tolist() == lengths


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projected_lstm_hides_its_projection_only():
    lstm, x = nn.LSTM(3, 4, proj_size=2), torch.randn(5, 2, 3)
    with pytest.warns(UserWarning, match=r"weight_hr_l0.*magnitude.*LSTM"):
        scores = gathered(InputActivation(), projected_weights_of(lstm), lambda: lstm(x))
    before = torch.cat([torch.zeros(1, 2, 2), lstm(x)[0][:-1].detach()])
    expected = lstm.weight_hh_l0.detach().abs() * before.square().sum((0, 1)).sqrt()
    torch.testing.assert_close(scores["weight_hh_l0"], expected)


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_cells(kind):
    cell, x, h = kind(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    hx = (h, torch.randn(2, 4)) if kind is nn.LSTMCell else h
    scores = gathered(InputActivation(), projected_weights_of(cell), lambda: [cell(x, hx), cell(x)])
    expected = cell.weight_hh.detach().abs() * h.square().sum(0).sqrt()  # the second starts at 0
    torch.testing.assert_close(scores["weight_hh"], expected)
    outputs = gathered(OutputActivation(), projected_weights_of(cell), lambda: cell(x, hx))
    state = cell(x, hx)
    mean = (state[0] if kind is nn.LSTMCell else state).detach().abs().mean(0)
    expected = cell.weight_ih.detach().abs() * mean.repeat(len(cell.weight_ih) // 4).unsqueeze(1)
    torch.testing.assert_close(outputs["weight_ih"], expected)


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("name", GATHERING)
def test_parametrized_layers_find_their_inputs(wrap, name):
    model = nn.Sequential(wrap(nn.Linear(4, 3)))
    (projected,) = projected_weights_of(model)
    x = torch.randn(6, 4)
    scores = gathered(make_criterion(name), [projected], lambda: model(x).square().sum().backward())
    assert scores["0.weight"].shape == (3, 4)
    if name == "activation":
        expected = projected.values().abs() * x.square().sum(0).sqrt()
        torch.testing.assert_close(scores["0.weight"], expected)


def test_older_weight_norm_hooks_find_their_inputs():
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(nn.Linear(4, 3))
    (projected,), x = projected_weights_of(model), torch.randn(6, 4)
    scores = gathered(InputActivation(), [projected], lambda: model(x))
    expected = projected.values().abs() * x.square().sum(0).sqrt()
    torch.testing.assert_close(scores["weight_v"], expected)


class OwnWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 1, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.kernel)


@pytest.mark.parametrize(
    "criterion", [InputActivation(), OutputActivation(), OptimalBrainSurgeon()]
)
def test_what_cannot_be_seen_falls_back_by_name_and_in_the_others_unit(criterion):
    model = nn.ModuleDict({"own": OwnWeight(), "seen": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    projected_weights = projected_weights_of(model, ["own.kernel", "seen.weight", "idle.weight"])
    criterion.begin(projected_weights)
    for _ in range(2):
        model["own"](torch.randn(2, 1, 5, 5))
        model["seen"](torch.randn(8, 4))
    with pytest.warns(UserWarning, match="by magnitude") as warned:
        scores = {projected.path: criterion.scores(projected) for projected in projected_weights}
    texts = sorted(str(one.message) for one in warned)
    assert len(texts) == 2
    assert "idle.weight by magnitude: nothing of it was seen in training mode" in texts[0]
    assert "own.kernel by magnitude: a OwnWeight does not show" in texts[1]
    ratio = scores["idle.weight"] / model["idle"].weight.detach().abs()
    unit = scores["seen.weight"].sum() / model["seen"].weight.detach().abs().sum()
    torch.testing.assert_close(ratio, torch.full_like(ratio, unit.item()))
    criterion.end()


def test_copies_and_pickles_of_a_hooked_module_feed_nothing():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    projected_weights, criterion = projected_weights_of(model), InputActivation()
    criterion.begin(projected_weights)
    model(x)
    expected = criterion.scores(projected_weights[0]).clone()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(100 * x)
        assert len(twin[0]._forward_hooks) == 1  # there, and inert
    assert torch.equal(criterion.scores(projected_weights[0]), expected)
    criterion.end()


@pytest.mark.parametrize("name", GATHERING)
def test_autocast_gathers_in_single_precision(name):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(36, 3))
    projected_weights, x = projected_weights_of(model), torch.randn(4, 1, 5, 5)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x).square().sum().backward()

    halves = gathered(make_criterion(name), projected_weights, run)
    whole = gathered(
        make_criterion(name), projected_weights, lambda: model(x).square().sum().backward()
    )
    for path, scores in halves.items():
        assert scores.dtype == torch.float32
        assert (scores - whole[path]).norm() < 0.05 * whole[path].norm()


def test_a_recurrent_layer_under_autocast():
    gru, x = nn.GRU(3, 4, 2), torch.randn(5, 2, 3)
    projected_weights = projected_weights_of(gru)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gru(x)

    halves = gathered(InputActivation(), projected_weights, run)
    whole = gathered(InputActivation(), projected_weights, lambda: gru(x))
    for path, scores in halves.items():
        assert (scores - whole[path]).norm() < 0.05 * whole[path].norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo
def test_a_compiled_model_shows_its_inputs_in_every_window():
    criterion = InputActivation()  # made before the first compiled call: hooks are guarded
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    compiled = torch.compile(model, backend="eager")
    projected_weights, x = projected_weights_of(model), torch.randn(6, 4)
    for scale in (1.0, 2.0, 3.0):
        compiled(x)  # between the windows
        scores = gathered(criterion, projected_weights, lambda factor=scale: compiled(factor * x))
        expected = model[0].weight.detach().abs() * scale * x.square().sum(0).sqrt()
        torch.testing.assert_close(scores["0.weight"], expected)


@pytest.mark.parametrize("name", ["activation", "taylor"])
@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_a_bad_window_is_named(name, window):
    with pytest.raises(ValueError, match=f"window={window}"):
        {"activation": InputActivation, "taylor": Taylor}[name](window=window)
