"""What ships, by names below wrappers too; and which weights that do not train are covered."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lightning_compress import quantize_dynamic, quantize_static, sparsity
from lightning_compress.copies import Copy, adapters, frozen_copies
from lightning_compress.deployment import deployed_part, known_by_name, note_deployed
from lightning_compress.quantization.post_training import quantize_weights
from lightning_compress.state import compression_state
from lightning_compress.targets import low_coverage, select, unselected


def net(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def tree(names):
    """A module of modules: names with points are inside one another."""
    root = nn.Module()
    for name in names:
        at = root
        *outer, last = name.split(".")
        for part in outer:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, net(3, 4, 3))
    return root


def paths(module, *args, **kwargs):
    return [target.path for target in select(module, *args, **kwargs).targets]


def reasons(module, *args, **kwargs):
    return {row.path: row.reason for row in select(module, *args, **kwargs).coverage}


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("nets.generator", "nets.discriminator"), ("nets.generator",)),
        (("model.netG", "model.netD"), ("model.netG",)),
        (("a.b.c.Gen", "a.b.c.Disc"), ("a.b.c.Gen",)),
        (("m.encoder", "m.decoder", "m.disc"), ("m.encoder", "m.decoder")),
        (("genA2B", "genB2A", "disGA", "disGB", "disLA"), ("genA2B", "genB2A")),
        (("gnet", "dnet"), ("gnet",)),
        (("GNet", "DNet"), ("GNet",)),
        (("vae", "disc"), ("vae",)),
        (("model_G", "model_D"), ("model_G",)),
        (("sr_gen", "sr_disc"), ("sr_gen",)),
        (("generator", "mpd", "msd"), ("generator",)),
        (("vocoder", "mpd", "msd"), ("vocoder",)),
        (("body", "adversarial_net"), ("body",)),
        (("body", "MultiPeriodDiscriminator"), ("body",)),
        (("body", "image_critic"), ("body",)),
        (("G", "D", "G_ema"), ("G",)),
        (("G.mapping", "G.synthesis", "D"), ("G",)),
        (("unet", "lpips"), ("unet",)),
        (("unet", "perceptual_loss", "disc"), ("unet",)),
        (("stages.d1", "stages.d2", "stages.u1"), ("",)),
        (("discrete_prior", "flow"), ("",)),
        (("body.gate", "body.dense"), ("",)),
        (("left", "right"), ("",)),
    ],
)
def test_names_tell_what_ships_below_wrappers_too(names, parts):
    assert deployed_part(tree(names)) == parts


def test_what_was_noted_counts_before_names_and_after_what_is_declared():
    module = tree(("left", "right"))
    assert not known_by_name(module)
    note_deployed(module, ["right"])
    assert deployed_part(module) == ("right",)
    assert known_by_name(module)
    assert deployed_part(copy.deepcopy(module)) == ("right",)
    module.deployed = "left"
    assert deployed_part(module) == ("left",)


@pytest.mark.parametrize(
    "judge", ["mpd", "msd", "Disc", "critic_2", "adversarial_loss", "net_D", "lpips", "D_ema"]
)
def test_no_advice_names_a_judge_or_a_loss(judge):
    assert unselected(tree(("encoder", "decoder", "head", judge))) == ["head"]
    assert unselected(tree(("m.G", "m.D", "m.style", f"m.{judge}"))) == ["m.style"]


def test_after_freezing_a_model_has_the_weights_it_had():
    module = net(4, 8, 2).requires_grad_(False)
    assert sparsity(module) == 0.0
    quantize_weights(module, 4)
    assert set(compression_state(module).grids) == {"0.weight", "1.weight"}
    assert len(quantize_dynamic(net(2, 2).requires_grad_(False)).weights) == 2
    report = quantize_static(net(2, 2).requires_grad_(False), [torch.rand(4, 2)])
    assert [row.path for row in report.activations if row.selected] == ["0"]


def test_frozen_weights_are_targets_where_include_must_mean_them():
    module = nn.ModuleDict({"base": net(2, 3, 2).requires_grad_(False), "head": net(2, 2)})
    assert paths(module) == ["head.0.weight"]
    assert "frozen" in reasons(module)["base.0.weight"]
    assert paths(module, ["*"]) == ["head.0.weight"]
    assert paths(module, ["*", "base.1"]) == ["base.1.weight", "head.0.weight"]
    assert paths(module, ["base.*", "head"]) == ["base.0.weight", "base.1.weight", "head.0.weight"]
    assert paths(module, frozen=True) == ["base.0.weight", "base.1.weight", "head.0.weight"]


class Lora(nn.Module):
    """A frozen layer with a low-rank addition, as parameters or as layers."""

    def __init__(self, rank=2, *, layers=True, size=(8, 6)):
        super().__init__()
        self.base = nn.Linear(*size).requires_grad_(False)
        if layers:
            self.down = nn.Linear(size[0], rank, bias=False)
            self.up = nn.Linear(rank, size[1], bias=False)
        else:
            self.down = nn.Parameter(torch.randn(size[0], rank))
            self.up = nn.Parameter(torch.zeros(rank, size[1]))


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("size", [(8, 6), (8, 8)])
def test_the_frozen_base_is_the_target_and_its_adapters_are_not(layers, size):
    module = nn.ModuleDict({"a": Lora(layers=layers, size=size), "norm": nn.LayerNorm(6)})
    assert paths(module) == ["a.base.weight"]
    assert all("adapter" in why for p, why in reasons(module).items() if "down" in p or "up" in p)
    assert low_coverage(module, select(module).coverage) == ""


def test_a_small_trained_net_beside_a_frozen_layer_is_no_adapter():
    module = nn.ModuleDict({"base": nn.Linear(8, 6).requires_grad_(False), "head": net(6, 3, 2)})
    assert adapters(module) == {}


def test_a_glob_takes_the_kinds_of_the_default_and_a_path_anything():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(5, 4))
            self.words, self.norm = nn.Embedding(7, 4), nn.LayerNorm((2, 4))
            self.body = net(4, 4)

    module = nn.ModuleDict({"decoder": Decoder(), "rest": net(4, 4)})
    for pattern in ("decoder.*", "decoder", "*decoder*"):
        assert paths(module, [pattern]) == ["decoder.body.0.weight"]
    assert paths(module, ["decoder.positions"]) == ["decoder.positions"]
    assert paths(module, ["decoder.words"]) == ["decoder.words.weight"]
    assert paths(module, [nn.Embedding]) == ["decoder.words.weight"]
    assert paths(module, ["decoder.norm.weight"]) == ["decoder.norm.weight"]
    assert paths(module, ["decoder.body.0.bias"]) == ["decoder.body.0.bias"]


def test_an_output_layer_tied_to_an_embedding_is_a_target_once():
    module = nn.ModuleDict({"words": nn.Embedding(9, 4), "out": nn.Linear(4, 9)})
    module["out"].weight = module["words"].weight
    (target,) = select(module).targets
    assert (target.path, target.tied) == ("words.weight", ("out.weight",))
    assert reasons(module)["out.weight"] == "tied to words.weight"
    module["head"] = nn.Linear(4, 4)
    assert paths(module, exclude="words") == ["head.weight"]


class Scaled(nn.Module):
    """Equalized learning rate: a weight of its own, scaled where it is used."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs))
        self.style = nn.Linear(2, 2)


