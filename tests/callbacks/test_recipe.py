"""compression_recipe: which callbacks for which goal and model, and what it says of `max_loss`."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from tiny import TinyAutoencoder, TinyGAN, batches, quiet_trainer
from torch import nn

from lightning_compress import EMATeacher, compression_recipe, sparsity
from lightning_compress.callbacks.recipe import GOALS, KINDS, kind_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*zeros went with removed channels",  # in runs of a few steps
    "ignore:You passed in a `val_dataloader`",
)


class GAN(TinyGAN):
    """Somebody's, with a layer that is wide enough to lose channels."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6)
        self.generator = nn.Sequential(*layers)


class VAE(LightningModule):
    """Somebody's, whose loss is no number of nats."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6))

    def loss(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (logvar / 2).exp()
        kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).mean()
        return (self.decoder(z) - x).square().mean() + 0.1 * kl

    def training_step(self, batch, _):
        return self.loss(batch[0])

    def validation_step(self, batch, _):
        self.log("val/loss", self.loss(batch[0]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def names(recipe):
    return [type(one).__name__ for one in recipe]


def fit(tmp_path, module, callbacks, epochs=4):
    torch.manual_seed(0)
    held = [batches(seed=1)] if hasattr(module, "loss") else []
    quiet_trainer(tmp_path, *callbacks, max_epochs=epochs).fit(module, batches(), *held)


def outcomes(caplog):
    return [one for one in caplog.messages if "max_loss" in one]


@pytest.mark.parametrize(
    ("make", "goal"),
    [*((one, goal) for one in (GAN, VAE) for goal in GOALS), (TinyGAN, "balanced"),
     (TinyAutoencoder, "fastest")],
)  # fmt: skip
def test_a_strangers_model_trains_with_each_recipe(tmp_path, caplog, make, goal):
    """Without `model` too, and where no channel may go: layers of eight, or none between ends."""
    torch.manual_seed(0)
    module, size = make(), sum(one.numel() for one in make().parameters())
    with caplog.at_level(logging.INFO):
        fit(tmp_path, module, compression_recipe(goal))
    smaller = sum(one.numel() for one in module.parameters()) < size
    assert smaller == (make in (GAN, VAE) and goal != "smallest")
    assert (sparsity(module) > 0.75) == (goal != "fastest")
    assert "max_loss=0.02 is not held: give monitor=" in caplog.text
    kind = kind_of(module)
    assert f"compression_recipe({goal!r}, model=module) fits it" in caplog.text
    assert kind == ("gan" if isinstance(module, TinyGAN) else "vae")


@pytest.mark.parametrize("goal", GOALS)
def test_a_gan_gets_its_own_recipe_beside_a_callback_of_the_users(tmp_path, caplog, goal):
    class Counted(Callback):
        batches = 0

        def on_train_batch_end(self, *_):
            self.batches += 1

    module, counted = GAN(), Counted()
    recipe = compression_recipe(goal, teacher=copy.deepcopy(module), model=module)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, module, [*(recipe + [counted])])  # noqa: RUF005 (as users write it)
    assert counted.batches == 32
    assert recipe[0].left < {"smallest": 0.11, "fastest": 0.26, "balanced": 0.51}[goal]
    assert "fits it" not in caplog.text
    assert names(recipe)[-2:] == ["KnowledgeDistillation", "RecipeReport"]


@pytest.mark.parametrize(("most", "held"), [(0.3, True), (0.0, None)])
def test_a_monitored_metric_is_held_and_the_end_says_so(tmp_path, caplog, most, held):
    module = VAE()
    fit(tmp_path, module, [], epochs=4)
    recipe = compression_recipe("smallest", most, model=module, monitor="val/loss")
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(tmp_path, module, recipe, epochs=20)
    budget = recipe[-2]
    told = [str(one.message) for one in warned if "max_loss" in str(one.message)]
    (said,) = [*outcomes(caplog), *told]
    assert bool(told) != recipe.held  # the command line hides what is logged, and shows warnings
    if held:
        assert sparsity(module) > 0.5
        assert budget.degradation <= most
    assert recipe.held == (budget.degradation is not None and budget.degradation <= most)
    assert ("was held" in said) == recipe.held
    assert f"{budget.degradation:+.2%} worse" in said


def test_a_run_that_ends_before_compression_says_that_nothing_is_known(tmp_path):
    recipe = compression_recipe("smallest", monitor="val/loss")
    recipe[-2].begin = 0.8
    trainer = quiet_trainer(tmp_path, *recipe, max_epochs=3, check_val_every_n_epoch=2)
    with (
        pytest.warns(UserWarning, match="before begin="),
        pytest.warns(UserWarning, match="too short to compress"),
    ):
        trainer.fit(VAE(), batches(), batches(seed=1))
    assert recipe.held is None


def test_the_loss_is_of_what_can_be_lost():
    """As evaluation has it: 2 % of the part of a -ELBO above the data's entropy."""
    recipe = compression_recipe(
        "smallest", monitor="val/elbo", mode="max", reference=-239.86, irreducible=-189.86
    )
    reference = recipe[-2].reference
    reference.fix([], patience=4)
    assert reference.worse(reference.cost(-240.86), after=0) == pytest.approx(0.02)


