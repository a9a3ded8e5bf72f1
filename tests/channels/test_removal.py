"""Channels are found and removed exactly, in all our models and in odd modules."""

import copy
import re

import pytest
import torch
from exact import check_exact, every_other, randomize
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from lightning_compress.channels.graph import channel_graph
from lightning_compress.channels.plan import exact_outputs, removal_fault, removed, zeroed_channels
from lightning_compress.channels.resize import check_sizes, match_channels, sizes_known
from lightning_compress.lab.models import DCGAN, VAE, WGANGP, RecurrentVAE, ResNet18, SimpleNet

ZOO = {
    "dcgan": lambda: DCGAN(image_size=16, width=8, latent_dim=6),
    "wgan_gp": lambda: WGANGP(image_size=16, width=8, latent_dim=6),
    "vae": lambda: VAE(image_size=16, width=8, latent_dim=6),
    "values": lambda: RecurrentVAE(steps=5, features=3, hidden=16),
    "tokens": lambda: RecurrentVAE(steps=5, vocab_size=9, hidden=16, embedding=8),
    "simple": lambda: SimpleNet(image_size=8, channels=1, num_classes=3, width=8),
    "resnet": lambda: ResNet18(image_size=16, channels=1, num_classes=3, width=8),
}
PARTS = [
    ("dcgan", "generator"),
    ("wgan_gp", "generator"),
    ("vae", "encoder"),
    ("vae", "decoder"),
    ("values", "encoder"),
    ("values", "decoder"),
    ("tokens", "encoder"),
    ("tokens", "decoder"),
    ("simple", "net"),
    ("resnet", "net"),
]


@pytest.mark.parametrize(("name", "path"), PARTS)
def test_the_model_zoo(name, path):
    torch.manual_seed(0)
    module, inputs = ZOO[name]().parts()[path]
    randomize(module)
    graph, small = check_exact(module, inputs)
    free = {group.name: len(group.free) for group in graph.groups}
    fixed = {group.name for group in graph.groups if not len(group.free)}
    expected = {
        "dcgan": {"up2"},
        "wgan_gp": {"up2"},
        "vae": {"mu", "logvar"} if path == "encoder" else {"up2"},
        "values": {"mu", "logvar"} if path == "encoder" else {"output"},
        "tokens": {"mu", "logvar"} if path == "encoder" else {"output"},
        "simple": {"logits"},
        "resnet": {"fc"},
    }[name]
    assert fixed == expected
    assert all(count >= 8 for layer, count in free.items() if layer not in fixed)
    small.train()
    small(*graph.inputs_of(inputs, every_other(graph)))  # it trains on


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 8 * 4 * 4)
        self.up = nn.ConvTranspose2d(8, 2, 4, 2, 1)

    def forward(self, z):
        return self.up(self.linear(z).relu().view(z.size(0), -1, 4, 4))


class Residual(nn.Module):
    def __init__(self, cat=False):
        super().__init__()
        self.cat = cat
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ELU())
        self.last = nn.Conv2d(16 if cat else 8, 1, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        return self.last(torch.cat([x, y], 1) if self.cat else x + y)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 8, 4, 2, 1), nn.Conv2d(8, 16, 4, 2, 1)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ConvTranspose2d(16, 4, 4, 2, 1)
        self.last = nn.Conv2d(5, 1, 3, padding=1)

    def forward(self, x):
        a = functional.leaky_relu(self.down1(x), 0.2)
        b = self.down2(a).sigmoid()
        y = self.up1(torch.cat([self.up2(b), a], dim=1))
        return self.last(torch.cat((y, x), dim=1))


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(8, 16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, groups=2)
        self.each = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = self.norm(self.depthwise(self.first(x))).relu()
        return self.last(self.each(self.up(self.grouped(x).relu())))


