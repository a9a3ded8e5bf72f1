"""What recurrent layers do with channels: units of all gates, layers and directions go together."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_compress.pruning.channel_labels import Labels
from lightning_compress.pruning.channel_trace import Trace

__all__ = ["CELLS", "label_cell", "label_recurrent"]

_GATES = {"GRU": 3, "LSTM": 4, "RNN_TANH": 1, "RNN_RELU": 1}
_CELL_GATES = {nn.GRUCell: 3, nn.LSTMCell: 4, nn.RNNCell: 1}
CELLS = tuple(_CELL_GATES)


def label_recurrent(trace: Trace, path: str, layer: nn.RNNBase, args: Any, out: Any) -> None:
    """Label what a recurrent layer gives, and its last states."""
    output, states = out
    packed = not isinstance(output, Tensor)
    x = args[0].data if not isinstance(args[0], Tensor) else args[0]
    data = output.data if packed else output
    ledger, gates = trace.ledger, _GATES[layer.mode]
    # One size serves all layers and directions of a torch layer: equal places go together.
    hidden = ledger.fresh(layer.hidden_size, path)
    shown = ledger.fresh(layer.proj_size, path) if layer.proj_size else hidden
    steps = x.numel() / x.shape[-1] / trace.batch
    read = trace.axes(x)[-1]
    for level in range(layer.num_layers):
        for end in ("", "_reverse") if layer.bidirectional else ("",):
            own = f"_l{level}{end}"
            paths = {
                kind: trace.path_of(getattr(layer, f"{kind}{own}", None))
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            }
            _gated(trace, paths, (read, hidden, shown), gates, steps)
            if layer.proj_size and (projection := paths["weight_hr"]) is not None:
                ledger.use(projection, 0, shown, "out")
                ledger.use(projection, 1, hidden, "in")
                ledger.works(projection, steps)
        read = np.concatenate([shown, shown]) if layer.bidirectional else shown
    given = [one for one in args[1:] if one is not None]
    _states(trace, given[0] if given else None, states, (hidden, shown))
    axes = list(trace.axes(x))
    axes[-1] = read
    trace.label(data, axes)


def _gated(
    trace: Trace,
    paths: dict[str, str | None],
    labels: tuple[Labels | None, Labels, Labels],
    gates: int,
    steps: float,
) -> None:
    read, hidden, shown = labels
    stacked = np.tile(hidden, gates)
    trace.reads(paths["weight_ih"], 1, read)
    trace.reads(paths["weight_hh"], 1, shown)
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if (name := paths[kind]) is not None:
            trace.ledger.use(name, 0, stacked, "out" if kind.startswith("weight") else "through")
            if kind.startswith("weight"):
                trace.ledger.works(name, steps)


def _states(trace: Trace, given: Any, states: Any, labels: tuple[Labels, Labels]) -> None:
    """Initial states are cut with the units; a state that goes in and comes out is the caller's."""
    before = _pair(given)
    after = _pair(states)
    for index, state in enumerate(after):
        own = labels[0] if index == 1 or (len(after) == 1 and labels[0] is labels[1]) else labels[1]
        trace.label(state, [*[None] * (state.dim() - 1), own])
        if index < len(before):
            known = trace.axes(before[index])[-1]
            if known is None:
                continue
            trace.ledger.join(known, own)
            if known.max() < trace.from_inputs:
                trace.given_states.append(own)


def _pair(states: Any) -> tuple[Tensor, ...]:
    if states is None:
        return ()
    return (states,) if isinstance(states, Tensor) else tuple(states)


def label_cell(trace: Trace, path: str, layer: Any, args: Any, out: Any) -> None:
    """Label the states that a cell gives."""
    gates = next(count for kind, count in _CELL_GATES.items() if isinstance(layer, kind))
    hidden = trace.ledger.fresh(layer.hidden_size, path)
    paths = {
        kind: trace.path_of(getattr(layer, kind, None))
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    _gated(trace, paths, (trace.axes(args[0])[-1], hidden, hidden), gates, 1.0)
    given = args[1] if len(args) > 1 else None
    _states(trace, given, out, (hidden, hidden))
