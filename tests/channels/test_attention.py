"""Attention heads go whole: out of queries, keys, values and the output together."""

import copy
import math

import pytest
import torch
from exact import check_exact, randomize
from lightning.pytorch import LightningModule
from tiny import quiet_trainer
from torch import nn
from torch.nn import functional

from lightning_compress import ChannelPruning, load_compressed, rebuild_channels, save_compressed
from lightning_compress.channels.attention import FewerHeads, fit_attention
from lightning_compress.channels.graph import channel_graph
from lightning_compress.channels.plan import ChannelPlan, removed, zeroed_channels
from lightning_compress.channels.remover import ChannelRemover
from lightning_compress.channels.selection import Rounding
from lightning_compress.projection import Projector
from lightning_compress.state import removed_channels
from lightning_compress.targets import select

WIDTH, HEADS, EACH = 16, 4, 4


class Separate(nn.Module):
    """Queries, keys and values of their own, as in most U-Nets."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.num_heads = HEADS
        self.to_q = nn.Linear(width, HEADS * EACH, bias=False)
        self.to_k = nn.Linear(width, HEADS * EACH)
        self.to_v = nn.Linear(width, HEADS * EACH)
        self.to_out = nn.Linear(HEADS * EACH, width)

    def split(self, x):
        return x.view(len(x), x.shape[1], self.num_heads, -1).transpose(1, 2)

    def attend(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        q, k, v = (self.split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        out = self.attend(q, k, v).transpose(1, 2).reshape(len(x), x.shape[1], -1)
        return x + self.to_out(out)


class Measured(Separate):
    """The width of a head is what is known."""

    def split(self, x):
        return x.reshape(len(x), x.shape[1], -1, EACH).permute(0, 2, 1, 3)


class Batched(Separate):
    """Heads beside the examples, and products by bmm."""

    def split(self, x):
        b, n, c = x.shape
        x = x.reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        return x.reshape(b * self.num_heads, n, c // self.num_heads)

    def forward(self, x):
        q, k, v = (self.split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        weights = torch.bmm(q, k.transpose(1, 2)).mul(EACH**-0.5).softmax(-1)
        out = torch.bmm(weights, v).reshape(len(x), self.num_heads, x.shape[1], -1)
        return x + self.to_out(out.permute(0, 2, 1, 3).reshape(len(x), x.shape[1], -1))


class Einsum(Separate):
    def attend(self, q, k, v):
        weights = torch.einsum("b h i d, b h j d -> b h i j", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhij,bhjd->bhid", weights.softmax(dim=-1), v)


class Masked(Separate):
    def attend(self, q, k, v):
        scores = q @ k.transpose(-2, -1) * EACH**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.matmul(scores.masked_fill(future, float("-inf")).softmax(-1), v)


class Joint(nn.Module):
    """One layer for all three, cut by chunk."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.n_head = HEADS
        self.qkv = nn.Linear(width, 3 * HEADS * EACH)
        self.proj = nn.Linear(HEADS * EACH, width)

    def parts(self, x):
        b, n, _ = x.shape
        return [
            one.view(b, n, self.n_head, one.shape[-1] // self.n_head).transpose(1, 2)
            for one in self.qkv(x).chunk(3, dim=-1)
        ]

    def forward(self, x):
        out = functional.scaled_dot_product_attention(*self.parts(x))
        return x + self.proj(out.transpose(1, 2).flatten(2))


class Stacked(Joint):
    """The same, cut by an axis of three, as in vision transformers."""

    def parts(self, x):
        b, n, _ = x.shape
        return self.qkv(x).reshape(b, n, 3, self.n_head, EACH).permute(2, 0, 3, 1, 4).unbind(0)


class Image(nn.Module):
    """1 x 1 convolutions, heads merged into the batch, as in diffusion U-Nets."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.num_heads = HEADS
        self.norm = nn.GroupNorm(4, width)
        self.qkv = nn.Conv1d(width, 3 * HEADS * EACH, 1)
        self.proj_out = nn.Conv1d(HEADS * EACH, width, 1)

    def forward(self, x):
        b, c, *space = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        each = qkv.shape[1] // (3 * self.num_heads)
        q, k, v = qkv.reshape(b * self.num_heads, 3 * each, -1).split(each, dim=1)
        scale = 1 / math.sqrt(math.sqrt(each))
        weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        out = torch.einsum("bts,bcs->bct", weights, v).reshape(b, -1, x.shape[-1])
        return (x + self.proj_out(out)).reshape(b, c, *space)


class Maps(nn.Module):
    """The same with heads beside the channels."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.heads = HEADS
        self.to_qkv = nn.Conv2d(width, 3 * HEADS * EACH, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * EACH, width, 1)

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = (
            one.view(b, self.heads, -1, h * w) for one in self.to_qkv(x).chunk(3, dim=1)
        )  # fmt: skip
        q, k = q.softmax(dim=-2), k.softmax(dim=-1)  # linear attention
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return x + self.to_out(out.reshape(b, -1, h, w))


class Own(nn.Module):
    """torch's own layer."""

    def __init__(self, width=WIDTH, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True, **options)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


def own(**options):
    return lambda: Own(**options)


TEXTS = {
    "separate": Separate,
    "measured": Measured,
    "batched": Batched,
    "einsum": Einsum,
    "masked": Masked,
    "joint": Joint,
    "stacked": Stacked,
    "own": Own,
    "own without bias": own(bias=False),
    "own of other widths": own(kdim=WIDTH, vdim=WIDTH),
    "own with more keys": own(add_bias_kv=True, add_zero_attn=True),
}


class Text(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(3, WIDTH), make(), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.last(self.block(self.first(x)))


class Picture(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.first, self.block, self.last = nn.Conv2d(1, WIDTH, 3), make(), nn.Conv2d(WIDTH, 1, 1)

    def forward(self, x):
        return self.last(self.block(self.first(x)))


def heads_group(graph):
    return next(one for one in graph.groups if len(one.units) == HEADS and one.width >= EACH)


@pytest.mark.parametrize("name", [*TEXTS, "image", "maps"])
def test_half_of_the_heads_go(name):
    torch.manual_seed(0)
    if name in TEXTS:
        net, x = Text(TEXTS[name]), torch.randn(2, 5, 3)
    else:
        net, x = Picture({"image": Image, "maps": Maps}[name]), torch.randn(2, 1, 6, 6)
    randomize(net)
    graph, small = check_exact(net, (x,))
    assert len(heads_group(graph).free) == HEADS
    assert next(one for one in graph.groups if one.name == "first").free.size  # the stream too
    known = [vars(one) for one in small.modules()]
    counts = [one[key] for one in known for key in ("num_heads", "n_head", "heads") if key in one]
    assert counts == [2]
    fresh = type(net)(TEXTS[name] if name in TEXTS else {"image": Image, "maps": Maps}[name])
    rebuild_channels(fresh)
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(fresh.eval()(x), small(x))


def test_channels_go_on_after_all_heads_but_one_have_gone():
    torch.manual_seed(0)
    net, x = Text(Separate), torch.randn(2, 5, 3)
    randomize(net)
    plan = ChannelPlan(net, {"": (x,)}, targets=[t.path for t in select(net).targets])
    dense, kept = {one.name: len(one.units) for one in plan.graph.groups}, {}
    remover = ChannelRemover(plan, Projector(), rounding=Rounding(1), dense=dense, kept=kept)

    def remove(group, units):
        remover.remove(plan.graph.flags(group.units[units]), [], lambda *_: None)

    remove(heads_group(plan.graph), [0, 1, 3])
    left = list(range(2 * EACH, 3 * EACH))
    for name in ("block.to_q", "block.to_k", "block.to_v"):  # each a group of channels by now
        assert kept[name] == left
        assert dense[name] == HEADS * EACH
    remove(next(one for one in plan.graph.groups if one.name == "first"), [1])
    assert kept["block.to_v"] == left
    assert kept["first"] == [0, *range(2, WIDTH)]
    assert removed_channels(net).kept["block.to_v"] == tuple(left)


def test_one_head_keeps_its_width():
    """Queries and keys: it scales their products. Values lose channels where the code lets them."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(3))
            self.proj_out = nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x):
            q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
            weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
            return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))

    net = Picture(One)
    randomize(net)
    graph, _ = check_exact(net, (torch.randn(2, 1, 6, 6),))
    free = {one.name: len(one.free) for one in graph.groups}
    assert free == {"first": 16, "block.q": 0, "block.v": 16, "last": 0}
    reasons = next(one.reasons for one in graph.groups if one.name == "block.q")
    assert "matmul sums over them" in reasons[0]


def test_a_width_that_scales_attention_stays():
    class Narrow(Separate):
        def split(self, x):
            return x.view(len(x), x.shape[1], 2, -1).transpose(1, 2)  # a number that nobody holds

    graph = channel_graph(Text(Narrow), (torch.randn(2, 5, 3),))
    group = next(one for one in graph.groups if one.name == "block.to_q")
    assert not len(group.free)
    assert "the width of a head scales its attention" in group.reasons


def test_heads_that_a_number_in_the_code_fixes_stay_with_a_reason():
    class Written(Separate):
        def __init__(self):
            super().__init__()
            del self.num_heads

        def split(self, x):
            return x.view(len(x), x.shape[1], 4, 4).transpose(1, 2)

    net = Text(Written)
    plan = ChannelPlan(
        net, {"": (torch.randn(2, 5, 3),)}, targets=[p for p, _ in net.named_parameters()]
    )
    group = next(one for one in plan.graph.groups if one.name == "block.to_q")
    assert not len(group.free)
    assert "does not run" in group.reasons[0]


class Asserting(nn.Module):
    """A module of somebody's that checks its channels."""

    def __init__(self):
        super().__init__()
        self.channels, self.out_channels = 8, 12
        self.conv = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        out = self.conv(x)
        assert out.size(1) == self.out_channels
        return out


def test_what_a_module_knows_of_its_channels_follows():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), Asserting(), nn.Conv2d(12, 1, 1))
    _, small = check_exact(net, (torch.rand(2, 1, 8, 8),))
    assert (small[1].channels, small[1].out_channels) == (4, 6)


def test_an_assertion_that_cannot_follow_is_the_reason():
    class Strict(Asserting):
        def forward(self, x):
            assert x.shape[1] == 8
            return self.conv(x)

    net = nn.Sequential(nn.Conv2d(1, 8, 3), Strict(), nn.Conv2d(12, 1, 1))
    targets = [one.path for one in select(net).targets]
    plan = ChannelPlan(net, {"": (torch.rand(2, 1, 8, 8),)}, targets=targets)
    assert not len(plan.graph.groups[0].free)
    assert "assert x.shape[1] == 8 (test_attention.py:" in plan.graph.groups[0].reasons[0]


ARGUMENTS = {
    "plain": {},
    "weights": {"need_weights": True, "average_attn_weights": False},
    "mask": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "bias": {"attn_mask": torch.arange(25.0).view(5, 5) / 10},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_fewer_heads_attend_as_torch_does(name, batch_first, options):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options).eval()
    same = copy.deepcopy(layer)
    same.__class__ = FewerHeads
    x = torch.randn((3, 5, WIDTH) if batch_first else (5, 3, WIDTH))
    for ours, theirs in zip(
        same(x, x, x, **ARGUMENTS[name]), layer(x, x, x, **ARGUMENTS[name]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    if "key_padding_mask" not in ARGUMENTS[name]:
        one = x[0] if batch_first else x[:, 0]
        torch.testing.assert_close(
            same(one, one, one, **ARGUMENTS[name]), layer(one, one, one, **ARGUMENTS[name])
        )
    fit_attention(same)
    assert type(same) is nn.MultiheadAttention


def test_a_mask_for_heads_that_are_gone_is_refused():
    net = Text(Own)
    graph = channel_graph(net, (torch.randn(2, 5, 3),))
    gone = graph.flags(heads_group(graph).free[::2])
    small = removed(zeroed_channels(net, graph, gone), graph, gone).block.attention
    x = torch.randn(2, 5, small.embed_dim)
    with pytest.raises(ValueError, match="attn_mask is for 4 heads, and 2 are left"):
        small(x, x, x, attn_mask=torch.zeros(2 * HEADS, 5, 5))


def test_a_transformer_of_torch_loses_heads_and_hidden_channels():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.randn(2, 5, WIDTH)
    graph, small = check_exact(net, (x,))
    assert sum(len(one.free) for one in graph.groups) == 2 * (HEADS + 32)
    with torch.no_grad():  # torch has a faster kernel here, for layers of its own
        fast = small.eval()(x)
    torch.testing.assert_close(fast, small(x))


class Trained(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Text(Own), nn.Linear(2, 3), Text(Joint), nn.Linear(2, 3))
        self.example_input_array = torch.randn(2, 5, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return (self(batch) - batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(16, 5, 3), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_heads_go_in_a_run_and_come_back_from_its_files(tmp_path):
    torch.manual_seed(0)
    model = Trained()
    pruning = ChannelPruning(final_sparsity=0.5, round_to=1, fade=1, on_miss="raise", scope="layer")
    trainer = quiet_trainer(tmp_path, pruning, max_epochs=5)
    trainer.fit(model)
    assert isinstance(model.net[0].block.attention, FewerHeads)
    assert (model.net[0].block.attention.num_heads, model.net[2].block.n_head) == (2, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    x = torch.randn(2, 5, 3)
    fresh = Trained()
    rebuild_channels(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x))
    save_compressed(model.net, tmp_path / "a.lcz")
    other = load_compressed(tmp_path / "a.lcz", Trained().net)
    torch.testing.assert_close(other.eval()(x), model.net(x))
