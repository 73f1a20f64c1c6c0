"""Marks of a whole model in one file, beside its weights: what it predicts, and whether its schedule ends in noise.

Such a file has no scheduler's configuration, and the one that it is read with may be another model's. What tells are two empty
tensors, by which ComfyUI and Forge go and which our own export writes, and a field of the header (Stability's ModelSpec), if it
says ``v``: its ``epsilon`` is what trainers write by default, and says nothing against a configuration.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

V_PREDICTION, ENDS_IN_NOISE = "v_pred", "ztsnr"
"""Names of the tensors; the second means something beside the first alone."""
_FIELD = "modelspec.prediction_type"
_PREDICTIONS = {"v": "v_prediction"}


@dataclass(frozen=True)
class Marks:
    """The marks of a file; mostly there are none."""

    prediction_type: str = ""
    ends_in_noise: bool = False

    @property
    def of_scheduler(self) -> dict[str, Any]:
        """The marks in a scheduler's configuration."""
        said: dict[str, Any] = {"prediction_type": self.prediction_type} if self.prediction_type else {}
        if self.ends_in_noise:  # and there sampling has to begin (Lin et al. 2023, arXiv 2305.08891)
            said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return said


def marks_of(names: Container[str], header: Mapping[str, str]) -> Marks:
    """The marks of a file with tensors of these ``names``; they count for more than the header, which tools copy along."""
    if V_PREDICTION in names:
        return Marks("v_prediction", ENDS_IN_NOISE in names)
    return Marks(_PREDICTIONS.get(header.get(_FIELD, ""), ""))


def obeyed(scheduler: Any, marks: Marks) -> Any:
    """The scheduler as the file's own words have it."""
    said = marks.of_scheduler
    return type(scheduler).from_config({**scheduler.config, **said}) if said else scheduler
