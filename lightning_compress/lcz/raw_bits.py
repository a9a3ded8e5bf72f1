"""Bit patterns of tensors, and the packing of patterns that are not coded as symbols.

Only the conversion between tensors and patterns needs torch.
"""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_compress.errors import CorruptArtifactError
from lightning_compress.lcz import context
from lightning_compress.lcz.bits import ByteReader, count_values, map_in_chunks, varint
from lightning_compress.lcz.context_model import View

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "DTYPES", "PACKINGS", "Dtype", "dtype_name", "from_patterns", "inflate", "pack_patterns",
    "patterns", "unpack_memory", "unpack_patterns", "without_negative_zeros", "word_size",
]  # fmt: skip


class Dtype(NamedTuple):
    """Dtype as the format knows it: bytes of an element, and the kind of number."""

    itemsize: int
    is_floating_point: bool = False
    is_complex: bool = False
    is_signed: bool = True


# By the name that torch has for it.
DTYPES: dict[str, Dtype] = {
    "float64": Dtype(8, is_floating_point=True),
    "float32": Dtype(4, is_floating_point=True),
    "float16": Dtype(2, is_floating_point=True),
    "bfloat16": Dtype(2, is_floating_point=True),
    "float8_e4m3fn": Dtype(1, is_floating_point=True),
    "float8_e5m2": Dtype(1, is_floating_point=True),
    "complex64": Dtype(8, is_complex=True),
    "complex128": Dtype(16, is_complex=True),
    "int64": Dtype(8),
    "int32": Dtype(4),
    "int16": Dtype(2),
    "int8": Dtype(1),
    "uint64": Dtype(8, is_signed=False),
    "uint32": Dtype(4, is_signed=False),
    "uint16": Dtype(2, is_signed=False),
    "uint8": Dtype(1, is_signed=False),
    "bool": Dtype(1, is_signed=False),
}
PACKINGS = ("bytes", "planes", "coded", "octaves")
# Mantissa bits of the float32 nearest to 2^(i/16), i from 0 to 15; rising.
_SIXTEENTHS = np.exp2(np.arange(16) / 16).astype(np.float32).view(np.uint32) & 0x7FFFFF
_FIRST_OCTAVE = 127  # the exponent bits of 1.0
_PLANE_HEAD = 4  # bytes of a coded plane before its first bit: its length, and its stream's head
_SAMPLE = 16  # words that show most floats to be no sixteenths of an octave

Patterns = NDArray[np.unsignedinteger]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as the file spells it.

    >>> import torch
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def word_size(dtype: Dtype | torch.dtype) -> int:
    """Bytes of one pattern: an element, or half of one for complex128."""
    return min(dtype.itemsize, 8)


def patterns(tensor: Tensor) -> Patterns:
    """(N,) the bits of a tensor's elements as unsigned numbers: -0.0 and NaNs are kept.

    >>> import torch
    >>> patterns(torch.tensor([0.0, -0.0, 1.0]))
    array([         0, 2147483648, 1065353216], dtype=uint32)
    """
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{word_size(tensor.dtype)}")


def without_negative_zeros(tensor: Tensor) -> Tensor:
    """The same values with 0.0 in place of -0.0, which `weight * mask` leaves; equal to them.

    >>> import torch
    >>> without_negative_zeros(torch.tensor([-0.0, -1.0])).signbit().tolist()
    [False, True]
    """
    import torch

    if tensor.is_complex():
        return torch.view_as_complex(
            without_negative_zeros(torch.view_as_real(tensor.resolve_conj()))
        )
    if not tensor.is_floating_point():
        return tensor
    bits = patterns(tensor)
    minus = bits == 1 << 8 * bits.itemsize - 1
    if not minus.any():
        return tensor
    return from_patterns(
        np.where(minus, 0, bits).astype(bits.dtype), tensor.dtype, tuple(tensor.shape)
    )


