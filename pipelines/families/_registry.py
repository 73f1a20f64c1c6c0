"""Which families there are, and what each says about itself.

The folder ``families`` is the registry. A family's file declares, as literals:

    PIPELINES       names of the Diffusers pipeline classes it serves; single files are read with the first
    SINGLE_FILE     types of single files it serves, in the words of Diffusers' ``infer_diffusers_model_type``
    NETWORK         the pipeline's attribute that is trained
    NETWORK_CLASS   its class in Diffusers, if that reads single files of it alone (may be missing)
    LEFT_OUT        arguments to ``from_pretrained`` that leave out what neither training nor sampling needs
    CALL            arguments to the pipeline's call that make it sample just what was asked for (may be missing)
    OPTIONAL        parts that a person may leave out, by a word for them (may be missing)
    NO_GUIDANCE     the guidance scale that is none to the pipeline, where that is not 1 (may be missing)
    EMBEDS_GUIDANCE whether guidance is an input of networks with ``guidance_embeds``, and there is no other (may be missing)
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import UserError


@dataclass(frozen=True)
class Declared:
    """What a family's file declares."""

    PIPELINES: tuple[str, ...]
    SINGLE_FILE: tuple[str, ...]
    NETWORK: str
    LEFT_OUT: Mapping[str, Any]
    CALL: Mapping[str, Any] = field(default_factory=dict)
    OPTIONAL: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    NETWORK_CLASS: str = ""
    NO_GUIDANCE: float = 1.0
    EMBEDS_GUIDANCE: bool = False


def registry() -> dict[str, Declared]:
    """Families by name, read from the files beside this one without importing them."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: _declared(path) for path in files}


@functools.cache
def _declared(path: Path) -> Declared:
    wanted = Declared.__dataclass_fields__
    found = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted:
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return Declared(**found)


def call_options(pipeline_class: str) -> dict[str, Any]:
    """Arguments of the call of such a pipeline, beside the prompt, that make it sample just what was asked for."""
    return next((dict(d.CALL) for d in registry().values() if pipeline_class in d.PIPELINES), {})


def family_of(pipeline_class: str, where: Path | str) -> str:
    families = registry()
    for name, declared in families.items():
        if pipeline_class in declared.PIPELINES:
            return name
    known = ", ".join(c for declared in families.values() for c in declared.PIPELINES)
    raise UserError(f"{where} says that this is a {pipeline_class}, which diffalign does not know. Known are: {known}.")
