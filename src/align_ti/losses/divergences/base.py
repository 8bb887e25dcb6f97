"""The base class of divergences: one value per row, and its gradient at the student's logits."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import BeforeValidator, PlainSerializer
from pydantic_core import PydanticCustomError
from torch import Tensor

from align_ti.options import Options, checked
from align_ti.registry import lookup, names, suggestion

Rows = Float[Tensor, "rows vocab"]
"""One distribution a row, as log probabilities or as anything that is made of them."""


class Divergence(Options):
    """The divergence of the student's distribution q from the teacher's p: one value per row in nats, and its gradient at the
    student's logits.

    A divergence of your own derives from this class, sets `name`, declares its options as fields, and defines `values`. Its
    gradient is computed by autograd unless `with_slope` is defined too, which saves time and memory.
    `align_ti.testing.check_divergence` tests it: 0 if both are equal, never below 0, gradient equal to autograd's.
    """

    kind: ClassVar[Literal["divergence"]] = "divergence"
    name: ClassVar[str]
    """Its name in recipes."""

    def values(self, log_p: Rows, log_q: Rows) -> Float[Tensor, " rows"]:
        """The divergence of each row in nats, by differentiable PyTorch functions.

        Args:
            log_p: the teacher's log probabilities; minus infinity at a token of probability 0.
            log_q: the student's log probabilities.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no values")

    def with_slope(self, log_p: Rows, log_q: Rows) -> tuple[Float[Tensor, " rows"], Rows]:
        """`values`, and their slope: the gradient of each row's value with respect to the logits before the softmax of `log_q`.

        Both arguments may be overwritten.
        """
        with torch.enable_grad():
            # The softmax of log probabilities is the distribution itself, and its slope that of the logits.
            logits = log_q.detach().requires_grad_()
            values = self.values(log_p, logits.log_softmax(-1))
            (slope,) = torch.autograd.grad(values.sum(), logits)
        return values.detach(), slope

    def described(self) -> dict[str, Any]:
        """Name and options, as in a recipe."""
        return {"name": self.name, **self.model_dump(mode="json")}


def read_divergence(given: Any) -> Divergence:
    """A divergence from its name, or from a mapping of `name` and options; one that is made already stays as it is.

    Raises:
        PydanticCustomError: no such name; ValidationError: a wrong option.
    """
    if isinstance(given, Divergence):
        return given
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, dict) or "name" not in options:
        raise PydanticCustomError(
            "sentence",
            "is {found}; accepted: the name of a divergence ({names}), or a section with name and its options",
            {"found": repr(given), "names": ", ".join(names("divergence"))},
        )
    name = options["name"]
    if name not in names("divergence"):
        raise PydanticCustomError(
            "sentence",
            "is no known divergence: {name}; {hint}",
            {"name": repr(name), "hint": suggestion("divergence", str(name))},
        )
    found: type[Divergence] = lookup("divergence", name)
    return checked(found, {key: value for key, value in options.items() if key != "name"})


AnyDivergence = Annotated[Divergence, BeforeValidator(read_divergence), PlainSerializer(Divergence.described)]
"""The type of an option that takes any divergence: by name, by name and options, or made already."""


# --- what divergences are made of -------------------------------------------------------------------------------------


def times(p: Rows, log_ratio: Rows) -> Rows:
    """p * log_ratio, and 0 where p is 0: a token that is ruled out entirely (log 0) costs nothing, not 0 * inf."""
    return torch.where(p == 0, 0.0, p * log_ratio)


def log_mixture(log_p: Rows, log_q: Rows, share: float) -> Rows:
    """The log of share * p + (1 - share) * q, for a share between 0 and 1."""
    if share == 0:
        return log_q
    weights = torch.tensor([share, 1 - share], dtype=log_p.dtype, device=log_p.device).log()
    return torch.logaddexp(log_p + weights[0], log_q + weights[1])


def through_softmax(derivative: Rows, q: Rows) -> Rows:
    """The slope at the logits of q = softmax(logits), from the derivative with respect to log q, each token taken by itself:
    g_j - q_j * sum over k of g_k."""
    return derivative - q * derivative.sum(-1, keepdim=True)
