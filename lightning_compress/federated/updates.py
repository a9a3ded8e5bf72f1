"""Codec of federated updates: the difference to the last global model as bytes.

Pure functions of named tensors; neither Flower nor Lightning is needed. Top-k and error feedback:
Stich et al. 2018, https://arxiv.org/abs/1809.07599.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.grids import MAX_BITS, MIN_BITS, AffineGrid
from lightning_compress.lcz.codecs import check_codec
from lightning_compress.lcz.memory import tensors_from_bytes, tensors_to_bytes
from lightning_compress.state import Grid

__all__ = [
    "METHODS", "EncodedUpdate", "Tensors", "UpdateCodec", "UpdateError", "add_update",
    "decode_update", "digest", "encode_update", "kept_by_magnitude", "rate_distortion_steps",
]  # fmt: skip

Tensors = Mapping[str, Tensor]

METHODS = ("entropy", "eight_bits", "fp16", "fp32", "home")
SCOPES = ("global", "layer")
SPARE_BYTES = 1 << 16  # of a payload, above the plain size of its tensors
_ROUNDS = 3  # of histogram and choice; later ones change next to nothing


class UpdateError(ValueError):
    """An update that is refused: damaged, oversized, not finite, or of another model or version."""


@dataclass(frozen=True)
class UpdateCodec:
    """Settings of the codec of model differences.

    Tensors of two or more axes are coded by the method `"entropy"`: the largest `density` of their
    differences on a uniform grid, entropy coded. Other floats (biases, BatchNorm) are coded as
    `others` says, and integers (BatchNorm's counters) stay at home.

    Args:
        density: fraction of the differences that are sent, the largest; 1: all.
        relative_step: the grid's step, in units of the rms of what is sent; what rounds to 0 is not
            sent, so it must be below 2: else differences of one size would never be. At equal
            bytes a coarse step of more values beats a fine one of few.
        lmbda: squared steps of error that one bit is worth: above 0, symbols are chosen by rate
            and distortion together, which by itself makes most differences 0.
        bits: most bits of a symbol, 2 to 8.
        scope: `"global"` takes one step and the largest of all tensors together, `"layer"` of each.
        mask: send nothing where the reference is 0 (a pruned global model stays pruned).
        others: method of floats with less than two axes: one of `METHODS`.
        rules: method by glob pattern of the name, the first that matches; `"home"` leaves a tensor
            where it is: `{"discriminator.*": "home"}`, `{"*.running_*": "home"}`.
        error_feedback: what is not sent is added to the next update.
        codec: of the symbols, as in `save_compressed`.

    Raises:
        ValueError: for an argument out of its range, with the valid ones.

    >>> UpdateCodec(rules={"discriminator.*": "home"}).method("discriminator.0.weight", 4)
    'home'
    """

    density: float = 0.15
    relative_step: float = 1.9
    lmbda: float = 0.0
    bits: int = 8
    scope: str = "global"
    mask: bool = False
    others: str = "eight_bits"
    rules: Mapping[str, str] = field(default_factory=dict)
    error_feedback: bool = True
    codec: str = "fast"

    def __post_init__(self) -> None:
        check_codec(self.codec)
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r}: expected a number above 0, at most 1")
        if not 0 < self.relative_step < 2:
            raise ValueError(f"relative_step={self.relative_step!r}: expected above 0, below 2")
        if not 0 <= self.lmbda < math.inf:
            raise ValueError(f"lmbda={self.lmbda!r}: expected a number of at least 0")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits={self.bits!r}: expected {MIN_BITS} to {MAX_BITS}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r}: valid are {SCOPES}")
        object.__setattr__(self, "rules", dict(self.rules))
        for name, method in {"others": self.others, **self.rules}.items():
            if method not in METHODS:
                raise ValueError(f"{name}={method!r}: valid are {METHODS}")

    @classmethod
    def plain(cls, method: str = "fp32") -> UpdateCodec:
        """All floats by one method: `"fp32"` is FedAvg as it is."""
        return cls(others=method, rules={"*": method}, error_feedback=False)

    def method(self, name: str, dims: int) -> str:
        """How a float tensor of so many axes is sent."""
        for pattern, method in self.rules.items():
            if fnmatchcase(name, pattern):
                return method
        return "entropy" if dims > 1 else self.others

    def methods(self, tensors: Tensors) -> dict[str, str]:
        """The method by name of all tensors that are sent."""
        found = {
            name: self.method(name, tensor.dim())
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
        return {name: method for name, method in found.items() if method != "home"}


@dataclass(frozen=True)
class EncodedUpdate:
    """Encoded update: its payload, its decoded value, and the residual.

    Args:
        payload: the bytes of an `.lcz` file.
        decoded: the differences that `decode_update` gives, bit for bit.
        residual: what was not sent, by name; empty without error feedback.
    """

    payload: bytes
    decoded: dict[str, Tensor]
    residual: dict[str, Tensor]


@torch.no_grad()
def encode_update(
    new: Tensors, reference: Tensors, codec: UpdateCodec, residual: Tensors | None = None
) -> EncodedUpdate:
    """Encode the difference of a model to the receiver's model.

    Args:
        new: the model as it is, by name.
        reference: the model that the receiver has, of the same names and shapes.
        codec: how.
        residual: what earlier updates did not send.

    Raises:
        UpdateError: naming the tensor, for a difference that is not finite.
        ValueError: when the names or shapes differ.

    >>> old, new = {"w": torch.zeros(2, 2)}, {"w": torch.tensor([[0.0, 0.1], [2.0, -0.2]])}
    >>> sent = encode_update(new, old, UpdateCodec(density=0.25, relative_step=1.0))
    >>> sent.decoded["w"].tolist(), round(sent.residual["w"].abs().max().item(), 3)
    ([[0.0, 0.0], [2.0, 0.0]], 0.2)
    """
    methods = codec.methods(reference)
    wanted = _differences(new, reference, methods, residual or {})
    hard = [name for name, method in methods.items() if method == "entropy"]
    grids = _entropy_grids({name: _masked(wanted, reference, name, codec) for name in hard}, codec)
    values = {name: _coded(name, wanted[name], methods[name], grids) for name in methods}
    values = _shared(values)
    decoded = {name: value.float() for name, value in values.items()}
    left = {name: wanted[name] - decoded[name] for name in methods} if codec.error_feedback else {}
    kept = {name: grid for name, (grid, _) in grids.items()}
    return EncodedUpdate(tensors_to_bytes(values, kept, codec.codec), decoded, left)


def decode_update(
    payload: bytes, reference: Tensors, codec: UpdateCodec, *, max_bytes: int | None = None
) -> dict[str, Tensor]:
    """Decode and validate the differences of a payload; nothing in it is executed.

    Args:
        payload: of `encode_update`.
        reference: the receiver's model.
        codec: of the sender.
        max_bytes: refuse longer payloads; None: the plain size of the tensors and 64 KiB.

    Raises:
        UpdateError: when the payload is damaged, oversized, not finite, or of another model.
    """
    methods = codec.methods(reference)
    like = {
        name: torch.empty(reference[name].shape, dtype=_DTYPES.get(method, torch.float32),
                          device="meta")
        for name, method in methods.items()
    }  # fmt: skip
    plain = sum(one.numel() * one.element_size() for one in like.values())
    most = plain + SPARE_BYTES if max_bytes is None else max_bytes
    if len(payload) > most:
        raise UpdateError(f"oversized: {len(payload)} bytes, above the limit of {most}")
    try:
        found = tensors_from_bytes(payload, like, max_bytes=max(plain, 1))
    except CorruptArtifactError as error:
        kind = "foreign" if "does not fit the module" in str(error) else "damaged"
        raise UpdateError(f"{kind}: {error}") from None
    decoded = {name: tensor.float() for name, tensor in found.items()}
    for name, tensor in decoded.items():
        if not tensor.isfinite().all():
            raise UpdateError(f"not finite: tensor {name!r} holds NaN or infinity")
    return decoded


@torch.no_grad()
def add_update(reference: Tensors, update: Tensors) -> dict[str, Tensor]:
    """A model after an update; both sides get the same bits. Variances stay at 0 or above.

    >>> add_update({"w": torch.ones(1)}, {"w": torch.ones(1)})["w"].item()
    2.0
    """
    found = dict(reference)
    for name in found.keys() & update.keys():
        total = found[name].float() + update[name]
        if name.endswith("running_var"):  # of BatchNorm: a quantized difference may overshoot
            total = total.clamp(min=0.0)
        found[name] = total.to(found[name].dtype)
    return found


def digest(tensors: Tensors) -> str:
    """Sixteen hexadecimal digits that stand for the values of all float tensors.

    >>> digest({"w": torch.zeros(1)}) == digest({"w": torch.zeros(1), "steps": torch.tensor(3)})
    True
    """
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hashed.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            hashed.update(content.numpy().tobytes())
    return hashed.hexdigest()[:16]


_DTYPES = {"fp16": torch.float16}


def _differences(
    new: Tensors, reference: Tensors, methods: Mapping[str, str], residual: Tensors
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in methods:
        if name not in new or new[name].shape != reference[name].shape:
            has = tuple(new[name].shape) if name in new else "missing"
            raise ValueError(f"tensor {name!r} is {has}, not {tuple(reference[name].shape)}")
        one = new[name].detach().cpu().float() - reference[name].detach().cpu().float()
        found[name] = one + residual[name] if name in residual else one
        if not found[name].isfinite().all():
            raise UpdateError(f"not finite: tensor {name!r} of the update: the training diverged")
    return found


def _masked(wanted: Tensors, reference: Tensors, name: str, codec: UpdateCodec) -> Tensor:
    return wanted[name] * (reference[name] != 0) if codec.mask else wanted[name]


def _coded(name: str, wanted: Tensor, method: str, grids: dict[str, tuple[Grid, Tensor]]) -> Tensor:
    """The values to store of one tensor; `grids` gets their grids."""
    if method == "eight_bits":
        grids[name] = _eight_bits(wanted)
    if name in grids:
        return grids[name][1]
    if method == "fp16":
        limit = torch.finfo(torch.float16).max
        return wanted.clamp(-limit, limit).half()
    return wanted


def _shared(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Equal tensors (tied weights have equal differences) become one, which is stored once."""
    seen: dict[tuple[object, ...], Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        key = (value.shape, value.dtype, value.numpy().tobytes())
        found[name] = seen.setdefault(key, value) if value.numel() > 1 else value
    return found


def _affine(step: float, bits: int) -> AffineGrid:
    scale = torch.tensor([step], dtype=torch.float32)
    return AffineGrid(scale, torch.zeros(1, dtype=torch.int32), bits, True, None)


def _on_grid(steps: Tensor, step: float) -> tuple[Grid, Tensor]:
    """The grid of the fewest bits that hold the steps, and the values."""
    largest = int(steps.abs().max()) if steps.numel() else 0
    grid = _affine(step, min(max(MIN_BITS, largest.bit_length() + 1), MAX_BITS))
    return grid, grid.dequantize(steps.int()) + 0.0  # -0.0 would not be on the grid


def _eight_bits(wanted: Tensor) -> tuple[Grid, Tensor]:
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    step = _usable(largest / (2 ** (MAX_BITS - 1) - 1))
    return _on_grid((wanted / step).round(), step)


def _usable(step: float) -> float:
    return step if step > torch.finfo(torch.float32).tiny else 1.0


def _entropy_grids(wanted: Tensors, codec: UpdateCodec) -> dict[str, tuple[Grid, Tensor]]:
    kept = kept_by_magnitude(wanted, codec.density, codec.scope)
    shared = _rms(kept) if codec.scope == "global" else None
    found: dict[str, tuple[Grid, Tensor]] = {}
    most = 2 ** (codec.bits - 1) - 1
    for name, values in kept.items():
        rms = _rms({name: values}) if shared is None else shared
        largest = float(values.abs().max()) if values.numel() else 0.0
        step = _usable(max(codec.relative_step * rms, largest / most))
        if codec.lmbda > 0:
            steps = rate_distortion_steps(values / step, codec.lmbda)
        else:
            steps = (values / step).round()
        found[name] = _on_grid(steps.clamp(-most, most), step)
    return found


def _rms(tensors: Tensors) -> float:
    """Root mean square of all values that are not 0."""
    count = sum(int(torch.count_nonzero(one)) for one in tensors.values())
    square = sum(float(one.double().square().sum()) for one in tensors.values())
    return math.sqrt(square / count) if count else 0.0


def kept_by_magnitude(tensors: Tensors, density: float, scope: str = "global") -> dict[str, Tensor]:
    """The tensors with all but the largest `density` of their values set to 0, exactly so many.

    >>> kept_by_magnitude({"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([1.0])}, 0.3)
    {'a': tensor([ 0., -4.]), 'b': tensor([0.])}
    """
    if density >= 1 or not tensors:
        return dict(tensors)
    if scope == "layer":
        return {
            name: kept_by_magnitude({name: one}, density)[name] for name, one in tensors.items()
        }
    flat = torch.cat([one.reshape(-1) for one in tensors.values()])
    top = flat.abs().topk(math.ceil(density * flat.numel()), sorted=False).indices
    kept = torch.zeros_like(flat)
    kept[top] = flat[top]
    pieces = kept.split([one.numel() for one in tensors.values()])
    return {
        name: piece.reshape(one.shape)
        for (name, one), piece in zip(tensors.items(), pieces, strict=True)
    }


def rate_distortion_steps(scaled: Tensor, lmbda: float) -> Tensor:
    """Steps from 0 that minimize squared error + lmbda * bits, among the nearest, one less, and 0.

    Bits are `-log2` of the frequency of the size, and one for the sign, of the choice before.

    Args:
        scaled: values in units of the step.
        lmbda: squared steps that a bit is worth.

    >>> rate_distortion_steps(torch.tensor([0.1, 0.2, 0.6, 0.1, 3.4]), 0.2)
    tensor([0., 0., 0., 0., 3.])
    """
    size = scaled.abs()
    nearest = size.round()
    choices = torch.stack([nearest, (nearest - 1).clamp(min=0), torch.zeros_like(nearest)])
    error = (choices - size).square()
    chosen = nearest
    for _ in range(_ROUNDS):
        counts = torch.bincount(chosen.long().reshape(-1), minlength=int(nearest.max()) + 1)
        bits = -((counts + 0.5) / (counts.sum() + 0.5 * len(counts))).log2()
        bits[1:] += 1
        best = (error + lmbda * bits[choices.long()]).argmin(0, keepdim=True)
        chosen = choices.gather(0, best)[0]
    return chosen * scaled.sign()
