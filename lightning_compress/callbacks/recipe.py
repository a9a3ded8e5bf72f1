"""compression_recipe: the list of callbacks for a goal and a kind of model, with its reasons."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_compress.callbacks.base import builds_layers_later
from lightning_compress.callbacks.channel_pruning import ChannelPruning
from lightning_compress.callbacks.gradual_pruning import GradualPruning
from lightning_compress.callbacks.knowledge_distillation import KnowledgeDistillation
from lightning_compress.callbacks.quality_budget import QualityBudget
from lightning_compress.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_compress.deployment import deployed_part, is_judge, known_by_name
from lightning_compress.distillation.discriminator_losses import Perceptual
from lightning_compress.distillation.losses import StepKL
from lightning_compress.distillation.pairs import Pair, Ramp
from lightning_compress.quantization.entropy import EntropyGrid
from lightning_compress.targets import select
from lightning_compress.terminal import html_table

__all__ = ["GOALS", "KINDS", "Recipe", "RecipeReport", "compression_recipe", "kind_of"]

GOALS = ("smallest", "fastest", "balanced")
KINDS = ("gan", "vae", "recurrent_vae", "other")
_TITLES = {"gan": "a GAN", "vae": "a VAE", "recurrent_vae": "a recurrent VAE", "other": "any model"}
_SMALL = 0.02  # of all targeted weights: what the smallest layers may hold together, left dense
_STEERED = "; the budget steers it"
_LAMBDA = 1.0  # in nats: the most that held no loss of a VAE in the headline's rows
_INFER_DEPTH = 3  # levels below the module that are looked at for a judge

Reasoned = tuple[Callback, str]


class RecipeReport(Callback):
    """Log at the start of a fit what a recipe holds, and at its end whether `max_loss` was held.

    A loss beyond it is a warning, which the command line shows too.

    Args:
        goal: of the recipe.
        max_loss: of the recipe.
        kind: that the recipe is for.
        budget: the `QualityBudget` of the recipe; None: nothing holds `max_loss`.

    Attributes:
        held: whether the model that the fit ended with is within `max_loss`; None: not measured.

    >>> RecipeReport("smallest", 0.02, "other", None).unheld
    'max_loss=0.02 is not held: give monitor=<a logged metric> to compression_recipe'
    """

    def __init__(self, goal: str, max_loss: float, kind: str, budget: QualityBudget | None) -> None:
        self.goal, self.max_loss, self.kind, self.budget = goal, max_loss, kind, budget
        self.held: bool | None = None

    @property
    def unheld(self) -> str | None:
        """That nothing holds `max_loss`; None with a budget."""
        if self.budget is not None:
            return None
        return (
            f"max_loss={self.max_loss:g} is not held: give monitor=<a logged metric> to "
            "compression_recipe"
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Log what is not held, and which other recipe the module would get."""
        self.held = None
        if self.unheld is not None:
            rank_zero_info(self.unheld)
        kind = kind_of(pl_module)
        if kind != self.kind:
            rank_zero_info(
                f"the recipe {self.goal!r} is that for {_TITLES[self.kind]}, the module is "
                f"{_TITLES[kind]}: compression_recipe({self.goal!r}, model=module) fits it"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Log that the loss is within `max_loss`; warn where it is not, or nobody knows."""
        if self.budget is None:
            return
        self.held = within(self.budget)
        tell = rank_zero_info if self.held else rank_zero_warn
        tell(f"{self.goal!r}: {verdict(self.budget, self.max_loss)}")

    def fit_results(self) -> dict[str, Any]:
        """The outcome, for fits that run in another process."""
        return {"held": self.held}


def within(budget: QualityBudget) -> bool | None:
    """Whether a budget's fit ended within it; None where nothing was compressed."""
    if budget.search is None:
        return None
    worse, most = budget.degradation, budget.max_degradation
    return worse is not None and most is not None and worse <= most


def verdict(budget: QualityBudget, max_loss: float) -> str:
    """The outcome of a budget's fit in words."""
    held = within(budget)
    if held is None:
        return f"max_loss={max_loss:g} says nothing: the run was too short to compress anything"
    if budget.degradation is None:
        return f"max_loss={max_loss:g} was NOT held: no model was within it"
    word = "was held" if held else "was NOT held"
    return (
        f"max_loss={max_loss:g} {word}: {budget.monitor} ended {budget.degradation:+.2%} worse "
        "than the dense model's"
    )


class Recipe(list[Callback]):
    """Callbacks of a recipe, in order; its `repr` gives the reason of each.

    Args:
        pairs: callbacks and reasons.
        title: the goal and the kind of model.
        notes: what the recipe does not do, and what to add.

    >>> print(Recipe([(RecipeReport("smallest", 0.02, "vae", None), "says so")], "smallest"))
    smallest:
      RecipeReport: says so
    """

    def __init__(self, pairs: Iterable[Reasoned], title: str, notes: Sequence[str] = ()) -> None:
        pairs = list(pairs)
        super().__init__(one for one, _ in pairs)
        self.title, self.notes = title, tuple(notes)
        self._reasons = {id(one): reason for one, reason in pairs}

    @property
    def reasons(self) -> list[str]:
        """The reason of each callback, in the list's order; "added" for what was appended."""
        return [self._reasons.get(id(one), "added") for one in self]

    @property
    def held(self) -> bool | None:
        """Whether the last fit ended within `max_loss`; None: not measured."""
        reports = [one for one in self if isinstance(one, RecipeReport)]
        return reports[0].held if reports else None

    def __repr__(self) -> str:
        """One line a callback, then the notes."""
        rows = [
            f"  {type(one).__name__}: {reason}"
            for one, reason in zip(self, self.reasons, strict=True)
        ]
        return "\n".join([f"{self.title}:", *rows, *(f"  note: {one}" for one in self.notes)])

    def _repr_html_(self) -> str:
        """The callbacks and their reasons as a table in a notebook."""
        rows = [(repr(one), reason) for one, reason in zip(self, self.reasons, strict=True)]
        notes = [("note", one) for one in self.notes]
        return html_table(self.title, ["Callback", "Why"], [*rows, *notes])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles keep the reasons, whose keys are the callbacks' identities."""
        return type(self), (list(zip(self, self.reasons, strict=True)), self.title, self.notes)


def compression_recipe(
    goal: str,
    max_loss: float = 0.02,
    teacher: Any = None,
    *,
    model: nn.Module | str | None = None,
    monitor: str | None = None,
    mode: str = "min",
    reference: float | str | None = None,
    irreducible: float = 0.0,
) -> Recipe:
    """Callbacks for a goal, as the headline tables found them best for a kind of model.

    List them in a Trainer, alone or beside others: `Trainer(callbacks=[*recipe, other])`. Their
    windows are fractions of the run, which so must have an end (`max_epochs` or `max_steps`).

    Args:
        goal: "smallest": the smallest `.lcz` file; "fastest": fewer channels and int8;
            "balanced": half of the multiplications, and a small file.
        max_loss: how much worse than the dense model it may become, as a fraction of the monitored
            metric less `irreducible`: of the reducible -ELBO, of a dense Fréchet distance.
        teacher: of `KnowledgeDistillation`: a trained module, a checkpoint's path, `EMATeacher()`;
            None: no distillation.
        model: the module that is trained, or its kind: "gan", "vae", "recurrent_vae" or "other";
            None: the teacher's kind where it is a module, else settings for any model.
        monitor: a logged metric, of held-out data ("val/loss"), that a `QualityBudget` keeps
            within `max_loss`; None: `max_loss` is not held, and the list says so.
        mode: "min" or "max": which way the metric is better.
        reference: the metric of the dense model, see `QualityBudget`; None: its readings before
            the budget begins.
        irreducible: value of the metric that no model can better.

    Returns:
        A list whose `repr` gives the reason of each callback.

    Raises:
        ValueError: for an unknown goal or kind, or a loss that is no fraction.

    >>> recipe = compression_recipe("fastest", model="vae")
    >>> [type(one).__name__ for one in recipe]
    ['ChannelPruning', 'QuantizationAwareTraining', 'RecipeReport']
    """
    _check(goal, max_loss, model)
    known = model if model is not None else teacher
    kind = known if isinstance(known, str) and known in KINDS else kind_of(known)
    steered = monitor is not None
    pairs = [
        *_METHODS[goal](kind, model, _STEERED if steered else ""),
        *_taught(teacher, known, kind),
    ]
    budget = None
    if monitor is not None:
        budget = QualityBudget(
            monitor,
            max_loss,
            mode=mode,
            reference=reference,
            irreducible=irreducible,
            begin=0.4,
        )
        pairs.append((budget, f"compresses as far as {monitor} is at most {max_loss:g} worse"))
    report = RecipeReport(goal, max_loss, kind, budget)
    pairs.append((report, report.unheld or "says at the end whether max_loss was held"))
    return Recipe(pairs, f"{goal} for {_TITLES[kind]}", _notes(goal, teacher))


def _check(goal: str, max_loss: float, model: nn.Module | str | None) -> None:
    if goal not in GOALS:
        raise ValueError(f"goal={goal!r}: valid are {list(GOALS)}{_meant(goal, GOALS)}")
    number = isinstance(max_loss, (int, float)) and not isinstance(max_loss, bool)
    if not number or not 0 <= max_loss < math.inf:
        raise ValueError(f"max_loss={max_loss!r} must be a fraction, 0 or more: 0.02 is 2 %")
    if isinstance(model, str) and model not in KINDS:
        raise ValueError(
            f"model={model!r}: give the module or its kind, one of {list(KINDS)}"
            f"{_meant(model, KINDS)}"
        )
    if model is not None and not isinstance(model, (str, nn.Module)):
        raise ValueError(f"model={model!r}: give a module or one of {list(KINDS)}")


def _meant(word: Any, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def kind_of(module: Any) -> str:
    """The kind of a module, one of `KINDS`: by its attribute `kind`, else by its networks' names.

    >>> kind_of(nn.ModuleDict({"generator": nn.Linear(1, 1), "critic": nn.Linear(1, 1)}))
    'gan'
    >>> kind_of(nn.ModuleDict({"encoder": nn.GRU(1, 1), "decoder": nn.GRU(1, 1)}))
    'recurrent_vae'
    """
    if not isinstance(module, nn.Module):
        return "other"
    said = getattr(module, "kind", None)
    if isinstance(said, str):
        return said if said in KINDS else "other"
    parts = deployed_part(module)
    if parts != ("",) and any(_judges(path, one, parts) for path, one in module.named_modules()):
        return "gan"
    networks = [module.get_submodule(part) for part in parts]
    if not _is_autoencoder(module):
        return "other"
    recurrent = any(isinstance(one, nn.RNNBase) for part in networks for one in part.modules())
    return "recurrent_vae" if recurrent else "vae"


def _judges(path: str, module: nn.Module, deployed: Sequence[str]) -> bool:
    if not path or path.count(".") >= _INFER_DEPTH or not is_judge(path):
        return False
    inside = any(path == part or path.startswith(f"{part}.") for part in deployed)
    return not inside and any(one.requires_grad for one in module.parameters())


def _is_autoencoder(module: nn.Module) -> bool:
    """Whether some level, not too deep, holds an encoder and a decoder."""
    for path, one in module.named_modules():
        if path.count(".") >= _INFER_DEPTH:
            continue
        names = [name.lower() for name, _ in one.named_children()]
        if any("encoder" in name for name in names) and any("decoder" in name for name in names):
            return True
    return False


def _smallest(kind: str, model: Any, more: str) -> list[Reasoned]:
    if kind == "gan":
        return [
            (_channels(kind, 1 / 16), f"a generator tolerates a sixteenth of its MACs{more}"),
            (_zeros(0.6, model, late=True), f"60 % zeros in what is left{more}"),
            (_grids(0.6, late=True), f"weights on a coarse grid for the entropy coder{more}"),
        ]
    if kind == "vae" and getattr(model, "kind", None) == "vae":  # whose loss is known to be in nats
        trained = QuantizationAwareTraining(
            activation_bits=None, scheme="rate_distortion", lmbda=_LAMBDA
        )
        why = f"steps train under loss + {_LAMBDA:g} x bits a weight; rounding makes zeros{more}"
        return [(trained, why)]
    return [
        (_zeros(0.9, model), f"90 % zeros, of which the coder stores the pattern alone{more}"),
        (_grids(0.5), f"weights on a grid for the entropy coder{more}"),
    ]


def _fastest(kind: str, model: Any, more: str) -> list[Reasoned]:  # noqa: ARG001
    int8 = QuantizationAwareTraining(weight_bits=8, activation_bits=8, begin=0.6, freeze=0.9)
    return [
        (_channels(kind, 0.25), f"a quarter of the MACs, in smaller dense layers{more}"),
        (int8, f"8-bit weights and activations: export_onnx(int8=True) computes with them{more}"),
    ]


def _balanced(kind: str, model: Any, more: str) -> list[Reasoned]:
    sparsity = 0.65 if kind == "recurrent_vae" else 0.9
    return [
        (_channels(kind, 0.5), f"half of the MACs, in smaller dense layers{more}"),
        (_zeros(sparsity, model, late=True), f"{sparsity:.0%} zeros in what is left{more}"),
        (_grids(0.5, late=True), f"weights on a grid for the entropy coder{more}"),
    ]


_METHODS = {"smallest": _smallest, "fastest": _fastest, "balanced": _balanced}


def _channels(kind: str, macs: float) -> ChannelPruning:
    """Of an autoencoder the same fraction of each layer, of others the worst of all layers."""
    scope, criterion = "global", "magnitude"
    if kind in ("vae", "recurrent_vae"):
        scope, criterion = "layer", "taylor"
    return ChannelPruning(
        budget={"macs": macs},
        scope=scope,
        criterion=criterion,
        begin=0.35,
        end=0.5,
        on_miss="closest",
    )


def _zeros(sparsity: float, model: Any, *, late: bool = False) -> GradualPruning:
    """In layers of equal sparsity, the smallest left dense, where the model is known."""
    begin, end = (0.53, 0.73) if late else (0.1, 0.6)
    spared = _smallest_layers(model)
    scope = "layer" if spared else "global"
    return GradualPruning(
        final_sparsity=sparsity, begin=begin, end=end, scope=scope, exclude=spared
    )


def _grids(step: float, *, late: bool = False) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(
        activation_bits=None,
        scheme="entropy",
        entropy=EntropyGrid(step=step),
        begin=0.57 if late else 0.35,
    )


def _smallest_layers(model: Any) -> list[str]:
    """Paths of the smallest weights that hold at most `_SMALL` of all, the first to hurt."""
    if not isinstance(model, nn.Module) or not known_by_name(model):
        return []
    if isinstance(model, LightningModule) and builds_layers_later(model):
        return []
    sizes = {one.path: one.parameter.numel() for one in select(model).targets}
    left, found = _SMALL * sum(sizes.values()), []
    for path, size in sorted(sizes.items(), key=lambda pair: pair[1]):
        left -= size
        if left < 0:
            break
        found.append(path)
    return found


def _taught(teacher: Any, known: Any, kind: str) -> list[Reasoned]:
    if teacher is None:
        return []
    own = getattr(known, "kind", None) == kind  # a model of this package, whose outputs are known
    if own and kind == "gan":
        pairs = [Pair("generator", loss=Perceptual())]
        teaches = KnowledgeDistillation(teacher, pairs=pairs, balance="gradient_norm")
        return [(teaches, "equal images for equal latents, as the teacher's discriminator sees")]
    if own and kind in ("vae", "recurrent_vae"):
        outputs = StepKL() if getattr(known, "discrete", False) else "bernoulli_kl"
        pairs = [Pair("encoder", loss="gaussian_kl"), Pair("decoder", loss=outputs)]
        fades = Ramp(initial=1.0, final=0.0, begin=0.5, end=0.75)
        why = "posterior and outputs of the teacher, until three quarters of the run"
        return [(KnowledgeDistillation(teacher, pairs=pairs, weight=fades), why)]
    teaches = KnowledgeDistillation(teacher, balance="gradient_norm")
    return [(teaches, "outputs of the teacher's deployed part, as strong as the own loss")]


def _notes(goal: str, teacher: Any) -> list[str]:
    notes = []
    if teacher is None:
        notes.append("teacher=<a trained dense module> adds distillation")
    if goal == "fastest":
        notes.append("the speed comes with export_onnx(..., int8=True)")
    else:
        notes.append("save_compressed writes the file, or ArtifactCallback at the end of the fit")
    return notes
