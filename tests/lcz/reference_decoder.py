"""A decoder written from docs/format.md alone: plain Python, slow, without the package."""

import hashlib
import itertools
import json
import math
import struct
import zlib
from collections import defaultdict

WORDS = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex64": 8, "complex128": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8,
    "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
ENDS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 22, 30, 40, 54, 73, 99, 134, 181, 256)
M64 = (1 << 64) - 1


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, length):
        self.at += length
        assert self.at <= len(self.data)
        return self.data[self.at - length : self.at]

    def varint(self):
        value, shift, byte = 0, 0, 128
        while byte >= 128:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
        return value

    def rest(self):
        return self.take(len(self.data) - self.at)


def read_file(data):
    """The header's rows by name, each with its words (or steps on a grid) and grid values."""
    assert data[:8] == b"\x89LCZ\r\n\x1a\n"
    version, flags, crc, stored, plain = struct.unpack_from("<HHIQQ", data, 8)
    assert (version, flags >> 1) == (2, 0)
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]
    header = data[32 : 32 + stored]
    assert zlib.crc32(header) == crc
    header = zlib.decompress(header) if flags else header
    assert len(header) == plain
    header = json.loads(header)
    found, at = read_rows(header["tensors"], data, 32 + stored)
    for graph in header.get("graphs", []):
        model = zlib.decompress(data[at : at + graph["l"]])
        assert len(model) == graph["p"]
        own, at = read_rows(graph["tensors"], data, at + graph["l"])
        found["graph", graph["n"]] = assemble(model, graph["i"], found, list(own.values()))
    assert at == len(data) - 32
    return found


def read_rows(rows, data, at):
    found = {}
    for row in rows:
        aux, symbols = row.get("a", 0), row.get("l", 0)
        if row.get("k") == "tied":
            found[row["n"]] = row
        else:
            found[row["n"]] = row | decode_row(row, data[at : at + aux], data[at + aux :][:symbols])
        at += aux + symbols
    return found, at


def assemble(model, gaps, found, own):
    """The ONNX model: what was left out of it, put back."""
    out, at = b"", 0
    for gap in gaps:
        out += model[at : at + gap["a"]]
        at += gap["a"]
        out += fill(gap, found[gap["t"]] if "t" in gap else own.pop(0))
    assert not own
    return out + model[at:]