def test_each_callback_has_its_reason():
    for goal in GOALS:
        for kind in KINDS:
            recipe = compression_recipe(goal, teacher=EMATeacher(), model=kind, monitor="val/loss")
            lines = repr(recipe).splitlines()
            assert lines[0].startswith(f"{goal} for a")
            assert [line.split(":")[0].strip() for line in lines[1 : 1 + len(recipe)]] == names(
                recipe
            )
            assert all(len(line) > 40 for line in lines[1 : 1 + len(recipe)])
    recipe.append(Callback())
    assert recipe.reasons[-1] == "added"


def test_copies_keep_their_reasons():
    recipe = compression_recipe("balanced", model="gan")
    for made in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe)), copy.copy(recipe)):
        assert repr(made) == repr(recipe)
        assert names(made) == names(recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"goal": "smalest"}, r"goal='smalest': valid are .* did you mean 'smallest'"),
        ({"goal": 3}, "goal=3: valid are"),
        ({"goal": "fastest", "max_loss": -1}, "max_loss=-1 must be a fraction"),
        ({"goal": "fastest", "max_loss": float("nan")}, "max_loss=nan"),
        ({"goal": "fastest", "max_loss": "2 %"}, "max_loss='2 %'"),
        ({"goal": "fastest", "model": "vea"}, "model='vea': give the module or .*'vae'"),
        ({"goal": "fastest", "model": 3}, "model=3: give a module"),
        ({"goal": "fastest", "monitor": "x", "mode": "low"}, "mode='low'"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compression_recipe(**arguments)


@pytest.mark.parametrize(
    ("networks", "kind"),
    [
        ({"netG": nn.Linear(1, 1), "netD": nn.Linear(1, 1)}, "gan"),
        ({"encoder": nn.Linear(1, 1), "decoder": nn.Linear(1, 1)}, "vae"),
        ({"encoder": nn.LSTM(1, 1), "decoder": nn.Linear(1, 1)}, "recurrent_vae"),
        ({"vae": nn.ModuleDict({"encoder": nn.GRU(1, 1), "decoder": nn.GRU(1, 1)})},
         "recurrent_vae"),
        ({"encoder": nn.Linear(1, 1), "decoder": nn.Linear(1, 1), "critic": nn.Linear(1, 1)},
         "gan"),
        ({"d1": nn.Linear(1, 1), "d2": nn.Linear(1, 1)}, "other"),
        ({"body": nn.Linear(1, 1)}, "other"),
    ],
)  # fmt: skip
def test_the_kind_is_read_from_the_networks(networks, kind):
    assert kind_of(nn.ModuleDict(networks)) == kind


def test_the_smallest_layers_stay_dense_where_the_model_is_known():
    module = VAE()
    module.encoder = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 600), nn.Linear(600, 8))
    (pruning, *_) = compression_recipe("smallest", model=module)
    assert pruning.exclude == ["encoder.0.weight"]
    assert compression_recipe("smallest")[0].exclude == []
