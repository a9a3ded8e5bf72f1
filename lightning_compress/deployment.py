"""Deployed part of a module: which of its networks are deployed, by names and by structure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

__all__ = [
    "deployed_part",
    "is_judge",
    "known_by_name",
    "note_deployed",
    "noted_deployed",
    "unnamed_networks",
]

_NOTED = "_deployed_by_structure"  # a plain attribute: it follows deepcopy and pickle
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# What the sides of adversarial training are called, by words; case and separators do not count.
_DRAWS = {"g", "gen", "gens", "generator", "generators", "gnet", "netg", "modelg"}
_JUDGES = {
    *("discriminator", "discriminators", "discrim", "discr", "disc", "discs", "dis"),
    *("critic", "critics", "judge", "judges", "adversary", "adversarial", "patchgan"),
    *("mpd", "msd", "mrd", "msstftd", "cqtd", "dnet", "netd", "modeld"),
}
_JUDGES_INSIDE = re.compile(r"discriminator|critic|adversar|disc$")
_NET = {"net", "nets", "model", "models", "network", "module"}
# What only measures: it is neither deployed nor trained against.
_MEASURES = {
    *("loss", "losses", "criterion", "criteria", "lpips", "perceptual", "percept", "fid"),
    *("inception", "metric", "metrics", "teacher"),
}
_MEASURES_WHEN_FROZEN = {"vgg", "resnet", "features", "extractor", "clip", "arcface", "dino"}
_COPIES = {"ema", "avg", "average", "averaged", "shadow", "swa"}


def deployed_part(module: nn.Module) -> tuple[str, ...]:
    """Deployed modules, by path: a GAN's generator, a VAE's encoder and decoder, else all.

    A module says so itself by an attribute `deployed`. Otherwise names tell, below wrappers and
    containers too; and where several optimizers train networks whose names say nothing, structure
    does, which the callbacks read in the first training batch.

    >>> deployed_part(nn.ModuleDict({"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)}))
    ('generator',)
    >>> nets = nn.ModuleDict({"netG": nn.Linear(1, 1), "netD": nn.Linear(1, 1)})
    >>> deployed_part(nn.ModuleDict({"nets": nets}))
    ('nets.netG',)
    """
    declared = _declared(module)
    if declared is not None:
        return declared
    if noted := noted_deployed(module):
        return noted
    return _guess(module)[0]


def known_by_name(module: nn.Module) -> bool:
    """Whether the module, its names, or its structure seen earlier give the deployed part."""
    return _declared(module) is not None or bool(noted_deployed(module)) or _guess(module)[1]


def note_deployed(module: nn.Module, parts: Sequence[str]) -> None:
    """Note the deployed part that the structure has shown."""
    _plain(module).__dict__[_NOTED] = tuple(parts)


def noted_deployed(module: nn.Module) -> tuple[str, ...]:
    """What `note_deployed` left; empty where it was never called."""
    return tuple(_plain(module).__dict__.get(_NOTED, ()))


def is_judge(name: str) -> bool:
    """Whether a name is that of a network that only trains others: a discriminator, a loss.

    >>> [is_judge(name) for name in ("mpd", "netD", "disGA", "d1", "perceptual_loss", "discrete")]
    [True, True, True, True, True, False]
    """
    last = name.rpartition(".")[2]
    return _judges(last) or _letter(last, "d") or bool(set(_words(last)) & _MEASURES)


def unnamed_networks(module: nn.Module) -> list[str]:
    """Networks with weights to train beside the deployed part that are no judges by name.

    A VAE's heads beside its encoder, say. None where the module declares what is `deployed`.

    >>> names = ("encoder", "decoder", "fc_mu", "discriminator")
    >>> unnamed_networks(nn.ModuleDict({name: nn.Linear(1, 1) for name in names}))
    ['fc_mu']
    """
    parts = deployed_part(module)
    if _declared(module) is not None or parts == ("",):
        return []
    return list(_beside(_plain(module), "", parts))


def _beside(module: nn.Module, prefix: str, parts: Sequence[str]) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path in parts or is_judge(name) or set(_words(name)) & _COPIES:
            continue
        if any(part.startswith(f"{path}.") for part in parts):
            yield from _beside(_plain(child), f"{path}.", parts)
        elif any(one.requires_grad and one.dim() > 1 for one in child.parameters()):
            yield path


def _declared(module: nn.Module) -> tuple[str, ...] | None:
    declared = getattr(_plain(module), "deployed", None)
    if declared is None:
        return None
    return (declared,) if isinstance(declared, str) else tuple(declared)


def _guess(module: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Deployed part by names, and whether they give one."""
    inner = _plain(module)
    children = _weighted(inner)
    by_word = {name.lower(): name for name in reversed(children)}
    for words in (("generator",), ("encoder", "decoder"), ("decoder",)):
        if by_word.keys() >= set(words):
            return tuple(by_word[word] for word in words), True
    found, sure = _level(inner, outermost=True)
    return (tuple(found) if found else ("",)), sure


def _level(module: nn.Module, *, outermost: bool) -> tuple[list[str], bool]:
    """Deployed paths in a module, empty for all of it, and whether a judge was found."""
    children = _weighted(module)
    draws, judges = _sides(module, children, outermost=outermost)
    if draws and judges:
        return draws, True
    frozen_too = any(one.requires_grad for one in module.parameters())
    aside = {*judges, *(name for name in children if _measures(name, children, frozen_too))}
    rest = [name for name in children if name not in aside]
    if not rest:
        return [], False
    found, changed, sure = [], bool(aside), bool(judges)
    for name in rest:
        below, sure_below = _level(_plain(children[name]), outermost=False)
        found += [f"{name}.{path}" for path in below] or [name]
        changed, sure = changed or bool(below), sure or sure_below
    return (found if changed else []), sure


def _sides(
    module: nn.Module, children: dict[str, nn.Module], *, outermost: bool
) -> tuple[list[str], list[str]]:
    """Names of the networks at one level that draw, and of those that judge.

    One letter says nothing alone: `d1` may be a layer, `D` beside `G` is a discriminator. Inside
    a network a judge is more than one layer.
    """
    if not (outermost or isinstance(module, (nn.ModuleDict, nn.ModuleList))):
        children = {name: one for name, one in children.items() if _weighted(one)}
    judges = [name for name in children if _judges(name)]
    draws = [name for name in children if name not in judges and _draws(name)]
    own = [name for name in draws if not set(_words(name)) & _COPIES]
    draws = own or draws
    letters = [name for name in children if _letter(name, "d") and name not in judges]
    return draws, judges + (letters if draws else [])


def _weighted(module: nn.Module) -> dict[str, nn.Module]:
    """Children that hold parameters, by name, in their order."""
    return {
        name: one
        for name, one in module.named_children()
        if next(one.parameters(), None) is not None
    }


def _measures(name: str, children: dict[str, nn.Module], frozen_too: bool) -> bool:
    words = set(_words(name))
    if words & _MEASURES:
        return True
    frozen = not any(one.requires_grad for one in children[name].parameters())
    return frozen_too and frozen and bool(words & _MEASURES_WHEN_FROZEN)


def _judges(name: str) -> bool:
    words = _words(name)
    return bool(set(words) & _JUDGES) or any(_JUDGES_INSIDE.search(word) for word in words)


def _draws(name: str) -> bool:
    return bool(set(_words(name)) & (_DRAWS - {"g"})) or _letter(name, "g")


def _letter(name: str, letter: str) -> bool:
    """Whether a name is a network's letter: G, g1, g_AB, netG, netG_A2B, model_G."""
    words = _words(name)
    if words and words[0] in _NET:
        words = words[1:]
    last = bool(words) and words[-1] == letter and name.endswith(letter.upper())  # sr_G
    return last or words[:1] == [letter]


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


def _plain(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)
