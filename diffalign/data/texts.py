"""Rewrites as tokens, and the loader that makes batches of them. No tokenizer here: ids come in, batches go out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffalign.data.ahead import Stopwatch
from diffalign.data.draws import Order
from diffalign.types import TextBatch, Texts

Ids = Sequence[int]


class Ragged(Sequence[Ids]):
    """Sequences of token ids, kept end to end in one array: a million of them fit where lists of Python's integers would not."""

    def __init__(self, rows: Sequence[Ids]) -> None:
        self._ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        self._flat = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(self._ends[-1]) if rows else 0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> list[int]:  # type: ignore[override]
        start = int(self._ends[row - 1]) if row else 0
        return self._flat[start : int(self._ends[row])].tolist()


@dataclass(frozen=True)
class EncodedRewrites:
    """A data set of preferences between rewrites. A completion begins where its prompt ends and carries its end mark.

    Of a data set with one rewrite for each prompt ``loser`` is ``winner``.
    """

    prompt: Sequence[Ids]
    winner: Sequence[Ids]
    loser: Sequence[Ids]
    label: Tensor  # [N] probability that the winner is preferred
    weight: Tensor  # [N]
    distance: Tensor | None = None  # [N] of the winner from its prompt, in [0, 2]
    scores: Tensor | None = None  # [N, 2] float32 of winner and loser, NaN where there is none
    gold: Sequence[Ids] | None = None
    token_rewards: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]] | None = None  # of winner's and loser's tokens
    pad: int = 0

    def __len__(self) -> int:
        return len(self.label)


Factors = Callable[[Tensor], Tensor]
"""Distances [G] of all pairs of an optimizer step, on all processes, to factors [G] on their weights."""


@dataclass(frozen=True)
class TextLoader:
    """Batches by optimizer step: ``steps(start, stop)`` yields lists of ``accumulation`` micro-batches (``learner.Source``).

    Which row comes when follows from ``seed`` and position alone (``data.draws.Order``), as it does for pictures: the global
    batch of a step is cut into contiguous parts, one per process, so the union does not depend on their number.
    """

    data: EncodedRewrites
    rows: Sequence[int]  # those to train on; the others are for validation
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    rank: int = 0
    world: int = 1
    mismatched: bool = False  # batches carry each prompt with the next one's winner, too
    factors: Factors | None = None
    waiting: Stopwatch = field(default_factory=Stopwatch, compare=False)  # how long batches have taken: nothing is made ahead

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise ValueError("there are no rewrites to train on")

    @property
    def global_batch(self) -> int:
        """Pairs per optimizer step over all processes."""
        return self.batch_size * self.accumulation * self.world

    @property
    def distances(self) -> Tensor | None:
        """[rows] of all rows to train on."""
        return None if self.data.distance is None else self.data.distance[list(self.rows)]

    def steps(self, start: int, stop: int) -> Iterator[list[TextBatch]]:
        """The micro-batches of optimizer steps ``start`` to ``stop``."""
        order = Order(len(self.rows), self.seed)
        for step in range(start, stop):
            with self.waiting.running():
                batches = self._step(order, step)
            yield batches

    def _step(self, order: Order, step: int) -> list[TextBatch]:
        positions = range(step * self.global_batch, (step + 1) * self.global_batch)
        rows = [self.rows[order.row(p)] for p in positions]
        factors = self.factors(self.data.distance[rows]) if self.factors else torch.ones(len(rows))
        first = self.rank * self.accumulation * self.batch_size
        parts = [slice(first + m * self.batch_size, first + (m + 1) * self.batch_size) for m in range(self.accumulation)]
        return [collate(self.data, rows[part], factors[part], self.mismatched) for part in parts]


def collate(data: EncodedRewrites, rows: Sequence[int], factors: Tensor, mismatched: bool = False) -> TextBatch:
    """Rows as a batch, their weights multiplied by ``factors``."""
    prompts, rows = [data.prompt[r] for r in rows], list(rows)
    winners = [data.winner[r] for r in rows]
    sides = {"winner": winners, "loser": [data.loser[r] for r in rows]}
    if data.gold is not None:
        sides["gold"] = [data.gold[r] for r in rows]
    if mismatched:
        sides["mismatched"] = winners[1:] + winners[:1]
    texts = {name: Texts.of(prompts, side, data.pad) for name, side in sides.items()}
    longest = max(t.tokens.shape[1] for t in texts.values())
    texts = {name: t.padded(longest) for name, t in texts.items()}
    rewards = None
    if data.token_rewards is not None:
        pairs = zip(("winner", "loser"), data.token_rewards, strict=True)
        rewards = tuple(_in_place(texts[name], [values[r] for r in rows]) for name, values in pairs)
    return TextBatch(
        **texts,
        label=data.label[rows],
        weight=data.weight[rows] * factors,
        index=torch.tensor(rows),
        distance=None if data.distance is None else data.distance[rows],
        scores=None if data.scores is None else data.scores[rows],
        token_rewards=rewards,
    )


def _in_place(texts: Texts, values: Sequence[Sequence[float]]) -> Tensor:
    """[N, S] with the completions' values at the completions' places, zero elsewhere."""
    out = torch.zeros(texts.tokens.shape, dtype=torch.float32)
    out[texts.completion] = torch.tensor([v for row in values for v in row], dtype=torch.float32)
    return out


def validation_batches(data: EncodedRewrites, rows: Sequence[int], batch_size: int) -> list[TextBatch]:
    """Fixed pairs, each once, in the order of the rows, without factors: the same batches at every validation."""
    chunks = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return [collate(data, chunk, torch.ones(len(chunk))) for chunk in chunks]
