"""GradualPruning by units, scopes, patterns and bounds, in real training."""

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer
from torch import nn

from lightning_compress import Constant, Cosine, GradualPruning, Polynomial, TargetError, sparsity


class ConvAutoencoder(LightningModule):
    """A convolution, a transposed one and a GRU between them."""

    deployed = ("",)

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(4, 8, 3, padding=1)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.decoder = nn.ConvTranspose2d(8, 4, 3, padding=1)

    def training_step(self, batch, _):
        x = batch[0].view(len(batch[0]), 4, 4, 4)
        hidden, _ = self.cell(self.encoder(x).flatten(2).transpose(1, 2))
        out = self.decoder(hidden.transpose(1, 2).view(len(x), 8, 4, 4))
        return (out - x).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


WEIGHTS = 288 + 192 + 192 + 288


def fit(tmp_path, pruning, model=None, **arguments):
    model = ConvAutoencoder() if model is None else model
    features = 64 if isinstance(model, ConvAutoencoder) else 6
    quiet_trainer(tmp_path, pruning, **arguments).fit(model, batches(features=features))
    return model


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_n_of_m_ends_exactly_along_every_input_axis(tmp_path, pattern):
    n, m = map(int, pattern.split(":"))
    model = ConvAutoencoder()
    exclude = ["encoder"] if m == 8 else []
    fit(tmp_path, GradualPruning(granularity=pattern, exclude=exclude), model)
    weights = {"encoder": model.encoder.weight, "decoder": model.decoder.weight.transpose(0, 1)}
    weights |= {"ih": model.cell.weight_ih_l0, "hh": model.cell.weight_hh_l0}
    for name, weight in weights.items():
        if name in exclude:
            continue
        lines = weight.transpose(1, -1).reshape(-1, weight.shape[1])
        assert ((lines.view(len(lines), -1, m) != 0).sum(-1) == n).all(), name
    assert sparsity(model, None if not exclude else ["cell", "decoder"]) == 1 - n / m


def test_n_of_m_on_the_way_follows_the_schedule(tmp_path):
    seen = []

    class Watched(GradualPruning):
        def event(self, trainer):
            super().event(trainer)
            seen.append((self.parts[0].requested, self.sparsity))

    fit(tmp_path, Watched(granularity="2:4", frequency=2))
    assert seen[0][0] < 0.4
    for asked, got in seen:
        assert got == round(asked * WEIGHTS) / WEIGHTS


@pytest.mark.parametrize("granularity", ["row", "column", "channel", "filter", ["block", [4, 4]]])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_units_are_pruned_whole_and_zeros_are_exact_to_half_a_unit(tmp_path, granularity, scope):
    pruning = GradualPruning(final_sparsity=0.5, granularity=granularity, scope=scope)
    fit(tmp_path, pruning)
    sizes = []
    for projected in pruning.projected_weights:
        units = pruning.plan.granularity.units(
            projected.parameter.detach().abs(),
            pruning.plan.layouts[projected.path],
            closed=projected.parameter == 0,
            signed=False,
        )
        if granularity != "column":  # a GRU's columns and rows overlap nowhere else
            spread = units.spread(~units.closed)
            assert torch.equal(spread, projected.parameter != 0)
        sizes.append(projected.parameter.numel() // units.capacity)
        assert int(units.closed.sum()) == units.capacity // 2 or scope != "layer"
        assert not units.closed.all()
    weights = sum(projected.target.numel for projected in pruning.projected_weights)
    zeros = sum(int((projected.parameter == 0).sum()) for projected in pruning.projected_weights)
    assert abs(zeros - 0.5 * weights) <= (0 if scope == "layer" else max(sizes) / 2)
    assert pruning.sparsity == pytest.approx(zeros / weights)


@pytest.mark.parametrize("scope", ["global", "erk"])
@pytest.mark.parametrize("regrow", [None, "gradient"])
def test_zeros_rise_by_whole_units_that_never_return_by_themselves(tmp_path, scope, regrow):
    seen = []

    class Watched(GradualPruning):
        def event(self, trainer):
            before = [projected.pruned for projected in self.projected_weights]
            super().event(trainer)
            for projected, old in zip(self.projected_weights, before, strict=True):
                assert regrow or old is None or not (old & ~projected.pruned).any()
            zeros = sum(int(projected.pruned.sum()) for projected in self.projected_weights)
            seen.append(abs(zeros - self.parts[0].requested * WEIGHTS))

    options = {"granularity": "channel", "scope": scope, "regrow": regrow}
    fit(tmp_path, Watched(final_sparsity=0.7, on_miss="raise", frequency=1, **options))
    assert len(seen) > 5
    assert max(seen) <= 72 / 2 + 0.5  # half of a decoder's channel, the largest


@pytest.mark.parametrize(
    ("final", "message"),
    [
        (0.95, r"0\.8375 instead of 0\.9500: min_keep or whole units kept more"),
        ({"cell": 0.98, "encoder": 0.5}, r"0\.8750 of 'cell' instead of 0\.9800: min_keep"),
    ],
)
def test_a_sparsity_that_whole_units_cannot_reach_is_a_miss(tmp_path, final, message):
    options = {"granularity": "channel", "scope": "layer", "on_miss": "raise"}
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, GradualPruning(final_sparsity=final, **options))