def fill(gap, row):
    if "d" not in gap:
        size = min(WORDS[row["d"]], 8)
        words = arrange([word.to_bytes(size, "little") for word in words_of(row)], gap)
        return b"".join(words)
    numbers = row["steps"] if "steps" in row else signed(row)
    if gap.get("s"):
        axis, *turned = gap["s"]
        inner = math.prod(row["s"][axis + 1 :])
        turned = [i // inner % row["s"][axis] in turned for i in range(len(numbers))]
        numbers = [-n if turn else n for n, turn in zip(numbers, turned, strict=True)]
    numbers = [n * gap.get("m", 1) + gap.get("o", 0) for n in arrange(numbers, gap)]
    if gap["d"].endswith("int4"):
        low = [n & 15 for n in numbers] + [0] * (len(numbers) % 2)
        return bytes(a | b << 4 for a, b in zip(low[::2], low[1::2], strict=True))
    size = int(gap["d"].strip("uint")) // 8
    return b"".join(n.to_bytes(size, "little", signed=gap["d"][0] == "i") for n in numbers)


def words_of(row):
    """The bit patterns of a row's values, in its dtype; grids here are of float32."""
    if "words" in row:
        assert "f" not in row
        return row["words"]
    assert row["d"] == "float32"
    middle = row["floats"].index(0.0) if len(row["q"]) == 1 else 0
    along = math.prod(row["s"][row["q"][2] + 1 :]) if len(row["q"]) == 3 else 0
    values = []
    for at, step in enumerate(row["steps"]):
        scale = row["floats"][at // along % len(row["floats"]) if along else 0]
        values.append(row["floats"][middle + step] if len(row["q"]) == 1 else step * scale)
    return [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]


def signed(row):
    assert row["d"] in ("int8", "uint8")
    return [w - 256 if row["d"] == "int8" and w > 127 else w for w in row["words"]]


def arrange(values, gap):
    """Seen in a box, its axes in another order, some of them backwards."""
    if not gap.get("b"):
        return values
    box, order, backwards = gap["b"], gap["x"], gap.get("f", [])
    strides = [math.prod(box[axis + 1 :]) for axis in range(len(box))]
    ranges = [
        range(box[axis])[:: -1 if index in backwards else 1] for index, axis in enumerate(order)
    ]
    return [
        values[sum(i * strides[axis] for i, axis in zip(place, order, strict=True))]
        for place in itertools.product(*ranges)
    ]


def decode_row(row, aux, symbols):
    kind, size = row.get("k", "plain"), WORDS[row.get("f", row["d"])]
    count = math.prod(row["s"]) * (2 if row["d"] == "complex128" else 1)
    shape = row["s"] if row["d"] != "complex128" else [count]
    if kind == "plain":
        return {"words": unpack(row["p"], aux, count, size)}
    decoded = decode(row["c"], symbols, shape)
    steps = [-((s + 1) // 2) if s % 2 else s // 2 for s in decoded]
    if kind == "codebook":
        book = unpack("bytes", aux[1:], (len(aux) - 1) // size, size)
        return {"words": [book[aux[0] + step] for step in steps]}
    if kind == "mask":
        values = iter(unpack(row["p"], aux, decoded.count(1), size))
        return {"words": [next(values) if s == 1 else (s >> 1) << 8 * size - 1 for s in decoded]}
    return {"steps": steps, **grid_values(row, aux)}


def grid_values(row, aux):
    grid = row["q"]
    if len(grid) == 1:
        return {"floats": floats(unpack(row["p"], aux, grid[0], 4))}
    count = row["s"][grid[2]] if len(grid) == 3 else 1
    zeros = [] if grid[1] else list(aux[:count])
    return {"zeros": zeros, "floats": floats(unpack(row["p"], aux[len(zeros) :], count, 4))}


def floats(words):
    return [struct.unpack("<f", struct.pack("<I", word))[0] for word in words]


def unpack(packing, data, count, size):
    if packing == "bytes":
        assert len(data) == count * size
        return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    if packing == "octaves":
        reader = Reader(data)
        least = int.from_bytes(reader.take(2), "little", signed=True)
        over = [0] if count == 1 else plane_of(reader, count)
        assert not reader.rest()
        values = [2.0 ** ((least + one) // 16) * sixteenth((least + one) % 16) for one in over]
        return [struct.unpack("<I", struct.pack("<f", value))[0] for value in values]
    if packing == "planes":
        plain = zlib.decompress(data)
        planes = [plain[i * count : (i + 1) * count] for i in range(size)]
    else:
        reader = Reader(data)
        planes = [plane_of(reader, count) for _ in range(size)]
        assert not reader.rest()
    return [sum(plane[i] << 8 * j for j, plane in enumerate(planes)) for i in range(count)]


def plane_of(reader, count):
    length = reader.varint()
    if not length:
        return reader.take(count)
    return [(s - 1) // 2 | (s & 1) << 7 for s in context(reader.take(length), [count])]


def sixteenth(j):
    return struct.unpack("<f", struct.pack("<f", 2 ** (j / 16)))[0]


def decode(codec, data, shape):
    count = math.prod(shape)
    if not count:
        return []
    coders = {"raw": raw, "huffman": huffman, "rle_huffman": runs, "relative_index": relative}
    if codec == "context":
        return context(data, shape)
    return {**coders, "arithmetic": arithmetic}[codec](data, count)


def bits_of(data):
    return "".join(f"{byte:08b}" for byte in data)


def raw(data, count):
    width, bits = data[0], bits_of(data[1:])
    return [int(bits[i * width : (i + 1) * width] or "0", 2) for i in range(count)]


def huffman(data, count):
    reader = Reader(data)
    size, spare, lengths = reader.varint(), [], []

    def nibble():
        if not spare:
            byte = reader.take(1)[0]
            spare.extend([byte & 15, byte >> 4])
        return spare.pop()

    while len(lengths) < size:
        length = nibble()
        lengths += [length] if length else [0] * (nibble() + 1)
    used = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    if len(used) == 1:
        return [used[0][1]] * count
    codes, code, before = {}, 0, 0
    for length, symbol in used:
        code <<= length - before
        codes[f"{code:0{length}b}"] = symbol
        code, before = code + 1, length
    reader.take(2 * ((count - 1) // 1024))
    out, word = [], ""
    for bit in bits_of(reader.rest()):
        word += bit
        if word in codes and len(out) < count:
            out.append(codes[word])
            word = ""
    assert len(out) == count
    return out


def runs(data, count):
    reader = Reader(data)
    if not (kept := reader.varint()):
        return [0] * count
    length = reader.varint()
    gaps = huffman(reader.take(reader.varint()), length)
    values = iter(huffman(reader.rest(), kept))
    out = []
    for gap in gaps:
        out += [0] * gap if gap == 255 else [0] * gap + [next(values) + 1]
    return out + [0] * (count - len(out))


def relative(data, count):
    reader = Reader(data)
    out, at = [0] * count, -1
    if not (length := reader.varint()):
        return out
    assert reader.take(1)[0] in (5, 8)
    distances = huffman(reader.take(reader.varint()), length)
    for distance, value in zip(distances, huffman(reader.rest(), length), strict=True):
        at += distance + 1
        out[at] = value
    return out


class RangeDecoder:
    def __init__(self, data):
        data += bytes(-len(data) % 4)
        self.words = iter(struct.unpack(f"<{len(data) // 4}I", data))
        self.low, self.range = 0, M64
        self.point = self.next() << 32 | self.next()

    def next(self):
        return next(self.words, 0)

    def decode(self, lefts):
        """The symbol, given where each begins, and 2^24 at the end."""
        scale = self.range >> 24
        quantile = (self.point - self.low & M64) // scale
        assert quantile < 1 << 24
        symbol = max(i for i, left in enumerate(lefts[:-1]) if left <= quantile)
        self.low = self.low + scale * lefts[symbol] & M64
        self.range = scale * (lefts[symbol + 1] - lefts[symbol])
        if self.range < 1 << 32:
            self.low, self.range = self.low << 32 & M64, self.range << 32
            self.point = (self.point << 32 & M64) | self.next()
        return symbol


def arithmetic(data, count):
    reader = Reader(data)
    frequencies = [reader.varint() for _ in range(reader.varint())]
    assert sum(frequencies) == 65536
    if frequencies[-1] == 65536:
        return [len(frequencies) - 1] * count
    size, below = len(frequencies), [0, *itertools.accumulate(frequencies)]
    lefts = [below[s] * ((1 << 24) - size) // 65536 + s for s in range(size)] + [1 << 24]
    coder = RangeDecoder(reader.rest())
    return [coder.decode(lefts) for _ in range(count)]


def log(value):
    exponent = value.bit_length() - 1
    fraction = (value << 10 >> exponent) - 1024
    return 256 * exponent + round(256 * math.log2(1 + fraction / 1024))


class Context:
    """One stream: positions scan by scan, and counts of each plane."""

    def __init__(self, data, count):
        reader = Reader(data)
        self.b, self.c = reader.varint(), reader.varint()
        self.a = count // (self.b * self.c)
        lengths = (self.a, self.b, self.c)
        self.exponents = reader.take(1)[0]
        self.tables = [
            axes
            for axes in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
            if all(lengths[axis] > 1 for axis in axes)
            and 4 * math.prod(lengths[axis] for axis in axes) <= count
        ]
        names = ["zero", "sign", *(f"e{i}" for i in range(self.exponents))]
        names += [f"b{i + 1}" for i in range(self.exponents)]
        self.weights = {name: self.read_weights(reader) for name in names}
        self.counts = {name: defaultdict(lambda: [0, 0]) for name in names}
        self.coder = RangeDecoder(reader.rest())

    def read_weights(self, reader):
        if not self.tables:
            return {}
        mask = reader.take(1)[0]
        used = [axes for t, axes in enumerate(self.tables) if mask >> t & 1]
        return {axes: struct.unpack("b", reader.take(1))[0] for axes in used}

    def slabs(self):
        """Lists of scans of positions."""
        step = max((1 << 22) // (self.b * self.c), 1)
        for start in range(0, self.a, step):
            scans = [[] for _ in ENDS]
            box = (range(start, min(start + step, self.a)), range(self.b), range(self.c))
            for a, b, c in itertools.product(*box):
                u = a * 0xD1B54A33 + b * 0xABC98388 + c * 0x8CB92BA7 & 0xFFFFFFFF
                scans[next(w for w, end in enumerate(ENDS) if end > u >> 24)].append((a, b, c))
            yield scans

    def plane(self, name, scans, node=lambda place: 0):
        """The decision at each position."""
        found, counts = {}, self.counts[name]
        for scan in scans:
            for place in scan:
                chance = self.chance(name, place, node(place))
                left = ((1 << 20) - chance) * ((1 << 24) - 2) >> 20
                found[place] = self.coder.decode([0, left + 1, 1 << 24])
            for place in scan:
                counts["all"][found[place]] += 1
                counts["node", node(place)][found[place]] += 1
                for axes in self.weights[name]:
                    counts[(axes, *(place[axis] for axis in axes))][found[place]] += 1
        return found

    def chance(self, name, place, node):
        counts = self.counts[name]
        zeros, ones = counts["node", node]
        logit = log(2 * ones + 1) - log(2 * zeros + 1)
        zeros, ones = counts["all"]
        h = min(max((2 * ones + 1) * 32768 // (ones + zeros + 1), 1), 65535)
        g = 65536 - h
        total = 0
        for axes, weight in self.weights[name].items():
            zeros, ones = counts[(axes, *(place[axis] for axis in axes))]
            feature = log((ones << 16) + 6 * h) - log(6 * h)
            total += weight * (feature - log((zeros << 16) + 6 * g) + log(6 * g))
        logit = min(max(logit + total // 32, -4096), 4096)
        return round(2**20 / (1 + 2 ** (-logit / 256)))


def kept(scans, keep):
    return [[place for place in scan if keep(place)] for scan in scans]


def context(data, shape):
    count = math.prod(shape)
    stream, out = Context(data, count), [0] * count
    for scans in stream.slabs():
        some = stream.plane("zero", scans)
        scans = kept(scans, lambda place, some=some: some[place])
        sign = stream.plane("sign", scans)
        exponent = dict.fromkeys(sign, 0)
        alive = scans
        for e in range(stream.exponents):
            above = stream.plane(f"e{e}", alive)
            alive = kept(alive, lambda place, above=above: above[place])
            exponent |= {place: e + 1 for scan in alive for place in scan}
        size = dict.fromkeys(sign, 1)
        for i in range(1, stream.exponents + 1):
            deep = kept(scans, lambda place, i=i, x=exponent: x[place] >= i)
            node = lambda place, x=exponent, m=size: (x[place], m[place])  # noqa: E731
            for place, bit in stream.plane(f"b{i}", deep, node).items():
                size[place] = 2 * size[place] + bit
        for (a, b, c), m in size.items():
            out[(a * stream.b + b) * stream.c + c] = 2 * m - sign[a, b, c]
    return out
