"""Losses between outputs of a student and its teacher, as pure functions of tensors.

Each takes the student first and returns a scalar; the teacher's side gets no gradient, since it
arrives without a graph. Temperatures divide logits, and `T^2` keeps the size of the gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.nn import functional

from lightning_compress.errors import TargetError
from lightning_compress.hooks import tensors_of
from lightning_compress.terminal import ShownArguments

__all__ = [
    "LOSSES",
    "FunctionLoss",
    "Loss",
    "LossInputs",
    "StepKL",
    "attention_transfer",
    "bernoulli_kl",
    "cross_entropy",
    "gaussian_kl",
    "kl_divergence",
    "l1",
    "linear_cka",
    "make_losses",
    "mse",
    "similarity_preserving",
    "step_kl",
]
Gaussian = tuple[Tensor, Tensor] | Any


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of squared differences over all elements.

    >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).item()
    2.0
    """
    return functional.mse_loss(student, teacher)


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of absolute differences over all elements.

    >>> l1(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])).item()
    1.0
    """
    return functional.l1_loss(student, teacher)


def cross_entropy(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """Cross-entropy in nats of the student's classes under the teacher's soft targets, times T^2.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531. Its gradient is that of `kl_divergence`.

    Args:
        student: logits, classes along `dim`.
        teacher: logits of the same shape.
        temperature: T, above 0.
        dim: axis of the classes; the mean goes over all others.
    """
    targets = (teacher / temperature).softmax(dim)
    loss = -(targets * (student / temperature).log_softmax(dim)).sum(dim)
    return temperature**2 * loss.mean()


def kl_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = -1
) -> Tensor:
    """KL in nats of the student's classes from the teacher's, both softened, times T^2.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531.

    Args:
        student: logits, classes along `dim`.
        teacher: logits of the same shape.
        temperature: T, above 0.
        dim: axis of the classes; the mean goes over all others.

    >>> kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), temperature=3.0).item()
    0.0
    """
    targets = (teacher / temperature).log_softmax(dim)
    ours = (student / temperature).log_softmax(dim)
    return temperature**2 * (targets.exp() * (targets - ours)).sum(dim).mean()


def bernoulli_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL in nats between independent pixels given as logits, times T^2.

    Summed over the pixels of an image and averaged over images: the unit of a VAE's loss.

    Args:
        student: logits, (N, ...).
        teacher: logits, (N, ...).
        temperature: T, above 0.

    >>> bernoulli_kl(torch.zeros(1, 3), torch.zeros(1, 3)).item()
    0.0
    """
    ours, theirs = student / temperature, teacher / temperature
    # log p = t - softplus(t) and log(1 - p) = -softplus(t), for a logit t.
    kl = theirs.sigmoid() * (theirs - ours)
    kl = kl + functional.softplus(ours) - functional.softplus(theirs)
    return temperature**2 * kl.flatten(1).sum(1).mean()


def gaussian_kl(student: Gaussian, teacher: Gaussian) -> Tensor:
    """KL in nats of the teacher's diagonal normal from the student's, closed form.

    KL(teacher || student), summed over the latent units and averaged over examples: the student's
    posterior has to cover the teacher's.

    Args:
        student: (mu, logvar), each (N, L); or a `torch.distributions.Normal`, `Independent` too.
        teacher: the same.

    >>> gaussian_kl((torch.zeros(1, 1), torch.zeros(1, 1)), (torch.ones(1, 1), torch.zeros(1, 1)))
    tensor(0.5000)
    """
    (mu, logvar), (mu_t, logvar_t) = _moments(student), _moments(teacher)
    ratio = (logvar_t - logvar).exp() + (mu_t - mu).square() * torch.exp(-logvar)
    return 0.5 * (ratio - 1 - logvar_t + logvar).sum(1).mean()


def _moments(given: Any) -> Gaussian:
    """Mean and log-variance of a normal distribution, each (N, L)."""
    if isinstance(given, Tensor):
        raise TypeError("gaussian_kl takes (mu, logvar) or a normal distribution, not one tensor")
    while hasattr(given, "base_dist"):
        given = given.base_dist
    if isinstance(getattr(given, "logvar", None), Tensor):
        given = given.mean, given.logvar
    elif isinstance(given, Normal):
        given = given.loc, 2 * given.scale.log()
    elif isinstance(given, Distribution):
        raise TargetError(
            f"gaussian_kl takes normal distributions with a diagonal covariance, and the module "
            f"gives a {type(given).__name__}: give loss=<a function of the two distributions>"
        )
    elif not isinstance(given, tuple | list):  # one distribution inside an output
        inside = [one for one in vars(given).values() if _is_distribution(one)]
        if len(inside) == 1:
            return _moments(inside[0])
    mu, logvar = given
    return (mu[:, None], logvar[:, None]) if mu.dim() == 1 else (mu.flatten(1), logvar.flatten(1))