@pytest.mark.parametrize("scope", ["global", "erk"])
def test_the_total_is_exact_at_every_event(tmp_path, scope):
    seen = []

    class Watched(GradualPruning):
        def event(self, trainer):
            super().event(trainer)
            zeros = sum(
                int((projected.parameter == 0).sum()) for projected in self.projected_weights
            )
            seen.append(zeros - round(self.parts[0].requested * WEIGHTS))

    fit(tmp_path, Watched(final_sparsity=0.8, scope=scope))
    assert len(seen) > 5
    assert not any(seen)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_each_pattern_has_its_own_sparsity_and_the_first_wins(tmp_path, scope):
    model = ConvAutoencoder()
    wanted = {"decoder.*": 0.75, nn.GRU: 0.5, "*.weight_hh_l0": 0.9}
    with pytest.raises(TargetError, match=r"'\*\.weight_hh_l0' matches no target that is still"):
        fit(tmp_path, GradualPruning(final_sparsity=wanted), model)
    del wanted["*.weight_hh_l0"]
    fit(tmp_path, GradualPruning(final_sparsity=wanted, scope=scope), model)
    assert sparsity(model, ["decoder"]) == 0.75
    assert sparsity(model, ["cell"]) == 0.5
    assert (model.encoder.weight != 0).all()
    with pytest.raises(TargetError, match=r"'decodr\.\*' matches no parameter"):
        fit(tmp_path, GradualPruning(final_sparsity={"decodr.*": 0.5}))


def test_a_schedule_lends_its_shape_to_every_pattern(tmp_path):
    schedule = Cosine(begin=0, end=10)
    pruning = GradualPruning(final_sparsity={"encoder": 0.5, "decoder": 0.8}, schedule=schedule)
    values = [[part.target(step) for part in pruning.parts] for step in (0, 5, 10)]
    assert values[0] == [0.0, 0.0]
    assert values[1] == pytest.approx([0.25, 0.4])
    assert values[2] == [0.5, 0.8]


def test_a_pattern_that_missed_is_named(tmp_path):
    pruning = GradualPruning(final_sparsity={"decoder": 0.5, "encoder": 0.4}, begin=0, end=500)
    with pytest.warns(UserWarning, match="instead of") as told:
        fit(tmp_path, pruning, TinyAutoencoder())
    told = [str(one.message) for one in told if "instead of" in str(one.message)]
    assert "of 'decoder' instead of 0.5" in told[0]
    assert "of 'encoder' instead of 0.4" in told[1]


def test_bounds_by_pattern_hold_and_the_total_stays(tmp_path):
    model = TinyAutoencoder()
    with torch.no_grad():
        model.decoder.weight.mul_(1e-4)
        model.encoder[0].weight.mul_(1e-4)
    pruning = GradualPruning(final_sparsity=0.75, min_keep={"decoder": 0.45})
    fit(tmp_path, pruning, model)
    assert int((model.decoder.weight != 0).sum()) >= 22
    assert int((model.encoder[0].weight != 0).sum()) >= 1
    assert sparsity(model) == 0.75


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_bounds_without_room_are_refused(tmp_path, scope):
    bounds = {"decoder": 0.6} if scope == "layer" else {"decoder": 0.6, "encoder": 0.6}
    pruning = GradualPruning(final_sparsity=0.5, min_keep=bounds, scope=scope)
    with pytest.raises(ValueError, match="leaves no room for the sparsity"):
        fit(tmp_path, pruning, TinyAutoencoder())
    with pytest.raises(TargetError, match="'nobody' matches no parameter"):
        fit(tmp_path, GradualPruning(min_keep={"nobody": 0.5}), TinyAutoencoder())


def test_what_n_of_m_cannot_take_stays_dense(tmp_path):
    model = TinyGAN()  # 3 inputs, then 8
    pruning = GradualPruning(granularity="2:4")
    fit(tmp_path, pruning, model)
    assert (model.generator[0].weight != 0).all()
    assert ((model.generator[2].weight.view(6, 2, 4) != 0).sum(-1) == 2).all()
    assert pruning.sparsity == 24 / 72


def test_a_criterion_of_the_wrong_shape_is_named(tmp_path):
    pruning = GradualPruning(criterion=lambda weight: weight.abs().sum(0))
    with pytest.raises(ValueError, match=r"\(6,\).*encoder\.0\.weight"):
        fit(tmp_path, pruning, TinyAutoencoder())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "2:4", "final_sparsity": 0.8}, "n:m: it ends at 0.5"),
        ({"granularity": "2:4", "schedule": Constant(final_sparsity=0.7)}, "n:m: it ends at 0.5"),
        ({"granularity": "2:4", "final_sparsity": {"a": 0.8}}, "n:m: it ends at 0.5"),
        ({"granularity": "2:4", "scope": "erk"}, "fixes the sparsity of each layer"),
        ({"granularity": "2:4", "regrow": "gradient"}, "fixes the sparsity of each layer"),
        ({"regrow": "hope"}, "regrow='hope': valid are"),
        ({"min_keep": 0.2}, r"min_keep=0\.2 must lie between 0 and"),
        ({"min_keep": {"a": 2.0}}, r"min_keep=2\.0 must lie"),
        ({"final_sparsity": {}}, "names no pattern"),
        ({"final_sparsity": {"a": 0.5}, "include": ["b"]}, "include: the patterns"),
        ({"final_sparsity": {"a": 0.5}, "schedule": lambda x: 0.5}, "must be a Schedule"),
        ({"final_sparsity": {"a": 1.5}}, r"final_sparsity=1\.5"),
        ({"rewind": -1}, "to=-1"),
    ],
)
def test_contradictions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(**arguments)


def test_a_default_sparsity_adapts_to_n_of_m():
    assert GradualPruning(granularity="1:4").schedule(1.0) == 0.75
    assert GradualPruning(granularity="1:4", schedule=Polynomial(power=1.0)).schedule(1.0) == 0.75
    assert GradualPruning(granularity="2:4", final_sparsity=0.5).schedule(1.0) == 0.5
