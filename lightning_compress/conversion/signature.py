"""Signature of a module's forward: inputs and outputs as flat tuples of named tensors."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

__all__ = ["Signature", "flat_outputs", "output_tensors", "over_tensors", "signature_of"]


@dataclasses.dataclass(frozen=True)
class Signature:
    """How a sample stands for the arguments of a forward.

    Args:
        names: of the input tensors, in order; nested ones as `"name.key"`.
        structure: of `(arguments, keyword arguments)`, the input tensors taken out.
        plain: whether the arguments are positional tensors alone.
    """

    names: tuple[str, ...]
    structure: Any
    plain: bool

    def flat(self, sample: Any, module: nn.Module) -> tuple[Tensor, ...]:
        """The tensors of another sample of the same structure.

        Raises:
            ValueError: when it has another structure.
        """
        leaves, structure = pytree.tree_flatten(_arguments(sample, module))
        if structure != self.structure:
            raise ValueError(
                f"inputs of another structure than the sample's: {len(leaves)} tensors where the "
                f"sample has {list(self.names)}"
            )
        return tuple(leaves)

    def rebuilt(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of the forward."""
        return pytree.tree_unflatten(leaves, self.structure)  # type: ignore[no-any-return]


def signature_of(module: nn.Module, sample: Any) -> tuple[Signature, tuple[Tensor, ...]]:
    """The signature of a sample, and its tensors.

    Args:
        module: its forward's parameters tell a dict of keyword arguments from a dict of inputs.
        sample: a tensor, a tuple of arguments, whose last one may be a dict of keyword arguments,
            or a dict of them; an argument may hold tensors in dicts, tuples and lists.

    Raises:
        ValueError: without a tensor, or for an argument that is none.

    >>> class Noisy(nn.Module):
    ...     def forward(self, x, *, noise): return x + noise
    >>> x = torch.zeros(2, 3)
    >>> signature_of(Noisy(), {"x": x, "noise": x})[0].names
    ('x', 'noise')
    """
    arguments = _arguments(sample, module)
    found = [
        (_name(path, module), leaf) for path, leaf in pytree.tree_flatten_with_path(arguments)[0]
    ]
    leaves, structure = pytree.tree_flatten(arguments)
    for name, leaf in found:
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"sample: {name} is {type(leaf).__name__}, not a tensor: give tensors, or wrap "
                "what is fixed into the module"
            )
    if not leaves:
        raise ValueError("sample: it holds no tensor")
    plain = not arguments[1] and all(isinstance(one, Tensor) for one in arguments[0])
    names = tuple(name for name, _ in found)
    return Signature(names, structure, plain), tuple(leaves)


def _arguments(sample: Any, module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, Mapping):
        return ((), dict(sample)) if _are_keywords(sample, module, 0) else ((sample,), {})
    arguments = tuple(sample) if isinstance(sample, (tuple, list)) else (sample,)
    if arguments and isinstance(arguments[-1], Mapping):
        keywords = arguments[-1]
        if _are_keywords(keywords, module, len(arguments) - 1):
            return arguments[:-1], dict(keywords)
    return arguments, {}


def _are_keywords(found: Mapping[Any, Any], module: nn.Module, taken: int) -> bool:
    """Whether all keys name parameters of forward that no positional argument takes."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    catches_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = {one.name for one in parameters[taken:] if one.kind in named}
    free |= {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
    return bool(found) and (catches_all or free.issuperset(found))


def _name(path: Any, module: nn.Module) -> str:
    """`"x"`, or `"x.key"` inside of it, as forward calls it."""
    side, first, *rest = (getattr(part, "idx", getattr(part, "key", None)) for part in path)
    name = str(first)
    if side == 0:
        parameters = list(inspect.signature(module.forward).parameters.values())
        starred = [at for at, one in enumerate(parameters) if one.kind is one.VAR_POSITIONAL]
        at = int(name)
        if starred and at >= starred[0]:
            name = f"{parameters[starred[0]].name}_{at - starred[0]}"
        elif at < len(parameters):
            name = parameters[at].name
    return ".".join([name, *map(str, rest)])


def over_tensors(
    plain: nn.Module, signature: Signature, inputs: tuple[Tensor, ...]
) -> tuple[str, ...]:
    """Let a copy take and give flat tensors, in place; returns the names of what it gives.

    A module that does so already stays as it is. Its outputs' names are () where nothing names
    them, or where the module fails on the inputs (whoever runs it next finds out).

    Raises:
        ValueError: for outputs that hold no tensors, and none at all.
    """
    arguments, keywords = signature.rebuilt(inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = plain(*arguments, **keywords)
    except Exception:
        output = ()
        names = ("",)
    else:
        names = tuple(name for name, _ in flat_outputs(output))
    if not names:
        raise ValueError("the module's forward gives no tensor: there is nothing to export")
    if signature.plain and not any(names):
        return ()
    own = type(plain)

    def forward(self: nn.Module, *leaves: Tensor) -> tuple[Tensor, ...]:
        arguments, keywords = signature.rebuilt(leaves)
        return output_tensors(own.forward(self, *arguments, **keywords))

    body = {"forward": forward, "__module__": own.__module__}
    plain.__class__ = type(own.__name__, (own,), body)  # pyright: ignore
    return names if any(names) else ()


def flat_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """Names and tensors of what a forward gives; a name is empty where nothing names a tensor.

    Keys of dicts and fields of named tuples and dataclasses are names, parameters of a
    distribution too. None is left out.

    Raises:
        ValueError: for anything else than these, tuples, lists and tensors.

    >>> [name for name, _ in flat_outputs({"mean": torch.zeros(1), "rest": (torch.zeros(1), None)})]
    ['mean', 'rest.0']
    >>> [name for name, _ in flat_outputs(torch.distributions.Normal(0.0, torch.ones(1)))]
    ['loc', 'scale']
    """
    found = list(_walk(output, (), named=False))
    return [(".".join(path) if named else "", one) for path, one, named in found]


def output_tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors of `flat_outputs`."""
    return tuple(one for _, one in flat_outputs(output))


def _walk(
    output: Any, path: tuple[str, ...], *, named: bool
) -> Iterator[tuple[tuple[str, ...], Tensor, bool]]:
    if output is None:
        return
    if isinstance(output, Tensor):
        yield path, output, named
        return
    fields = _fields(output)
    for name, part in fields.items():
        yield from _walk(
            part,
            (*path, name),
            named=named or not isinstance(output, (tuple, list)) or hasattr(output, "_fields"),
        )


def _fields(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(key): part for key, part in output.items()}
    if dataclasses.is_dataclass(output):
        return {one.name: getattr(output, one.name) for one in dataclasses.fields(output)}
    if isinstance(output, Distribution):
        names = list(output.arg_constraints)
        names = [one for one in names if one != "probs" or "logits" not in names]
        return {name: getattr(output, name) for name in names}
    if isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", range(len(output)))
        return {str(name): part for name, part in zip(names, output, strict=True)}
    raise ValueError(
        f"the module's forward gives {type(output).__name__}, which holds no tensors that a file "
        "could list: give tensors, or dicts, tuples or dataclasses of them"
    )
