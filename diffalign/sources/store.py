"""Trajectories on disk, with what made them, so that people can look at their pictures before anybody learns from them.

    rollout.json                       what made them (``TrajectoryOrigin``), readable
    trajectories/00000.safetensors     a bounded number of them each, written aside and renamed: a shard is whole or not there

Twenty steps of SD1.5 are 1.4 MB, a thousand of them 1.4 GB; rows are read through memory maps, one by one. What is kept is the
chain and the log-densities under the model that made it; the network's predictions, as large again, are not needed any more.

Latents stay in the precision they were sampled in. Rounded afterwards they would be another chain, whose densities nobody has
computed: at the low noise levels a step's deviation is a few hundredths, and float16 is off by up to a thousandth at values of 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffalign.differences import differences, plain
from diffalign.errors import UserError
from diffalign.schedule import Schedule
from diffalign.sources.rollout import Sampling, Trajectory
from diffalign.written_aside import PARTIAL, file_aside, write_file

VERSION = 1
"""Raise it when the files change their meaning."""
ABOUT, SHARDS = "rollout.json", "trajectories"
PER_SHARD = 32
"""Trajectories, at least: 44 MB of SD1.5, and what a killed run has to make again."""
_KEPT = tuple(f.name for f in fields(Trajectory) if f.name != "prediction")


@dataclass(frozen=True)
class TrajectoryOrigin:
    """Everything that the trajectories of a store depend on. ``per_prompt`` pictures belong to each entry of ``prompts``."""

    sampling: Sampling
    schedule: Mapping[str, Any]  # ``schedule_fingerprint``
    model: Mapping[str, Any]  # digests and the like, plain values: which network sampled, and how it computed
    prompts: tuple[str, ...]  # may repeat: each entry is a group of pictures by itself
    per_prompt: int
    same_start: bool  # the pictures of a group from the same x_T
    seed: int
    called: Mapping[str, Any] = field(default_factory=dict, compare=False)  # what a person calls the model; decides nothing

    def __len__(self) -> int:
        """How many trajectories there are."""
        return len(self.prompts) * self.per_prompt

    def group(self, number: int) -> int:
        """Which of ``prompts`` trajectory ``number`` is for."""
        return number // self.per_prompt

    def picture(self, number: int) -> str:
        """The name of its picture: 00012-1 is the second picture of the thirteenth prompt."""
        return f"{self.group(number):05d}-{number % self.per_prompt}"

    def to_plain(self) -> dict[str, Any]:
        return {"version": VERSION, **plain(asdict(self))}

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> TrajectoryOrigin:
        """Raises KeyError or TypeError if a value is missing or unknown."""
        known = {f.name: values[f.name] for f in fields(TrajectoryOrigin)}
        return TrajectoryOrigin(**{**known, "sampling": Sampling(**values["sampling"]), "prompts": tuple(values["prompts"])})


def schedule_fingerprint(schedule: Schedule) -> dict[str, Any]:
    """What a chain depends on beside the network, as plain values."""
    return plain(schedule.fingerprint())


class Store:
    """The trajectories in a folder. ``made`` says what made them; they are numbered group by group."""

    def __init__(self, folder: Path, made: TrajectoryOrigin, per_shard: int) -> None:
        self.folder, self.made, self._per_shard = folder, made, per_shard
        self._open: dict[int, Any] = {}

    # ------------------------------------------------------------------------------------------------------------ writing

    @classmethod
    def create(cls, folder: str | Path, made: TrajectoryOrigin, batch_size: int = 1) -> Store:
        """A store to write into: a new one, or the one that is there, whole or in part, if it was made so.

        Shards hold a whole number of batches of ``batch_size``, so that a killed run which goes on makes the very batches that
        it would have made.

        Raises:
            UserError: the folder holds trajectories that were made otherwise.
        """
        folder = Path(folder)
        if (folder / ABOUT).is_file():
            known, per_shard = _read_about(folder)
            _refuse_others(folder, known, made)
        else:
            per_shard = -(-PER_SHARD // batch_size) * batch_size
            about = {**made.to_plain(), "per_shard": per_shard}
            write_file(folder / ABOUT, json.dumps(about, ensure_ascii=False, indent=1) + "\n", lasting=True)
        for leftover in (folder / SHARDS).glob("*" + PARTIAL):
            leftover.unlink()
        return cls(folder, made, per_shard)

    def missing(self) -> list[range]:
        """The numbers of the trajectories that are not there yet, shard by shard."""
        count = len(self.made)
        shards = [range(low, min(low + self._per_shard, count)) for low in range(0, count, self._per_shard)]
        return [numbers for shard, numbers in enumerate(shards) if not self._path(shard).is_file()]

    def write(self, numbers: range, trajectories: Trajectory) -> None:
        """One shard, as ``missing`` named it. Raises UserError if the disk refuses; what was there is untouched."""
        if len(trajectories) != len(numbers) or numbers.start % self._per_shard:
            raise ValueError(f"shards are written whole: got {len(trajectories)} trajectories for the numbers {numbers}")
        tensors = {name: getattr(trajectories, name).contiguous().clone() for name in _KEPT}  # shared memory would be refused
        with file_aside(self._path(numbers.start // self._per_shard), lasting=True) as aside:
            save_file(tensors, aside)

    # ------------------------------------------------------------------------------------------------------------ reading

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """A complete store. Raises UserError if there is none, or one that is not complete."""
        folder = Path(folder)
        store = cls(folder, *_read_about(folder))
        if missing := sum(len(numbers) for numbers in store.missing()):
            raise UserError(
                f"{folder} holds {len(store.made) - missing} of {len(store.made)} trajectories: the rollout was stopped. "
                "The same `diffalign rollout` goes on where it was."
            )
        return store

    def read(self, numbers: Sequence[int]) -> Trajectory:
        """The trajectories of these numbers, in that order. ``prediction`` is not kept: it is [B, 0, C, H, W]."""
        rows = [self._row(number) for number in numbers]
        read = {name: torch.cat([row[name] for row in rows]) for name in _KEPT}
        return Trajectory(prediction=read["x"][:, :0], **read)

    def _row(self, number: int) -> dict[str, torch.Tensor]:
        shard, row = divmod(number, self._per_shard)
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self._path(shard), framework="pt")
            return {name: self._open[shard].get_slice(name)[row : row + 1] for name in _KEPT}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._path(shard)} is damaged: {error}. Delete it; the same `diffalign rollout` makes it again."
            ) from error

    def _path(self, shard: int) -> Path:
        return self.folder / SHARDS / f"{shard:05d}.safetensors"


def _read_about(folder: Path) -> tuple[TrajectoryOrigin, int]:
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"There are no trajectories in {folder} (no {ABOUT}): `diffalign rollout --out {folder}` makes them.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise UserError(f"{path} is of version {values['version']}, and this diffalign reads version {VERSION}.")
        return TrajectoryOrigin.from_plain(values), int(values["per_shard"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}).") from error


def _refuse_others(folder: Path, known: TrajectoryOrigin, asked: TrajectoryOrigin) -> None:
    found, wanted = ({k: v for k, v in made.to_plain().items() if k != "called"} for made in (known, asked))
    if told := differences(found, wanted):
        raise UserError(
            f"{folder} holds trajectories that were made otherwise: {told}. Give another folder, or the same settings to go on."
        )
