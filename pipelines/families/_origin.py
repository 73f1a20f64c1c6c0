"""Where a checkpoint comes from: enough to read it again, whatever it was called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import UserError
from pipelines.families._hub import lora_on_hub
from pipelines.families._marks import Marks
from pipelines.families._names import NOTE_FILE
from pipelines.families._registry import registry


@dataclass(frozen=True)
class BaseLora:
    """A LoRA that is part of what is called the base: merged into it before anything else happens."""

    path: str  # the file, absolute
    sha256: str  # of the file
    hub: str = ""  # org/name/FILE, if it came from there

    def note(self) -> dict[str, str]:
        """Plain values for a result's note."""
        return {name: value for name, value in vars(self).items() if value}

    def local(self) -> Path:
        """The file, fetched again where a copy of the hub's is gone. It need not be there, nor be the same."""
        return lora_on_hub(self.hub) if self.hub and not Path(self.path).is_file() else Path(self.path)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: enough to read it, or the rest of it, again."""

    model: str  # what to call it later, from any folder: "tiny", a hub id, or an absolute path
    place: str  # the folder, file or hub id that is read
    kind: Literal["folder", "file", "hub", "network"]  # the last: a file with the network alone
    family: str
    pipeline_class: str
    config: str | None = None  # a Diffusers folder with the configuration for a single file, and with what it does not hold
    rest: str | None = None  # of a network alone: the folder or hub id that has all else
    adapter: str | None = None  # a folder with a LoRA on top
    lacks: tuple[str, ...] = ()  # parts of the pipeline that the checkpoint does not have
    without: tuple[str, ...] = ()  # what it has and is left out, in the words of the family's ``OPTIONAL``
    base_loras: tuple[BaseLora, ...] = ()  # merged into the weights, in this order, below the one on top
    marks: Marks = Marks()  # what a single file says of itself, which counts for more than its configuration

    def leaving_out(self, words: Sequence[str]) -> Origin:
        """The same without the parts that the family knows by these ``words``, nor those that are left out already.

        Raises:
            UserError: the family knows no such part, or cannot do without.
        """
        known = registry()[self.family].OPTIONAL
        if odd := [word for word in words if word not in known]:
            may = f"what may be left out is {', '.join(known)}" if known else "nothing may be left out of it"
            raise UserError(f"{self.model} is of the family {self.family}, which cannot do without {odd[0]!r}: {may}.")
        return replace(self, without=tuple(dict.fromkeys((*self.without, *words))))

    @property
    def parts_left_out(self) -> tuple[str, ...]:
        """The attributes of the pipeline that ``without`` stands for."""
        known = registry()[self.family].OPTIONAL
        return tuple(part for word in self.without for part in known[word])

    @property
    def configured_at(self) -> str | None:
        """The Diffusers folder or hub id that has the configurations of all parts; None of a single file by itself."""
        return self.config or self.rest or (None if self.kind == "file" else self.place)

    @property
    def scheduler_file(self) -> str:
        """The file that says what the network predicts."""
        if self.marks.prediction_type:
            return self.place
        return str(Path(self.configured_at or self.place) / "scheduler" / "scheduler_config.json")

    @property
    def own_words(self) -> str:
        """A line on what a single file says of itself, against which its configuration has no say; empty if it says nothing."""
        if not self.marks.prediction_type:
            return ""
        end = ", on a schedule that ends in pure noise" if self.marks.ends_in_noise else ""
        said = f"{self.place} says itself that it is of {self.marks.prediction_type} prediction{end}"
        return f"{said}: so it is used, whatever its configuration says"


def recorded_loras(folder: Path) -> tuple[BaseLora, ...]:
    """The LoRAs that the result in ``folder`` was trained on top of."""
    return tuple(BaseLora(**lora) for lora in note_of(folder).get("base_loras", ()))


def note_of(folder: Path) -> dict[str, Any]:
    """What diffalign wrote beside a result; nothing, if it did not make it."""
    note = folder / NOTE_FILE
    return json.loads(note.read_text("utf-8")) if note.is_file() else {}
