"""From a function to something that ``--loss NAME`` can mean: what it needs, its settings, and a uniform way to call it.

``@loss(...)`` over a pure function is all there is to do. What the function needs is read from its parameters (``ratio``,
``policy``, ``reference``, ``rewards``, ``baseline``, ``label``); the other parameters are its settings, each declared once, in
the decorator, with help and bounds. The function itself stays as it was.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from diffalign.errors import UserError
from diffalign.losses.baselines import Baseline
from diffalign.losses.divergences import Divergence, transformed
from diffalign.settings import check_options, option
from diffalign.types import LogLikelihood, LogRatio

Scale = Literal["beta-scaled", "absolute"]


@dataclass(frozen=True)
class Evidence:
    """What an objective knows about a batch of pairs. It fills in what it has; a loss says which fields it ``needs``."""

    label: Tensor  # [B] probability that the winner is preferred; 1/2 is a tie
    ratio: LogRatio | None = None  # [B] each: policy against reference
    policy: LogLikelihood | None = None  # [B] each, e.g. minus the denoising error
    reference: LogLikelihood | None = None  # [B] each
    rewards: Tensor | None = None  # [B, 2] a judge's scores of winner and loser
    baseline: Tensor | float | None = None  # scalar in units of a log-ratio; see ``Loss.baseline``


@dataclass(frozen=True)
class Extras:
    """What can be added to a loss whatever its formula."""

    divergence: Divergence = option("reverse-kl", "divergence that ties the policy to the reference (losses on log-ratios)")
    divergence_alpha: float = option(0.5, "order of the alpha divergence; 1 is reverse-kl")
    sft_weight: float = option(
        0.0,
        "weight of an added SFT term on the winner, times what multiplies log-ratios (beta; beta / 2 for denoising errors)",
        ge=0,
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Loss:
    """A loss by name: ``load("rdpo", noise=0.2)(evidence, beta)`` is one number per pair [B].

    ``beta`` stays with the objective, which knows in what units its likelihoods are.
    """

    name: str
    paper: str  # arXiv number
    summary: str  # first line of the function's docstring
    function: Callable[..., Tensor]
    needs: frozenset[str]  # fields of Evidence
    Settings: type  # frozen dataclass of the loss's own constants, made with ``option``
    settings: Any  # an instance of it
    scale: Scale = "beta-scaled"
    mixes_batch: bool = False  # a pair's loss depends on the others of its batch: give it more than one
    baseline: type[Baseline] | None = None  # what keeps ``Evidence.baseline``: update it with what it ``watches``
    extras: Extras = field(default_factory=Extras)

    def __post_init__(self) -> None:
        """Raise ValueError for a divergence that the loss cannot have: known here, before any data are encoded."""
        if self.extras.divergence == "reverse-kl":
            return
        if "ratio" not in self.needs:
            raise ValueError(f"the loss {self.name!r} does not see log-ratios: a divergence cannot change it")
        if self.baseline:
            raise ValueError(f"the loss {self.name!r} has a baseline in log-ratios: it goes with reverse-kl only")

    def __call__(self, evidence: Evidence, beta: float) -> Tensor:
        """Losses [B] of the pairs. Raises ValueError if the evidence lacks something that the loss needs."""
        self._check(evidence)
        given: dict[str, Any] = {name: getattr(evidence, name) for name in self.needs}
        if self.extras.divergence != "reverse-kl":
            given["ratio"] = transformed(given["ratio"], self.extras.divergence, self.extras.divergence_alpha, temper=beta)
        if "beta" in inspect.signature(self.function).parameters:
            given["beta"] = beta
        value = self.function(**given, **dataclasses.asdict(self.settings))
        if self.extras.sft_weight:
            likelihood = load("sft").function(policy=evidence.policy, label=evidence.label)
            value = value + self.extras.sft_weight * beta * likelihood
        return value

    def _check(self, evidence: Evidence) -> None:
        needed = self.needs | ({"policy"} if self.extras.sft_weight else set())
        missing = sorted(name for name in needed if getattr(evidence, name) is None)
        if missing:
            raise ValueError(f"the loss {self.name!r} needs {' and '.join(missing)}, which this objective does not give")


# ---------------------------------------------------------------------------------------------------------- registering

_LOSSES: dict[str, Loss] = {}
_EVIDENCE = frozenset(f.name for f in dataclasses.fields(Evidence))


def loss(
    paper: str,
    scale: Scale = "beta-scaled",
    mixes_batch: bool = False,
    baseline: type[Baseline] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the function below under its own name (``apo_zero`` as ``apo-zero``); ``settings`` are ``option`` fields.

    Raises:
        UserError: there are no brackets with a paper; the name is a shipped loss's; parameters and ``settings`` differ.
    """
    if callable(paper):
        raise UserError(f'Name a paper, or "own", above {paper.__name__}: @diffalign.losses.loss("own").')

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name, options = function.__name__.replace("_", "-"), dict(settings or {})
        parameters, hints = set(inspect.signature(function).parameters), typing.get_type_hints(function)
        if name in _LOSSES and _is_shipped(_LOSSES[name].function) and not _is_shipped(function):
            raise UserError(f"There is a loss {name!r} already: give yours another name.")
        if unlike := sorted((parameters - _EVIDENCE - {"beta"}) ^ options.keys()):
            raise UserError(
                f"The loss {name!r}: a parameter that is no evidence ({', '.join(sorted(_EVIDENCE))}, beta) needs a setting of "
                f"its name in `settings`, and each setting a parameter; these have no counterpart: {', '.join(unlike)}."
            )
        kind = dataclasses.make_dataclass(
            f"{function.__name__.title().replace('_', '')}Settings",
            [(key, hints[key], value) for key, value in options.items()],
            namespace={"__doc__": f"Constants of the loss {name}.", "__post_init__": check_options},
            frozen=True,
        )
        kind.__module__ = function.__module__
        _LOSSES[name] = Loss(
            name=name,
            paper=paper,
            summary=next(iter((function.__doc__ or "").splitlines()), ""),
            function=function,
            needs=frozenset(parameters & _EVIDENCE),
            Settings=kind,
            settings=kind(),
            scale=scale,
            mixes_batch=mixes_batch,
            baseline=baseline,
        )
        return function

    return register


