"""A user's own network as feature extractor: by `_target_`, by file, by layer."""

import pytest
import torch
from torch import nn

from lightning_compress.lab.evaluation.fidelity import fidelity
from lightning_compress.lab.evaluation.given_features import given_extractor

RESNET = {"_target_": "torchvision.models.resnet18", "weights": None, "num_classes": 7}
GREY = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_torchvision_network_takes_grey_images_and_gives_a_layer():
    torch.manual_seed(0)
    found = given_extractor(RESNET, GREY)
    assert found.module(GREY).shape == (2, 7)
    assert found.name.startswith("resnet18-")
    assert found.test_accuracy is None
    pooled = given_extractor(RESNET, GREY, layer="avgpool")
    assert pooled.name.startswith("resnet18-avgpool-")
    features = pooled.module(GREY)
    rgb = GREY.expand(-1, 3, -1, -1)
    assert pooled.module.network(rgb).equal(pooled.module.network.fc(features))
    assert not any(weight.requires_grad for weight in pooled.module.parameters())
    assert not pooled.module.train().network.bn1.training


def test_the_name_tells_weights_apart():
    torch.manual_seed(0)
    first = given_extractor(RESNET, GREY).name
    assert first != given_extractor(RESNET, GREY).name
    torch.manual_seed(0)
    assert first == given_extractor(RESNET, GREY).name


class Net(nn.Module):
    """Two outputs, where one is needed, unless `pair` is false."""

    def __init__(self, pair=False):
        super().__init__()
        self.conv, self.pair = nn.Conv2d(1, 6, 3, padding=1), pair

    def forward(self, x):
        y = self.conv(x)
        return (y, y) if self.pair else {"out": y}


def test_maps_are_averaged_over_positions_and_serve_fidelity():
    found = given_extractor({"_target_": f"{__name__}.Net"}, GREY)
    assert found.module(GREY).allclose(found.module.network.conv(GREY).mean((2, 3)))
    x = torch.rand(16, 1, 32, 32)
    assert fidelity(x, x, found.module)["fid"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["script", "program"])
def test_a_file_gives_the_same_features(tmp_path, kind):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)).eval()
    path = tmp_path / f"mine.{'pt' if kind == 'script' else 'pt2'}"
    if kind == "script":
        with pytest.warns(FutureWarning, match="torch"):
            torch.jit.save(torch.jit.trace(network, GREY), path)
    else:
        batch = {0: torch.export.Dim("batch", min=1, max=4096)}
        torch.export.save(torch.export.export(network, (GREY,), dynamic_shapes=(batch,)), path)
    found = given_extractor(str(path), GREY)
    x = torch.rand(5, 1, 32, 32)
    assert found.module(x).allclose(network(x).mean((2, 3)), atol=1e-6)
    assert found.name.startswith("mine-")


@pytest.mark.parametrize(
    ("feature", "layer", "message"),
    [
        ("stranger", None, "evaluate.feature='stranger': valid are"),
        ({"weights": None}, None, "valid are 'own', 'inception', an object"),
        ({"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}, None, "not take"),
        ({"_target_": "builtins.dict"}, None, "dict is a dict, not a module"),
        (RESNET, "head", r"feature_layer='head': valid are \['conv1'"),
        ({"_target_": f"{__name__}.Net", "pair": True}, None, "the network returns tuple"),
    ],
)
def test_bad_values_are_named(feature, layer, message):
    with pytest.raises(ValueError, match=message):
        given_extractor(feature, GREY, layer=layer)


def test_a_pickled_module_is_not_read(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="a pickled module could run anything"):
        given_extractor(str(tmp_path / "pickled.pt"), GREY)
