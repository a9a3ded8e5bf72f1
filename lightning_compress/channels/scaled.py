"""Means over channels: what changes by a known factor when channels go, and what makes up for it.

A mean of squares over n channels, some of them 0, becomes n / n' times as large when n' are left.
So RMSNorm and pixel norm give values that are sqrt(n' / n) times what they were: a power of the
ratio, which a weight that multiplies or reads them takes back. Such an event and its power are
followed from the mean to that weight; where anything else meets them, the channels stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_compress.channels.own_sizes import own_sizes
from lightning_compress.channels.trace import Nodes, Trace, tensors_in

__all__ = ["absorb", "carry", "keeps_zero", "normalized", "refuse", "spread_tags", "summed"]

_ADDED = 1e-3  # what is added to a mean is small beside it: an epsilon; a trial says how small
_HOMOGENEOUS = frozenset(
    """
    __abs__ __neg__ abs absolute bfloat16 clone contiguous cpu cuda data detach double dropout
    dropout1d dropout2d dropout3d feature_dropout float half leaky_relu neg negative relu
    requires_grad_ rrelu to type type_as
    """.split()  # noqa: SIM905
)
_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}
_TIMES = frozenset(("mul", "multiply", "__mul__", "__rmul__", "__imul__"))
_OVER = frozenset(
    "div divide true_divide __div__ __truediv__ __idiv__ __itruediv__".split()  # noqa: SIM905
)
_PLUS = frozenset(
    "add sub subtract __add__ __radd__ __iadd__ __sub__ __isub__ rsub __rsub__".split()  # noqa: SIM905
)
_FLOORED = frozenset(("clamp", "clamp_min", "maximum", "clip"))
_ZERO_KEEPING = _HOMOGENEOUS | frozenset(
    """
    __pow__ celu ceil elu erf expm1 floor fmod gelu hardshrink hardswish int log1p long mish
    nan_to_num pow relu6 round selu sign silu sin softshrink softsign sqrt square tan tanh
    tanhshrink trunc zeros_like
    """.split()  # noqa: SIM905
)
_TIMED = frozenset(("addcmul", "addcdiv"))


def keeps_zero(trace: Trace, name: str, args: Any, kwargs: Any, back: int) -> bool:
    """Whether channels that are 0 in what a function is given are 0 in what it gives.

    Args:
        trace: the run.
        name: of a function that treats each channel by itself.
        args: of the call.
        kwargs: of the call.
        back: the axis, counted from the last.
    """
    operands = tensors_in((args, kwargs))
    zero = [_is_zero(trace, one, back) for one in operands]
    if name in _TIMES:
        return any(zero)
    if name in _OVER:
        return isinstance(args[0], Tensor) and _is_zero(trace, args[0], back)
    if name in _PLUS:
        numbers = [one for one in args[:2] if not isinstance(one, Tensor) and one != 0]
        return all(zero) and not numbers
    return name in _ZERO_KEEPING and all(zero)


def _is_zero(trace: Trace, tensor: Tensor, back: int) -> bool:
    nodes = trace.axes(tensor)[-back] if tensor.dim() >= back else None
    return nodes is not None and not trace.dependencies.nonzero.intersection(nodes.tolist())


def summed(trace: Trace, nodes: Nodes, how: str, power: float, out: Tensor) -> bool:
    """Follow a sum (power 0) or mean (power 1) over channels; False where they are not 0.

    Args:
        trace: the run.
        nodes: of the channels.
        how: the name of the function.
        power: of the ratio n / n' that it grows by.
        out: the tensor that it gives.
    """
    dependencies = trace.dependencies
    if dependencies.nonzero.intersection(nodes.tolist()) or _tags(trace, nodes):
        return False
    trace.set_tag(out, (dependencies.new_event(nodes, f"{how} is taken over them"), power))
    return True


def normalized(trace: Trace, nodes: Nodes, how: str, weight: str | None, power: float) -> Nodes:
    """Nodes of channels that were divided by a norm over them, and multiplied with a weight."""
    dependencies = trace.dependencies
    if dependencies.nonzero.intersection(nodes.tolist()) or _tags(trace, nodes):
        dependencies.fix(nodes, f"{how} is taken over them")
    event = dependencies.new_event(nodes, f"{how} is taken over them")
    if weight is not None:
        dependencies.use(weight, 0, nodes, "through")
        dependencies.scale(weight, 0, np.arange(len(nodes)), event, power)
        return nodes
    return spread_tags(trace, nodes, event, power)


def spread_tags(trace: Trace, nodes: Nodes, event: int, power: float) -> Nodes:
    """New nodes, connected to others, whose values change by a power of an event's ratio."""
    dependencies = trace.dependencies
    before = [dependencies.tags.get(one) for one in nodes.tolist()]
    fresh = dependencies.new_nodes(len(nodes), dependencies.events[event].how)
    dependencies.connect(nodes, fresh)
    dependencies.nonzero.update(
        new for old, new in zip(nodes.tolist(), fresh.tolist(), strict=True)
        if old in dependencies.nonzero
    )  # fmt: skip
    for node, tag in zip(fresh.tolist(), before, strict=True):
        if tag is not None and tag[1] and tag[0] != event:
            _give_up(trace, [tag[0], event])
        dependencies.tags[node] = (event, power + (tag[1] if tag and tag[0] == event else 0.0))
    return fresh