def test_less_than_half_of_the_weights_is_told_with_the_largest_and_why():
    module = nn.ModuleDict({"scaled": Scaled(20, 20), "head": nn.Linear(4, 4)})
    message = low_coverage(module, select(module).coverage)
    assert "only 5 % of the weights" in message
    assert "scaled.kernel (Scaled is no matmul" in message
    named = select(module, ["scaled.kernel", "head"])
    assert low_coverage(module, named.coverage) == ""
    assert low_coverage(module, select(module, exclude="scaled.kernel").coverage) == ""
    module["scaled"].kernel.requires_grad_(False)
    assert "frozen" in low_coverage(module, select(module).coverage)


def test_sparsity_measures_all_matrices_of_what_it_is_given():
    module = nn.ModuleDict({"scaled": Scaled(10, 10), "head": nn.Linear(4, 4)})
    nn.init.zeros_(module["head"].weight)
    assert sparsity(module) == 16 / (100 + 4 + 16)
    assert sparsity(module, ["scaled*"]) == 0.0
    assert sparsity(module, ["head"]) == 1.0
    module.requires_grad_(False)
    assert sparsity(module) == 16 / (100 + 4 + 16)


def test_a_copy_is_known_by_its_form_and_its_weights():
    module = nn.ModuleDict({"net": net(6, 8, 6)})
    module["average"] = copy.deepcopy(module["net"]).requires_grad_(False)
    module["other"] = net(6, 8, 6).requires_grad_(False)  # of the same form, of other weights
    assert frozen_copies(module) == [Copy("average", "net")]
    averaged = nn.ModuleDict({"net": net(6, 8, 6)})
    averaged["ema"] = torch.optim.swa_utils.AveragedModel(averaged["net"])
    trained = {id(one) for one in averaged["net"].parameters()}
    assert frozen_copies(averaged, trained) == [Copy("ema.module", "net")]