def _is_distribution(one: Any) -> bool:
    return isinstance(one, Distribution) or isinstance(getattr(one, "logvar", None), Tensor)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of normalized attention maps.

    A map is the mean over channels of squared activations, flattened, of norm 1. Zagoruyko and
    Komodakis 2017, equation 2 with p = 2, https://arxiv.org/abs/1612.03928.

    Args:
        student: features (N, C, H, W).
        teacher: features (N, C', H, W).

    >>> x = torch.rand(2, 3, 4, 4)
    >>> attention_transfer(x, 5 * x).item() < 1e-12
    True
    """
    return (_attention(student) - _attention(teacher)).square().mean()


def _attention(features: Tensor) -> Tensor:
    return functional.normalize(features.square().mean(1).flatten(1), dim=1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of row-normalized similarity matrices over the batch, divided by N^2.

    Tung and Mori 2019, equations 1 to 4, https://arxiv.org/abs/1907.09682.

    Args:
        student: features (N, ...).
        teacher: features (N, ...), of any other size.
    """
    difference = _similarity(student) - _similarity(teacher)
    return difference.square().sum() / difference.shape[0] ** 2


def _similarity(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return functional.normalize(rows @ rows.T, dim=1)


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - CKA with linear kernels: 0 for equal representations up to rotation and scale.

    Kornblith et al. 2019, equation 4, https://arxiv.org/abs/1905.00414.

    Args:
        student: features (N, ...), N of at least 2.
        teacher: features (N, ...), of any other size.

    >>> x = torch.rand(8, 3)
    >>> abs(linear_cka(x, 7 * x.flip(1)).item()) < 1e-5
    True
    """
    ours, theirs = _centered_gram(student), _centered_gram(teacher)
    norms = torch.linalg.vector_norm(ours) * torch.linalg.vector_norm(theirs)
    return 1 - (ours * theirs).sum() / norms.clamp_min(torch.finfo(ours.dtype).tiny)


def _centered_gram(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    rows = rows - rows.mean(0)
    return rows @ rows.T


def step_kl(
    student: Tensor, teacher: Tensor, *, keep: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL in nats of each step's next-token classes, summed over steps, averaged over sequences.

    Kim and Rush 2016, word-level distillation, https://arxiv.org/abs/1606.07947; times T^2.

    Args:
        student: logits (N, T, V).
        teacher: logits (N, T, V).
        keep: (N, T), True for the steps that count; None: all.
        temperature: T, above 0.

    >>> import torch
    >>> step_kl(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)).item()
    0.0
    """
    targets = (teacher / temperature).log_softmax(-1)
    ours = (student / temperature).log_softmax(-1)
    steps = (targets.exp() * (targets - ours)).sum(-1)
    if keep is not None:
        steps = steps.masked_fill(~keep, 0.0)
    return temperature**2 * steps.sum(1).mean()


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss: both modules' outputs as detached float32 copies, the student's as leaves.

    Args:
        student: the student's output, in its own structure.
        teacher: the teacher's output, in its own structure.
        inputs: what the student's module received, by position.
    """

    student: Any
    teacher: Any
    inputs: tuple[Any, ...] = ()


class Loss(ShownArguments):
    """A loss of `LossInputs`; subclasses may look up networks of the teacher in `bind`."""

    name = "loss"
    same_shape = True  # the two sides must be equal in shape, if need be by an adapter

    def bind(self, teacher: nn.Module) -> None:
        """Look up modules of the frozen teacher; called once, before training."""

    def release(self) -> None:
        """Release the modules of `bind`."""

    def __call__(self, call: LossInputs) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError


class FunctionLoss(Loss):
    """A function of (student output, teacher output); `each`: of each tensor in them, added up.

    >>> FunctionLoss(mse)(LossInputs(torch.zeros(2), torch.ones(2))).item()
    1.0
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        name: str | None = None,
        each: bool = True,
        same_shape: bool = True,
        **options: Any,
    ) -> None:
        self.function, self.each, self.same_shape, self.options = (
            function,
            each,
            same_shape,
            options,
        )
        self.name = name or getattr(function, "__name__", type(function).__name__)

    def __call__(self, call: LossInputs) -> Tensor:
        """The function's value."""
        if not self.each:
            return self.function(call.student, call.teacher, **self.options)
        sides = _compared(tensors_of(call.student), tensors_of(call.teacher))
        if not sides:
            raise TypeError(f"{self.name} needs a floating-point output")
        values = [self.function(ours, theirs, **self.options) for ours, theirs in sides]
        return torch.stack(values).sum()


def _compared(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors that predict something.

    Integers, such as the codes of a quantizer, carry no gradient. Scalars beside tensors with axes
    are the module's own losses, as models of pythae or transformers give them: the student has its
    own, and those of the teacher say nothing of what it predicts.
    """
    sides = [pair for pair in zip(ours, theirs, strict=True) if pair[0].is_floating_point()]
    return [pair for pair in sides if pair[0].dim()] or sides


class StepKL(Loss):
    """`step_kl` on the first output of a decoder whose first input are tokens (N, T).

    Steps whose input is padding or the end token predict padding alone and count nothing.

    Args:
        temperature: T, above 0.
        over: tokens after which nothing is predicted: pad and end.
    """

    name = "step_kl"
    same_shape = False  # the states beside the logits have each side's own size

    def __init__(self, *, temperature: float = 1.0, over: Sequence[int] = (0, 2)) -> None:
        self.temperature, self.over = temperature, tuple(over)

    def __call__(self, call: LossInputs) -> Tensor:
        """The loss, in nats a sequence."""
        tokens = call.inputs[0]
        keep = torch.ones_like(tokens, dtype=torch.bool)
        for token in self.over:
            keep &= tokens != token
        ours, theirs = tensors_of(call.student)[0], tensors_of(call.teacher)[0]
        return step_kl(ours, theirs, keep=keep, temperature=self.temperature)


LOSSES: dict[str, Callable[[float], Loss]] = {
    "mse": lambda _: FunctionLoss(mse),
    "l1": lambda _: FunctionLoss(l1),
    "cross_entropy": lambda t: FunctionLoss(cross_entropy, temperature=t),
    "kl": lambda t: FunctionLoss(kl_divergence, name="kl", temperature=t),
    "bernoulli_kl": lambda t: FunctionLoss(bernoulli_kl, temperature=t),
    "gaussian_kl": lambda _: FunctionLoss(gaussian_kl, each=False),
    "attention": lambda _: FunctionLoss(attention_transfer, name="attention", same_shape=False),
    "similarity": lambda _: FunctionLoss(
        similarity_preserving, name="similarity", same_shape=False
    ),
    "cka": lambda _: FunctionLoss(linear_cka, name="cka", same_shape=False),
    "step_kl": lambda t: StepKL(temperature=t),
}


def make_losses(given: Any, *, temperature: float = 1.0) -> list[tuple[Loss, float]]:
    """Losses and their weights.

    Args:
        given: a name in `LOSSES`, a `Loss`, a function of (student output, teacher output), a
            sequence of these, a mapping from names to weights, or None for no loss.
        temperature: of the losses that are given by name and have one.

    Raises:
        ValueError: for an unknown name, with the valid ones.

    >>> [(loss.name, weight) for loss, weight in make_losses({"mse": 1.0, "l1": 0.5})]
    [('mse', 1.0), ('l1', 0.5)]
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [(_one(spec, temperature), float(weight)) for spec, weight in given.items()]
    several = isinstance(given, Sequence) and not isinstance(given, str)
    return [(_one(spec, temperature), 1.0) for spec in (given if several else [given])]


def _one(spec: Any, temperature: float) -> Loss:
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, str):
        if spec not in LOSSES:
            raise ValueError(f"loss={spec!r}: valid are {list(LOSSES)}, a Loss or a function")
        return LOSSES[spec](temperature)
    if callable(spec):
        function: Callable[..., Any] = spec
        options: dict[str, Any] = {"each": False, "same_shape": False}
        if "temperature" in inspect.signature(function).parameters:
            options["temperature"] = temperature
        return FunctionLoss(function, **options)
    raise TargetError(f"loss={spec!r}: give a name in {list(LOSSES)}, a Loss or a function")
