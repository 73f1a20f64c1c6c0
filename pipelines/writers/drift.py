"""The distances of the winners from their prompts in a writer's training data, kept with the writer.

They are in ``distances.json`` in the folder of a run of Sem-DPO. From them follows, for any threshold, the drift that the weights
predict (``objectives.sem_dpo.tilted``), to be compared with what is measured of the writer in the same embedding.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffalign.errors import UserError
from diffalign.objectives.sem_dpo import Tilt, tilted
from pipelines.outputs import write_json

DISTANCES_FILE = "distances.json"


@dataclass(frozen=True)
class Drift:
    """The distances of the winners that a writer was trained on, and the strength of the weights."""

    alpha: float  # a winner at the distance d has the weight exp(-alpha d)
    embedding: str  # name of the embedding; "the data" where the distances were a column
    fingerprint: str  # fingerprint of the embedding; empty where the distances were a column
    distances: list[float]  # 1 - cos, in [0, 2]

    def predicted_drift(self, delta: float) -> Tilt:
        """The distances as the weights see them, and the bound on the share of winners further than ``delta``."""
        return tilted(torch.tensor(self.distances, dtype=torch.float64), self.alpha, delta)

    def write(self, folder: Path) -> None:
        """Write ``distances.json`` into the writer's folder."""
        write_json(folder / DISTANCES_FILE, asdict(self))


def read_drift(folder: str | Path) -> Drift | None:
    """Read ``distances.json`` from a writer's folder; None where there is none.

    Raises:
        UserError: the file is not one that ``Drift.write`` wrote.
    """
    path = Path(folder).expanduser() / DISTANCES_FILE
    if not path.is_file():
        return None
    try:
        return Drift(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not as a run of Sem-DPO wrote it ({error}).") from error
