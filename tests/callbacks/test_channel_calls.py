"""Channel pruning of modules that nothing but their `training_step` calls."""

import pytest
import torch
from lightning.pytorch import LightningModule
from shrinking import FAST
from tiny import batches, quiet_trainer
from torch import nn

from lightning_compress import ChannelPruning, TargetError


class Plain(LightningModule):
    """An ordinary module: no parts that ship, no example, no `forward`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 6),
        )  # fmt: skip

    def loss(self, x):
        return (self.net(x) - x).square().mean()

    def training_step(self, batch, _):
        return self.loss(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Halves(Plain):
    """Two networks, with a size between them that is theirs alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Identity(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
        del self.net

    def forward(self, x):
        return self.head(self.body(x))

    def sizes(self):
        return self.body[1].out_features, self.head[1].in_features, self.head[1].out_features


class Whole(Halves):
    def loss(self, x):
        return (self(x) - x).square().mean()


class Apart(Halves):
    def loss(self, x):
        return (self.head(self.body(x)) - x).square().mean()


class Nested(Apart):
    """One network, whose second half is called by itself too."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(self.body, self.head)
        del self.body, self.head

    @property
    def body(self):
        return self.net[0]

    @property
    def head(self):
        return self.net[1]

    def loss(self, x):
        return (self.net(x) - x).square().mean() + self.head(torch.zeros(1, 8)).square().mean()


def run(tmp_path, model, **options):
    torch.manual_seed(0)
    pruning = ChannelPruning(**{**FAST, "scope": "layer", "on_miss": "raise", **options})
    trainer = quiet_trainer(tmp_path, pruning, max_epochs=5)
    trainer.fit(model, batches())
    return pruning


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_that_training_step_calls(tmp_path, compiled):
    model = Plain()
    net = model.net
    if compiled:
        model.net = torch.compile(net, backend="eager")
    pruning = run(tmp_path, model)
    assert list(pruning.plan.inputs) == ["net._orig_mod" if compiled else "net"]
    assert (net[1].out_channels, net[4].in_features, net[4].out_features) == (8, 48, 8)
    assert model.net(torch.zeros(3, 6)).shape == (3, 6)


@pytest.mark.parametrize(
    ("kind", "roots", "sizes"),
    [
        (Whole, [""], (8, 4, 8)),
        (Apart, ["body", "head"], (8, 8, 8)),
        (Nested, ["net.0", "net.1"], (8, 8, 8)),
    ],
)
def test_what_is_called_keeps_its_inputs_and_outputs(tmp_path, kind, roots, sizes):
    model = kind()
    pruning = run(tmp_path, model)
    assert list(pruning.plan.inputs) == roots
    assert model.sizes() == sizes
    model.loss(torch.zeros(2, 6))


class Raw(Plain):
    """Nothing is called that holds the weight."""

    def loss(self, x):
        return (nn.functional.linear(x, self.net[4].weight[:6, :6]) - x).square().mean()


class Layers(Plain):
    """Each layer is called by itself."""

    def loss(self, x):
        for layer in self.net:
            x = layer(x)
        return x.square().mean()


@pytest.mark.parametrize(
    ("kind", "message"), [(Raw, "no network was called"), (Layers, "no channel may go")]
)
def test_where_calls_do_not_tell_the_first_batch_does(tmp_path, kind, message):
    model = kind()
    with pytest.raises(TargetError, match=rf"{message}.*example_input_array.*parts\(\).*deployed"):
        run(tmp_path, model)
    assert model.trainer.global_step == 1


class Idle(Plain):
    """A network that training never calls."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Sequential(nn.Identity(), nn.Linear(6, 16), nn.Linear(16, 6))


def test_what_is_never_called_stays(tmp_path):
    model = Idle()
    with pytest.warns(UserWarning, match=r"no batch called the network of .*'idle.1.weight'"):
        run(tmp_path, model)
    assert (model.net[1].out_channels, model.idle[1].out_features) == (8, 16)


def test_a_part_that_no_batch_went_through_is_refused_after_the_first(tmp_path):
    model = Idle()
    model.deployed = ("idle",)
    with pytest.raises(TargetError, match=r"no network was called that holds \['idle.1.weight'"):
        run(tmp_path, model, on_miss="warn")
    assert model.trainer.global_step == 1


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x, scale=1.0):
        return self.layers(x) * scale


class Estimator(nn.Module):
    """Used through a method, which calls one of its layers by keyword."""

    def __init__(self):
        super().__init__()
        self.net = Half()

    def compute_loss(self, x):
        return (self.net(scale=2.0, x=x) - x).square().mean()


class ThroughMethod(Plain):
    """Its decoder is known by name, and never called."""

    def __init__(self):
        super().__init__()
        del self.net
        self.encoder = nn.Sequential(nn.Identity(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
        self.decoder = Estimator()

    def loss(self, x):
        return self.decoder.compute_loss(self.encoder(x))


class OnlyChild(Plain):
    def __init__(self):
        super().__init__()
        del self.net
        self.vae = Estimator()

    def loss(self, x):
        return self.vae.compute_loss(x)


@pytest.mark.parametrize("kind", [ThroughMethod, OnlyChild])
def test_a_network_used_through_a_method(tmp_path, kind):
    model = kind()
    run(tmp_path, model)
    network = model.decoder if kind is ThroughMethod else model.vae
    assert network.net.layers[0].out_features == 8


class PartlyIdle(ThroughMethod):
    """Of two networks that ship one is never called."""

    def loss(self, x):
        return (self.encoder(x) - x).square().mean()


def test_a_network_that_is_never_called_beside_one_that_is(tmp_path):
    model = PartlyIdle()
    with pytest.warns(UserWarning, match=r"no batch called .*'decoder.net.layers.0"):
        run(tmp_path, model)
    assert model.encoder[1].out_features == 8
    assert model.decoder.net.layers[0].out_features == 16