class Squeeze(nn.Module):
    """Squeeze-and-excitation, a gated unit, a scale of one's own, PReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 4), nn.Linear(4, 8)
        self.gate = nn.Conv2d(8, 16, 1)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.act = nn.PReLU(8)
        self.norm = nn.InstanceNorm2d(8)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = self.norm(self.first(x))
        scale = self.fc2(self.fc1(functional.adaptive_avg_pool2d(x, 1).flatten(1)).relu())
        x = x * scale.sigmoid()[:, :, None, None]
        return self.last(self.act(functional.glu(self.gate(x), dim=1) * self.gamma))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.rnn = getattr(nn, kind)(8, 16, batch_first=True, **options)
        width = self.rnn.proj_size or 16
        self.head = nn.Linear(width * (2 if self.rnn.bidirectional else 1), 5)

    def forward(self, tokens):
        states, _ = self.rnn(self.embedding(tokens))
        return self.head(states)


class Seeded(nn.Module):
    """A decoder whose first state is made by a layer, and a cell that is called again and again."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 16)
        self.gru = nn.GRU(3, 16, batch_first=True)
        self.cell = nn.LSTMCell(16, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, z):
        states, _ = self.gru(z[:, None].expand(-1, 4, -1), self.first(z).tanh()[None])
        h, c = None, None
        for state in states.unbind(1):
            h, c = self.cell(state, None if h is None else (h, c))
        return self.head(h)


def stacked():
    return nn.Sequential(
        nn.Linear(4, 8 * 4), nn.Unflatten(1, (8, 4)), nn.Conv1d(8, 16, 3, padding=1), nn.GELU(),
        nn.MaxPool1d(2), nn.Upsample(scale_factor=2), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def shuffled():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(8, 8, 1),
        nn.PixelUnshuffle(2), nn.Conv2d(32, 2, 1),
    )  # fmt: skip


def normed():
    return nn.Sequential(
        spectral_norm(nn.Conv2d(1, 8, 3)), nn.ReLU(), weight_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(),
        spectral_norm(nn.ConvTranspose2d(8, 8, 3)), nn.ReLU(),
        weight_norm(nn.ConvTranspose2d(8, 4, 3)),
        nn.Conv2d(4, 1, 1),
    )  # fmt: skip


