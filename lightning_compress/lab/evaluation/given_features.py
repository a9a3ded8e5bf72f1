"""A feature extractor that the user gives: any image network, by `_target_` or as a file."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from lightning_compress.lab.evaluation.features import FeatureExtractor

__all__ = ["given_extractor"]
VALID = (
    "'own', 'inception', an object such as {_target_: torchvision.models.resnet18, weights: "
    "DEFAULT}, or the path of a torch.export (.pt2) or TorchScript file"
)


class GivenFeatures(nn.Module):
    """A given network as a feature extractor: images (N, C, H, W) in [0, 1] -> (N, D).

    Positions and tokens are averaged: (N, D, H, W) and (N, T, D) become (N, D). Grey images are
    repeated to RGB where the first convolution takes three channels.

    Args:
        network: returns a tensor, or one tensor in a dict, list or tuple.
        layer: path of a submodule whose output is taken instead.

    Raises:
        ValueError: for a layer that the network does not have.

    >>> features = GivenFeatures(nn.Conv2d(3, 5, 3))
    >>> features(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(self, network: nn.Module, layer: str | None = None) -> None:
        super().__init__()
        self.network = network
        for weight in network.parameters():  # a TorchScript module has no `requires_grad_`
            weight.requires_grad_(False)
        with contextlib.suppress(NotImplementedError):  # an exported program has one mode
            network.eval()
        self._taken: Any = None
        if layer is not None:
            known = [name for name, _ in network.named_modules() if name]
            if layer not in known:
                raise ValueError(f"evaluate.feature_layer={layer!r}: valid are {known}")
            network.get_submodule(layer).register_forward_hook(self._take)
        self.layer = layer
        self.training = False

    def train(self, mode: bool = True) -> GivenFeatures:  # noqa: ARG002
        """Stay in eval mode, whatever is asked."""
        self.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, D) of images (N, C, H, W)."""
        if x.shape[1] == 1 and self._input_channels() == 3:
            x = x.expand(-1, 3, -1, -1)
        found = self.network(x)
        if self.layer is not None:
            found, self._taken = self._taken, None
        return _flat(found)

    def _take(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        self._taken = output

    def _input_channels(self) -> int | None:
        """Of the first convolution; its weight is known of a TorchScript module too."""
        weights = (weight for weight in self.network.parameters() if weight.dim() == 4)
        return next((weight.shape[1] for weight in weights), None)


def _flat(found: Any) -> Tensor:
    if isinstance(found, Mapping):
        found = list(found.values())
    if isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() not in (2, 3, 4):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"evaluate.feature: the network returns {what}, but one tensor (N, D), (N, T, D) or "
            "(N, D, H, W) is needed; evaluate.feature_layer takes the output of a layer"
        )
    if found.dim() == 4:
        return found.mean((2, 3))
    return found.mean(1) if found.dim() == 3 else found


def given_extractor(
    feature: Mapping[str, Any] | str, sample: Tensor, *, layer: str | None = None
) -> FeatureExtractor:
    """The extractor that `evaluate.feature` names, tried on a sample.

    Args:
        feature: a config with `_target_`, or the path of a `torch.export` file, exported with a
            dynamic batch size, or of a TorchScript file.
        sample: some images (N, C, H, W) in [0, 1] of the data.
        layer: path of a submodule whose output is taken.

    Raises:
        ValueError: for what is none of them, for objects that are no modules, and for modules that
            do not take the images.
    """
    if isinstance(feature, Mapping):
        if "_target_" not in feature:
            raise ValueError(f"evaluate.feature={dict(feature)!r}: valid are {VALID}")
        network = instantiate(feature, _convert_="all")
        name = str(feature["_target_"]).rsplit(".", 1)[-1]
    else:
        network, name = _of_file(feature), Path(feature).stem
    if not isinstance(network, nn.Module):
        raise ValueError(f"evaluate.feature: {name} is a {type(network).__name__}, not a module")
    module = GivenFeatures(network, layer)
    try:
        with torch.no_grad():
            module(sample)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"evaluate.feature: {name} does not take the data's images {tuple(sample.shape)}: "
            f"{error}"
        ) from error
    where = "" if layer is None else f"-{layer}"
    return FeatureExtractor(module, f"{name}{where}-{_digest(network)}", None, "given")


def _of_file(path: str) -> nn.Module:
    if not Path(path).is_file():
        raise ValueError(f"evaluate.feature={path!r}: valid are {VALID}; there is no such file")
    try:
        if Path(path).suffix == ".pt2":
            return torch.export.load(path).module()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # torch 2.14: of all of jit
            return torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"evaluate.feature={path!r} cannot be read (torch.export.save writes a .pt2 file, "
            "torch.jit.save a TorchScript file; a pickled module could run anything and is not "
            f"read): {error}"
        ) from error


def _digest(network: nn.Module) -> str:
    """Eight hexadecimal digits that stand for the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:8]
