"""Removal of channels is exact: the masked module is the smaller one."""

from functools import partial

import tiny
import torch

from lightning_compress.channels.graph import channel_graph
from lightning_compress.channels.plan import removed, zeroed_channels
from lightning_compress.channels.resize import check_sizes

randomize = partial(tiny.randomize, seed=1, low=0.1, spread=0.4)


def tensors(out):
    return [one for one in torch.utils._pytree.tree_leaves(out) if isinstance(one, torch.Tensor)]


def every_other(graph):
    """About half of the free units of each group."""
    return graph.flags(
        torch.cat([torch.from_numpy(group.free[::2]) for group in graph.groups]).numpy()
    )


def check_exact(module, inputs, **options):
    """The masked module is the smaller one; returns the graph, and the smaller module."""
    module = module.eval()
    graph = channel_graph(module, inputs, **options)
    gone = every_other(graph)
    assert gone.any()
    with torch.no_grad():
        zeroed = zeroed_channels(module, graph, gone)
        small = removed(zeroed, graph, gone)
        for ours, theirs in zip(
            tensors(small(*graph.inputs_of(inputs, gone))), tensors(zeroed(*inputs)), strict=True
        ):
            if ours.shape != theirs.shape:  # a recurrent state that is the caller's
                continue
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert check_sizes(small) == []
    before, after = (sum(p.numel() for p in one.parameters()) for one in (module, small))
    assert after < before
    for group in graph.groups:
        if len(group.free):
            assert gone[group.units].any()
    return graph, small