def _tags(trace: Trace, nodes: Nodes | None) -> set[tuple[int, float]]:
    """What changes of the values of nodes: events with a power that is not 0."""
    known = trace.dependencies.tags
    if nodes is None or not known:
        return set()
    found = {known.get(one, (-1, 0.0)) for one in nodes.tolist()}
    return {one for one in found if one[1]}


def _all_tags(trace: Trace, tensor: Tensor) -> set[tuple[int, float]]:
    tag = trace.tag_of(tensor)
    found = set() if tag is None or not tag[1] else {tag}
    for nodes in trace.axes(tensor) if trace.dependencies.tags else ():
        found |= _tags(trace, nodes)
    return found


def _give_up(trace: Trace, events: Any) -> None:
    for event in events:
        one = trace.dependencies.events[event]
        trace.dependencies.fix(one.nodes, one.how)


def refuse(trace: Trace, tree: Any) -> None:
    """Keep the channels whose mean changes something that is read where nothing makes up for it."""
    if not trace.dependencies.events:
        return
    for one in tensors_in(tree):
        _give_up(trace, {event for event, _ in _all_tags(trace, one)})


def absorb(trace: Trace, path: str, dim: int, nodes: Nodes | None) -> None:
    """Let a weight that reads nodes make up for the events that change them."""
    dependencies = trace.dependencies
    for event, power in sorted(_tags(trace, nodes)):
        assert nodes is not None
        places = [at for at, one in enumerate(nodes.tolist())
                  if dependencies.tags.get(one) == (event, power)]  # fmt: skip
        dependencies.scale(path, dim, np.array(places), event, power)


def carry(trace: Trace, name: str, args: Any, kwargs: Any, out: Any) -> bool:
    """Follow events through a function that treats each channel by itself.

    Returns:
        Whether the nodes of its output are set.
    """
    operands = tensors_in((args, kwargs))
    found = [_all_tags(trace, one) for one in operands]
    tagged = [trace.tag_of(one) for one in operands]
    if not any(found) and not any(tagged) and not _pending(trace, operands):
        return False
    result = tensors_in(out)[0] if tensors_in(out) else None
    short = name.rstrip("_") if not name.startswith("__") else name
    if result is None:
        return False
    bare = [all(one is None for one in trace.axes(each)) for each in operands]
    if any(tagged) and all(tag is not None or each for tag, each in zip(tagged, bare, strict=True)):
        tag = _of_sums(trace, short, args, operands)
        if tag is None:
            _give_up(trace, {event for one in found for event, _ in one})
        else:
            trace.set_tag(result, tag)
        return False
    if _through(trace, short, args, operands, result):
        return True
    if not _passes(trace, short, args, operands):
        _give_up(trace, {event for one in found for event, _ in one})
    return False