def from_patterns(bits: Patterns, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The opposite of `patterns`; `bits` must be writable and is shared.

    Raises:
        CorruptArtifactError: for a bool that is neither 0 nor 1.
    """
    import torch

    if dtype is torch.bool and bits.max(initial=0) > 1:
        raise CorruptArtifactError(f"a bool of {bits.max()}")
    if not len(bits):  # an empty array has strides that no other dtype can view
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(bits.view(np.uint8)).view(dtype).reshape(shape)


def pack_patterns(
    bits: Patterns, *, coded: bool = True, most: int | None = None
) -> tuple[str, bytes]:
    """The smallest of plain bytes, deflated or coded byte planes, and octaves, and its name.

    A plane holds one byte of every element: sign and exponent of like-sized weights repeat.
    Octaves are float32 that are all powers of 2^(1/16), such as the steps of rate-distortion grids.

    Args:
        bits: (N,) patterns.
        coded: try coded planes too, which are slower.
        most: bytes above which the caller does not use the result; None: any size.
    """
    planes = bits.view(np.uint8).reshape(-1, bits.itemsize).T
    forms = {"bytes": bits.tobytes(), "planes": zlib.compress(planes.tobytes(), 6)}
    if coded and len(bits):
        limit = min(len(form) for form in forms.values())
        limit = limit if most is None else min(limit, most)
        entropies = [_entropy(plane) for plane in planes]
        # A plane has one axis, so no tables: its order 0 entropy is what coding can come down to.
        if max(sum(entropies), 8 * _PLANE_HEAD * len(planes)) < 8 * limit:
            pairs = zip(planes, entropies, strict=True)
            forms["coded"] = b"".join(_code_plane(*pair) for pair in pairs)
    if (octaves := _pack_octaves(bits)) is not None:
        forms["octaves"] = octaves
    name = min(forms, key=lambda name: len(forms[name]))
    return name, forms[name]


def _pack_octaves(bits: Patterns) -> bytes | None:
    """Float32 words that are all 2^(k/16): the smallest k, and a coded plane of the rest over it.

    Returns:
        None where they are not, or reach over more than sixteen octaves.
    """
    if bits.itemsize != 4 or not len(bits):
        return None
    for some in (bits[:_SAMPLE], bits):
        places = np.searchsorted(_SIXTEENTHS, some & 0x7FFFFF).clip(max=15)
        exponents = (some >> 23).astype(np.int64)  # with the sign, which has to be 0
        if (_SIXTEENTHS[places] != some & 0x7FFFFF).any() or not _is_normal(exponents):
            return None
    sixteenths = 16 * (exponents - _FIRST_OCTAVE) + places
    least = int(sixteenths.min())
    if int(sixteenths.max()) - least > 255:
        return None
    data = least.to_bytes(2, "little", signed=True)
    if len(bits) == 1:
        return data
    plane = (sixteenths - least).astype(np.uint8)
    return data + _code_plane(plane, _entropy(plane))


def _is_normal(exponents: NDArray[np.int64]) -> bool:
    return bool(((exponents > 0) & (exponents < 255)).all())


def _unpack_octaves(data: bytes, count: int) -> Patterns:
    reader = ByteReader(data)
    least = int.from_bytes(
        reader.take(2, "the least of sixteenths of an octave"), "little", signed=True
    )
    over = np.zeros(1, np.uint8) if count == 1 else _decode_plane(reader, count)
    if reader.rest():
        raise CorruptArtifactError("bytes after the end of sixteenths of an octave")
    return map_in_chunks(partial(_octave_words, least=least), over, np.uint32)


def _octave_words(over: NDArray[np.uint8], least: int) -> Patterns:
    """Float32 words of 2^(k/16), given what each k is over the least one."""
    sixteenths = least + over.astype(np.int64)
    exponents = sixteenths // 16 + _FIRST_OCTAVE
    if not _is_normal(exponents):
        raise CorruptArtifactError("a sixteenth of an octave that is no float32")
    words = exponents.astype(np.uint32) << np.uint32(23)
    return (words | _SIXTEENTHS[sixteenths % 16]).astype(np.uint32)


def _entropy(plane: NDArray[np.uint8]) -> float:
    """Zero-order entropy of a plane in bits; 8 a byte where learning would cost more."""
    counts = count_values(plane)
    counts = counts[counts > 0]
    entropy = float(counts @ np.log2(len(plane) / counts))
    learnt = entropy + 0.5 * len(counts) * math.log2(len(plane) + 1)
    return entropy if learnt <= 8 * len(plane) else 8.0 * len(plane)


def _code_plane(plane: NDArray[np.uint8], entropy: float) -> bytes:
    """The length of a context-coded plane and the stream, or 0 and the plain bytes.

    A byte's top bit, which is the sign in the last plane of floats, is coded as a symbol's sign.
    """
    if entropy >= 8 * len(plane):
        return varint(0) + plane.tobytes()
    low = (plane & 127).astype(np.uint16)
    symbols = (2 * (low + 1) - (plane >> 7)).astype(np.uint16)
    coded = context.encode(symbols, plane.shape)
    if len(coded) < len(plane):
        return varint(len(coded)) + coded
    return varint(0) + plane.tobytes()


def _decode_plane(reader: ByteReader, count: int) -> NDArray[np.uint8]:
    length = reader.varint(limit=count, what="the length of a coded plane")
    if not length:
        return np.frombuffer(reader.take(count, "a plane"), np.uint8)
    symbols = context.decode(reader.take(length, "a coded plane"), (count,), one_axis=True)
    if symbols.min() < 1 or symbols.max() > 256:
        raise CorruptArtifactError("a coded plane holds a symbol that is no byte")
    return map_in_chunks(lambda piece: (piece - 1) // 2 | (piece & 1) << 7, symbols, np.uint8)


def unpack_patterns(packing: str, data: bytes, count: int, size: int) -> Patterns:
    """The (count,) patterns of `size` bytes each that `pack_patterns` packed.

    Raises:
        CorruptArtifactError: when the data do not hold just that many.
    """
    if packing == "planes":
        planes = np.frombuffer(inflate(data, count * size), np.uint8).reshape(size, count)
        return planes.T.copy().reshape(-1).view(f"<u{size}")
    if packing == "octaves" and count and size == 4:
        return _unpack_octaves(data, count)
    if packing == "coded" and count:
        reader = ByteReader(data)
        words = np.empty((count, size), np.uint8)
        for byte in range(size):
            words[:, byte] = _decode_plane(reader, count)
        if reader.rest():
            raise CorruptArtifactError("bytes after the end of coded planes")
        return words.reshape(-1).view(f"<u{size}")
    if len(data) != count * size:
        raise CorruptArtifactError(f"{len(data)} bytes where {count * size} belong")
    return np.frombuffer(bytearray(data), f"<u{size}")


def unpack_memory(packing: str, count: int) -> int:
    """Memory in bytes to unpack coded planes of `count` symbols, beside the symbols."""
    coded = packing in ("coded", "octaves") and count > 0
    return context.slab_memory(View(count, 1, 1)) if coded else 0


def inflate(data: bytes, length: int) -> bytes:
    """Inverse of `zlib.compress` that never allocates more than the `length` bytes expected.

    Raises:
        CorruptArtifactError: when the data are damaged or of another length.

    >>> inflate(zlib.compress(b"abc"), 3)
    b'abc'
    """
    engine = zlib.decompressobj()
    try:
        plain = engine.decompress(data, length + 1)
    except zlib.error as error:
        raise CorruptArtifactError(f"deflated bytes are damaged: {error}") from None
    if len(plain) != length or not engine.eof or engine.unused_data:
        raise CorruptArtifactError(f"deflated bytes do not hold just {length} bytes")
    return plain