image = lambda c=1: (torch.rand(2, c, 8, 8),)  # noqa: E731
tokens = lambda: (torch.randint(0, 7, (2, 4)),)  # noqa: E731
ODD = {
    "reshaped": (Reshaped, lambda: (torch.rand(2, 3),)),
    "residual": (Residual, lambda: image(2)),
    "concatenated": (lambda: Residual(cat=True), lambda: image(2)),
    "unet": (UNet, image),
    "separable": (Separable, image),
    "squeeze": (Squeeze, image),
    "gru": (lambda: Recurrent("GRU"), tokens),
    "lstm": (lambda: Recurrent("LSTM"), tokens),
    "rnn": (lambda: Recurrent("RNN"), tokens),
    "stacked gru": (lambda: Recurrent("GRU", num_layers=2), tokens),
    "bidirectional lstm": (lambda: Recurrent("LSTM", bidirectional=True, num_layers=2), tokens),
    "projected lstm": (lambda: Recurrent("LSTM", proj_size=8, num_layers=2), tokens),
    "seeded": (Seeded, lambda: (torch.rand(2, 3),)),
    "stacked layers": (stacked, lambda: (torch.rand(2, 4),)),
    "shuffled": (shuffled, image),
    "parametrized": (normed, image),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", ODD)
def test_odd_modules(name):
    torch.manual_seed(0)
    make, inputs = ODD[name]
    module = make()
    if name != "parametrized":
        randomize(module)
    check_exact(module, inputs())


@pytest.mark.parametrize("training", [False, True])
def test_sizes_are_read_without_a_step_of_spectral_norm(training):
    torch.manual_seed(0)
    module = normed().train(training)
    before = copy.deepcopy(module.state_dict())
    assert check_sizes(module) == []
    inputs = image()
    graph = channel_graph(module, inputs)
    gone = every_other(graph)
    zeroed = zeroed_channels(module, graph, gone)
    small = removed(zeroed, graph, gone)
    assert removal_fault(small, inputs, exact_outputs(zeroed, inputs), graph, gone) == ""
    for path, one in module.state_dict().items():
        assert one.equal(before[path]), path
    full = match_channels(normed().train(training), small.state_dict())
    full.load_state_dict(small.state_dict())
    assert check_sizes(full) == []


@pytest.mark.parametrize("kind", [nn.Linear, nn.GRUCell])
def test_sizes_of_an_unknown_parametrization_are_those_of_what_it_makes(kind):
    class Half(nn.Module):
        def forward(self, x):
            assert not self.training
            return x[:, : x.shape[1] // 2]

    layer, name = kind(8, 8), "weight" if kind is nn.Linear else "weight_ih"
    register_parametrization(layer.eval(), name, Half().eval(), unsafe=True)
    layer.train()
    size = "in_features" if kind is nn.Linear else "input_size"
    assert check_sizes(layer) == [f"(root): {size} is 8, the tensors say 4"]


class Latent(nn.Module):
    """A decoder whose latent is the first state of its layer: it must stay."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x, z):
        return self.head(self.gru(x, z[None])[0])


class Stateful(Latent):
    """The same, and the state is handed back to the caller, who makes it to measure."""

    def forward(self, x, z):
        states, last = self.gru(x, z[None])
        return self.head(states), last[0]


class Summary(Latent):
    """An encoder that gives its last state away."""

    def forward(self, x, z):
        return self.gru(x)[1][0] + self.head.bias.sum() + z.sum()


@pytest.mark.parametrize(("kind", "free"), [(Latent, 0), (Stateful, 8), (Summary, 0)])
def test_states_that_are_latents_stay(kind, free):
    graph = channel_graph(kind(), (torch.rand(2, 4, 3), torch.rand(2, 8)))
    assert [len(one.free) for one in graph.groups if one.name == "gru"] == [free]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: functional.layer_norm(x, x.shape[1:]), "layer_norm"),
        (lambda x: x - x.mean(1, keepdim=True), "mean"),
        (lambda x: x @ torch.ones(8, 8), "matmul|__matmul__"),
        (lambda x: x + torch.arange(8.0), "fixed size"),
        (lambda x: x * x.amax(1)[:, None], "amax"),
        (lambda x: torch.fft.fft(x).real, "fft"),
    ],
)
def test_what_mixes_channels_keeps_them(function, reason):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(function(self.first(x)))

    group = channel_graph(Mixed(), (torch.rand(2, 3),)).groups[0]
    assert len(group.free) == 0
    assert re.search(reason, " ".join(group.reasons))


def test_half_precision_is_compared_in_its_own_steps():
    module = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).bfloat16()
    inputs = (torch.rand(2, 64, dtype=torch.bfloat16),)
    graph = channel_graph(module, inputs)
    gone = every_other(graph)
    zeroed = zeroed_channels(module, graph, gone)
    assert (
        removal_fault(
            removed(zeroed, graph, gone), inputs, exact_outputs(zeroed, inputs), graph, gone
        )
        == ""
    )


def test_a_weight_norm_keeps_what_stays_of_a_weight():
    layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), weight_norm(nn.Linear(8, 4)))
    graph = channel_graph(layers, (torch.rand(2, 3),))
    gone = every_other(graph)
    small = removed(zeroed_channels(layers, graph, gone), graph, gone)
    torch.testing.assert_close(small[2].weight, layers[2].weight[:, 1::2])


def test_sizes_of_many_layers_are_found_in_one_pass(monkeypatch):
    """Not a pass over all parameters for each parameter: that took minutes for large models."""
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    passes, named = [], nn.Module.named_parameters

    def counted(module, *args, **kwargs):
        passes.append(module is net)
        return named(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_parameters", counted)
    assert len(sizes_known(net, [f"{layer}.weight" for layer in range(20)])) == 20
    assert sum(passes) <= 2