def _pending(trace: Trace, operands: list[Tensor]) -> bool:
    """Whether an event of power 0 is under way: its ratio may yet come in as a number."""
    known = trace.dependencies.tags
    return bool(known) and any(
        nodes is not None and any(one in known for one in nodes.tolist())
        for each in operands
        for nodes in trace.axes(each)
    )


def _of_sums(
    trace: Trace, name: str, args: Any, operands: list[Tensor]
) -> tuple[int, float] | None:
    """The event and power of a function of sums over channels; None where there is none."""
    tags = [trace.tag_of(one) for one in operands]
    known = [one for one in tags if one is not None]
    if len({event for event, _ in known}) != 1:
        return None
    event, power = known[0]
    numbers = [one for one in args[:2] if isinstance(one, (int, float))]
    if name in _HOMOGENEOUS or name in _FLOORED:
        return known[0]
    if name in _POWERS:
        return event, power * _POWERS[name]
    if name in ("pow", "__pow__") and numbers and isinstance(args[0], Tensor):
        return event, power * numbers[0]
    if name in ("__rtruediv__", "__rdiv__") and len(operands) == 1:
        return event, -power
    if name in _TIMES or name in _OVER:
        sign = -1 if name in _OVER else 1
        if numbers:
            return event, power + sign * _ratio_of(trace, event, numbers[0])
        if len(known) == 2:
            return event, power + sign * known[1][1]
        return known[0] if isinstance(args[0], Tensor) and tags[0] is not None else None
    if name in _PLUS and _little_is_added(trace, numbers, operands, known[0]):
        return known[0]
    return None


def _little_is_added(
    trace: Trace, numbers: Sequence[float], operands: list[Tensor], tag: tuple[int, float]
) -> bool:
    """Whether what is added to a sum over channels is of its kind, or an epsilon."""
    tags = [trace.tag_of(one) for one in operands]
    known = [one for one in tags if one is not None]
    pairs = zip(operands, tags, strict=True)
    others = [abs(one) for one in numbers]
    others += [float(one.abs().max()) for one, own in pairs if own is None]
    if len(known) > 1:
        return len(set(known)) == 1 and not others
    if tag[1] == 1.0 and numbers == others and _follows(trace, others):
        return True
    size = float(operands[tags.index(tag)].detach().abs().mean())
    return all(one <= _ADDED * size for one in others)


def _follows(trace: Trace, numbers: Sequence[float]) -> bool:
    """Whether a number is the epsilon of the module that runs, which grows with the mean."""
    layer = trace.stack[-1]
    own = [one for one in own_sizes(layer) if one.kind == "eps" and not one.path]
    return len(numbers) == 1 and any(one.value == numbers[0] for one in own)


def _ratio_of(trace: Trace, event: int, number: float) -> float:
    """The power of n / n' that a number changes by, if it is a power of n.

    A float that a module holds as an attribute stays what it is.
    """
    count = len(trace.dependencies.events[event].nodes)
    if count < 2 or number <= 0:
        return 0.0
    for power in (1.0, 0.5, -0.5, -1.0):
        if abs(number - count**power) <= 1e-6 * number:
            held = (value for one in trace.stack for value in vars(one).values())
            fixed = any(isinstance(one, float) and one == number for one in held)
            return 0.0 if fixed else -power
    return 0.0