def _is_shipped(function: Callable[..., Tensor]) -> bool:
    return function.__module__.startswith("diffalign.losses.")


def names() -> list[str]:
    """The losses, as the command line spells them."""
    return sorted(_LOSSES)


def load(name: str, extras: Extras | None = None, **settings: Any) -> Loss:
    """A loss with its settings. ValueError for an unknown name, a setting out of bounds or a divergence that the loss cannot
    have, TypeError for an unknown setting."""
    if name not in _LOSSES:
        raise ValueError(f"no loss is called {name!r}; there are: {', '.join(names())}")
    found = _LOSSES[name]
    return dataclasses.replace(found, settings=found.Settings(**settings), extras=extras or Extras())


def read_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a loss from text or numbers, each as its declaration has it. Raises ValueError for unknown ones and for
    values that it refuses."""
    if name not in _LOSSES:
        raise ValueError(f"no loss is called {name!r}; there are: {', '.join(names())}")
    hints = typing.get_type_hints(_LOSSES[name].Settings)
    if unknown := sorted(given.keys() - hints.keys()):
        known = ", ".join(hints) or "none"
        raise ValueError(f"the loss {name!r} has no constant {', '.join(unknown)}; its constants are: {known}")
    try:
        read = {key: float(value) if hints[key] is float else value for key, value in given.items()}
    except ValueError as error:
        raise ValueError(f"a constant of the loss {name!r} is not a number: {error}") from error
    _LOSSES[name].Settings(**read)  # checks them
    return read
