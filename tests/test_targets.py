"""Which parameters are compressed, over ordinary and odd modules."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.deployment import deployed_part
from lightning_compress.errors import TargetError
from lightning_compress.targets import select, unselected


def paths(module, *args, **kwargs):
    return [target.path for target in select(module, *args, **kwargs).targets]


def reasons(module, *args, **kwargs):
    return {row.path: row.reason for row in select(module, *args, **kwargs).coverage}


def gan():
    return nn.ModuleDict(
        {
            "generator": nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)),
            "discriminator": nn.Sequential(nn.Linear(4, 1)),
        }
    )


def test_a_gan_compresses_its_generator_by_default():
    assert paths(gan()) == ["generator.0.weight"]
    assert "deployed part" in reasons(gan())["discriminator.0.weight"]


def test_a_vae_compresses_encoder_and_decoder_and_an_attribute_overrules():
    vae = nn.ModuleDict({"encoder": nn.Linear(4, 2), "decoder": nn.Linear(2, 4)})
    assert paths(vae) == ["encoder.weight", "decoder.weight"]
    vae.deployed = ("decoder",)
    assert deployed_part(vae) == ("decoder",)
    assert paths(vae) == ["decoder.weight"]


def named(*names):
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("netG", "netD"), ("netG",)),
        (("net_g", "net_d"), ("net_g",)),
        (("G", "D"), ("G",)),
        (("g", "d"), ("g",)),
        (("gen", "disc"), ("gen",)),
        (("g_AB", "g_BA", "d_A", "d_B"), ("g_AB", "g_BA")),
        (("netG_A2B", "netG_B2A", "netD_A"), ("netG_A2B", "netG_B2A")),
        (("genAB", "genBA", "discA"), ("genAB", "genBA")),
        (("generator1", "generator2", "discriminator1"), ("generator1", "generator2")),
        (("body", "critic"), ("body",)),
        (("mapping", "synthesis", "discriminator"), ("mapping", "synthesis")),
        (("encoder", "decoder", "discriminator"), ("encoder", "decoder")),
        (("generator", "generator_ema", "discriminator"), ("generator",)),
        (("d1", "d2", "u1"), ("",)),  # layers of a U-Net
        (("G", "F"), ("",)),
        (("conv", "d_conv"), ("",)),
        (("gate", "dense"), ("",)),
        (("critic",), ("",)),
    ],
)
def test_a_gan_of_other_names_keeps_its_discriminator(names, parts):
    module = named(*names)
    assert deployed_part(module) == parts
    kept = [name for name in names if parts == ("",) or name in parts]
    assert paths(module) == [f"{name}.weight" for name in kept]


def test_a_discriminator_is_known_by_its_weights():
    module = named("body", "critic")
    module["critic"] = nn.Identity()  # a flag, say: nothing to leave alone
    assert deployed_part(module) == ("",)


def test_what_lies_beside_the_deployed_part_is_named():
    vae = named("encoder", "decoder", "fc_mu", "final", "discriminator", "d_feature")
    vae["relu"], vae["norm"] = nn.ReLU(), nn.BatchNorm1d(2)
    vae["features"] = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    assert unselected(vae) == ["fc_mu", "final"]
    vae.deployed = ("encoder", "decoder")
    assert unselected(vae) == []
    assert unselected(named("a", "b")) == []  # all of it ships


def test_norms_biases_and_embeddings_need_their_own_name():
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.LayerNorm((2, 2)))
    assert paths(module) == ["1.weight"]
    assert paths(module, ["*"]) == ["1.weight"]  # a glob takes what the default takes
    assert paths(module, ["0", "1"]) == ["0.weight", "1.weight"]
    assert paths(module, ["0.weight"]) == ["0.weight"]
    assert paths(module, ["1.bias"]) == ["1.bias"]
    assert "include it by name" in reasons(module)["0.weight"]
    assert reasons(module, ["*"])["2.weight"] == "norm parameter"


def test_recurrent_weights_of_both_directions_and_projection():
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    names = {path.split("_l")[0] for path in paths(lstm)}
    assert names == {"weight_ih", "weight_hh", "weight_hr"}
    assert len(paths(lstm)) == 12


def test_classes_globs_and_exclusions_combine():
    module = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Linear(2, 2))
    assert paths(module, nn.Linear, "2") == ["0.weight"]
    assert paths(module, [nn.Conv1d, "2.*"]) == ["1.weight", "2.weight"]


def test_tied_weights_count_once():
    first = nn.Linear(3, 3)
    module = nn.ModuleDict({"a": first, "b": nn.Linear(3, 3)})
    module["b"].weight = first.weight
    assert paths(module) == ["a.weight"]
    assert reasons(module)["b.weight"] == "tied to a.weight"
    assert [target.tied for target in select(module).targets] == [("b.weight",)]
    assert select(module, exclude="b").targets[0].tied == ()


@pytest.mark.parametrize(
    ("parametrize", "path"),
    [
        (parametrizations.spectral_norm, "parametrizations.weight.original"),
        (parametrizations.weight_norm, "parametrizations.weight.original1"),
    ],
)
def test_parametrized_weights_are_found_behind_the_parametrization(parametrize, path):
    layer = parametrize(nn.Linear(3, 4))
    assert paths(layer) == [path]
    assert paths(nn.Sequential(layer), ["0.weight"]) == [f"0.{path}"]


def test_orthogonal_weights_are_refused_with_a_reason():
    module = nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert paths(module) == ["1.weight"]
    assert any("_Orthogonal" in reason for reason in reasons(module).values())


def test_frozen_weights_are_named_in_the_coverage():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].weight.requires_grad_(False)
    assert paths(module) == ["1.weight"]
    assert "frozen" in reasons(module)["0.weight"]


def test_compiled_modules_match_the_same_globs():
    module = torch.compile(nn.ModuleDict({"generator": nn.Sequential(nn.Linear(2, 2))}))
    assert paths(module, ["generator.*"]) == ["_orig_mod.generator.0.weight"]
    assert paths(module) == ["_orig_mod.generator.0.weight"]


def test_a_custom_layer_is_taken_by_name():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(2, 2, 3, 3))

    module = nn.ModuleDict({"net": Scaled(), "head": nn.Linear(2, 2)})
    assert paths(module, ["net.*"]) == ["net.kernel"]
    assert paths(module) == ["head.weight"]


def test_a_path_with_brackets_is_itself():
    module = nn.ModuleDict({"x[0]": nn.Linear(2, 2), "x0": nn.Linear(2, 2)})
    for pattern in ("x[0].weight", "x[0]", "x[0].*"):  # a path, and a glob
        assert paths(module, [pattern]) == ["x[0].weight", "x0.weight"]
    assert paths(module, None, ["x0"]) == ["x[0].weight"]


def test_one_deployed_part_may_be_a_word():
    module = gan()
    module.deployed = "discriminator"
    assert deployed_part(module) == ("discriminator",)
    assert paths(module) == ["discriminator.0.weight"]


def test_sparse_gradients_are_told():
    module = nn.ModuleDict({"emb": nn.Embedding(3, 2, sparse=True), "head": nn.Linear(2, 2)})
    assert "sparse=True" in reasons(module, ["emb", "head"])["emb.weight"]
    assert paths(module, ["emb", "head"]) == ["head.weight"]


def test_patterns_that_match_nothing_name_the_closest():
    with pytest.raises(TargetError, match=r"'generatr\.\*' matches no parameter.*generator"):
        select(gan(), ["generatr.*"])
    with pytest.raises(TargetError, match="'nothing' matches no"):
        select(gan(), None, ["nothing"])
    with pytest.raises(TargetError, match=r"no layer is a Conv2d.*Linear"):
        select(gan(), [nn.Conv2d])
    with pytest.raises(TargetError, match="3 is neither"):
        select(gan(), [3])


def test_nothing_left_and_lazy_layers_raise():
    with pytest.raises(TargetError, match="no parameter is left"):
        select(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(TargetError, match="lazy"):
        select(nn.Sequential(nn.LazyLinear(3)))


class Modulated(nn.Module):
    """A raw weight, a scale and a start of its own, as in StyleGAN2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4, 2, 3, 3))
        self.start = nn.Parameter(torch.randn(1, 4, 2, 2))
        self.scale = nn.Module()
        self.scale.weight = nn.Parameter(torch.ones(1, 4, 1, 1))


class Words(nn.Embedding):
    """Looked up, not multiplied."""


def test_a_raw_weight_is_a_target_by_default_and_other_raw_parameters_by_their_path():
    module = nn.ModuleDict({"conv": Modulated(), "words": Words(4, 4), "out": nn.Linear(4, 2)})
    assert paths(module) == ["conv.weight", "out.weight"]
    found = reasons(module)
    for name in ("conv.start", "conv.scale.weight", "words.weight"):
        assert "include it by name" in found[name]
    assert paths(module, ["conv.start"]) == ["conv.start"]