def _through(trace: Trace, name: str, args: Any, operands: list[Tensor], result: Tensor) -> bool:
    """Products of channels with sums over them, with numbers and with weights."""
    if name not in _TIMES and name not in _OVER:
        return False
    sign = -1.0 if name in _OVER else 1.0
    numbers = [one for one in args[:2] if isinstance(one, (int, float))]
    if name in _OVER and not isinstance(args[0], Tensor):
        return False
    if len(operands) == 1 and numbers:
        return _times_number(trace, operands[0], numbers[0], sign, result)
    if len(operands) != 2:
        return False
    sums = [at for at, one in enumerate(operands) if trace.tag_of(one) is not None]
    if len(sums) == 1 and (name in _TIMES or sums == [1]):
        return _times_sum(trace, operands[1 - sums[0]], operands[sums[0]], sign, result)
    return name in _TIMES and _absorbed(trace, operands, result)


def _times_number(trace: Trace, source: Tensor, number: float, sign: float, result: Tensor) -> bool:
    """Channels times a number that is a power of how many they are."""
    known, axes, changed = trace.dependencies.tags, list(trace.axes(source)), False
    for dim, nodes in enumerate(axes):
        if nodes is None:
            continue
        events = {known[one][0] for one in nodes.tolist() if one in known}
        power = sign * _ratio_of(trace, next(iter(events)), number) if len(events) == 1 else 0.0
        if power:
            axes[dim], changed = spread_tags(trace, nodes, next(iter(events)), power), True
    if changed:
        trace.set_axes(result, axes)
    return changed


def _times_sum(trace: Trace, source: Tensor, total: Tensor, sign: float, result: Tensor) -> bool:
    """Channels times a sum over themselves, or over others that they were made of one by one."""
    event, power = trace.tag_of(total) or (0, 0.0)
    axes, own = _broadcast(trace, source, result), trace.dependencies.events[event].nodes
    classes = None
    for dim, nodes in enumerate(axes):
        if nodes is None:
            continue
        if not set(own.tolist()).intersection(nodes.tolist()):
            classes = trace.dependencies.components() if classes is None else classes
            if set(classes[nodes].tolist()) != set(classes[own].tolist()):
                continue
        axes[dim] = spread_tags(trace, nodes, event, sign * power)
        trace.set_axes(result, axes)
        return True
    return False


def _broadcast(trace: Trace, source: Tensor, result: Tensor) -> list[Nodes | None]:
    axes = list(trace.axes(source))
    return [*[None] * (result.dim() - len(axes)), *axes][-result.dim() :] if result.dim() else []


def _absorbed(trace: Trace, operands: list[Tensor], result: Tensor) -> bool:
    """A weight that multiplies channels makes up for what changes them."""
    for one, other in (operands, operands[::-1]):
        for back in range(1, min(one.dim(), other.dim()) + 1):
            mine, theirs = trace.axes(one)[-back], trace.axes(other)[-back]
            if not _tags(trace, mine) or theirs is None or mine is None:
                continue
            if len(mine) != len(theirs) or (where := trace.weight_of(theirs)) is None:
                continue
            trace.dependencies.connect(mine, theirs)
            absorb(trace, *where, mine)
            axes = _broadcast(trace, one, result)
            axes[-back] = theirs
            trace.set_axes(result, axes)
            return True
    return False


def _passes(trace: Trace, name: str, args: Any, operands: list[Tensor]) -> bool:
    """Whether a function leaves the factor of each channel as it is."""
    if name in _HOMOGENEOUS:
        return True
    changed = [one for one in operands if _all_tags(trace, one)]
    if name in _OVER:
        return len(changed) == 1 and changed[0] is args[0]
    if name in _TIMES:
        return len(changed) == 1 and trace.tag_of(changed[0]) is None
    if name in _PLUS and len(changed) == len(operands) == 2:
        return all(
            a is not None and b is not None and _row(trace, a) == _row(trace, b)
            for a, b in zip(*(trace.axes(one) for one in operands), strict=False)
            if _tags(trace, a) or _tags(trace, b)
        ) and all(trace.tag_of(one) is None for one in operands)
    return not changed


def _row(trace: Trace, nodes: Nodes) -> list[Any]:
    return [trace.dependencies.tags.get(one, (-1, 0.0)) for one in nodes.tolist()]
