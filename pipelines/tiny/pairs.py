"""Synthetic preference pairs of the tiny world, in the on-disk format of Pick-a-Pic v2.

Pictures of one caption from a checkpoint, judged by the oracle, preferred by the synthetic people, and written as the parquet
that Pick-a-Pic v2 uses, so that the reader for the real data set is what gets exercised.

The shipped ``pairs.parquet`` is ``diffalign world pairs --n 1000 --seed 1 --candidates 4``, seven minutes on two cores.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffalign.written_aside import write_file
from pipelines import sampling
from pipelines.tiny import scenes
from pipelines.tiny.check import BATCH, STEPS, Progress, require_tiny
from pipelines.tiny.people import TIE, People
from reward_models import oracle

if TYPE_CHECKING:
    import pyarrow as pa
    from diffusers import StableDiffusionPipeline

JPEG_QUALITY = 95
_EPOCH = dt.datetime(2024, 1, 1)
"""``created_at`` of the first pair, one second more for each next: a clock would make equal runs differ."""


@dataclass(frozen=True)
class PairRecord:
    """One judged pair. ``label_0`` is 1.0 if picture 0 is preferred, 0.0 if picture 1, 0.5 for a tie."""

    caption: str
    jpg_0: bytes
    jpg_1: bytes
    label_0: float
    user_id: int
    model_0: str
    model_1: str

    def __post_init__(self) -> None:
        if self.label_0 not in (0.0, TIE, 1.0):
            raise ValueError(f"label_0 is 1.0, 0.0 or 0.5 (a tie); got {self.label_0}")


def encode_jpeg(picture: Image.Image) -> bytes:
    """Quality 95, colour at full resolution (4:4:4): half of a 64-pixel picture's colour edges would be lost otherwise."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def image_uid(jpg: bytes) -> str:
    """The picture's name: the first 32 hexadecimal digits of its SHA-256, grouped like the UUIDs of Pick-a-Pic."""
    digits = hashlib.sha256(jpg).hexdigest()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:32]))


# ---------------------------------------------------------------------------------------------------------------- sampling


def sample_pairs(
    pipe: StableDiffusionPipeline,
    n: int,
    seed: int = 0,
    *,
    people: People | None = None,
    candidates: int = 2,
    styled: float = 0.1,
    split: str = "train",
    steps: int = STEPS,
    guidance_scale: float | None = None,
    batch: int = BATCH,
    model_name: str = "tiny",
    progress: Progress | None = None,
) -> list[PairRecord]:
    """``n`` pairs: captions of a split (a share ``styled`` with style words), pictures of each from different seeds.

    Of ``candidates`` pictures of a caption people are shown the two that the oracle finds furthest apart: two candidates are
    Pick-a-Pic's way, more give pairs that differ in what people care about, as data sets made of best and worst do.
    Captions, noise and answers depend on ``seed`` alone (``people`` may have another). Sampling is DDIM at the model's own
    guidance unless told otherwise. People see the pictures as they are stored, after JPEG.

    Raises:
        UserError: the model does not draw pictures of the tiny world's size.
    """
    require_tiny(pipe)
    people = people or People(seed=seed)
    captions = [caption for _, caption in islice(scenes.stream(seed, split, styled), n)]
    repeated = [caption for caption in captions for _ in range(candidates)]
    options = {"steps": steps, "guidance_scale": guidance_scale, "batch_size": batch, "progress": progress}
    pictures = sampling.sample(pipe, repeated, seeds=sampling.picture_seeds(n, candidates, seed), **options)
    encoded = [encode_jpeg(p) for p in pictures]
    return [
        _ask(people, i, caption, encoded[candidates * i : candidates * (i + 1)], model_name) for i, caption in enumerate(captions)
    ]


def _ask(people: People, question: int, caption: str, jpgs: Sequence[bytes], model_name: str) -> PairRecord:
    rng = people.generator(question)
    verdicts = [oracle.judge(Image.open(io.BytesIO(jpg)), caption) for jpg in jpgs]
    shown = _furthest_apart([people.utility(v) for v in verdicts])
    jpg_0, jpg_1 = (jpgs[i] for i in shown)
    user = people.pick_person(rng)
    return PairRecord(caption, jpg_0, jpg_1, people.choose(*(verdicts[i] for i in shown), rng), user, model_name, model_name)


def _furthest_apart(utilities: Sequence[float]) -> list[int]:
    """Places of the lowest and the highest utility, in the order in which the pictures were drawn."""
    order = sorted(range(len(utilities)), key=lambda i: utilities[i])
    return sorted((order[0], order[-1]))


@dataclass(frozen=True)
class PairFigures:
    """What a set of pairs is like: shares in [0, 1]."""

    pairs: int
    ties: float
    agreement: float | None  # of the pairs that are no tie, how many prefer what the oracle finds better; None if all tie
    captions: int  # different ones


def describe(records: Sequence[PairRecord]) -> PairFigures:
    """Ties, and how far the labels agree with the oracle's utility (taste and faithfulness in equal parts)."""
    right = []
    for r in records:
        u_0, u_1 = (oracle.judge(Image.open(io.BytesIO(jpg)), r.caption).utility for jpg in (r.jpg_0, r.jpg_1))
        if r.label_0 != TIE and u_0 != u_1:
            right.append((u_0 > u_1) == (r.label_0 == 1.0))
    ties = sum(r.label_0 == TIE for r in records) / max(len(records), 1)
    agreement = sum(right) / len(right) if right else None
    return PairFigures(len(records), ties, agreement, len({r.caption for r in records}))


# ----------------------------------------------------------------------------------------------------------------- parquet


def schema() -> pa.Schema:
    """Pick-a-Pic v2's columns and types, in its order."""
    import pyarrow as pa

    text, integer = pa.string(), pa.int64()
    return pa.schema(
        [
            ("are_different", pa.bool_()),
            ("best_image_uid", text),
            ("caption", text),
            ("created_at", pa.timestamp("ns")),
            ("has_label", pa.bool_()),
            ("image_0_uid", text),
            ("image_0_url", text),
            ("image_1_uid", text),
            ("image_1_url", text),
            ("jpg_0", pa.binary()),
            ("jpg_1", pa.binary()),
            ("label_0", pa.float64()),
            ("label_1", pa.float64()),
            ("model_0", text),
            ("model_1", text),
            ("ranking_id", integer),
            ("user_id", integer),
            ("num_example_per_prompt", integer),
        ]
    )


def _row(record: PairRecord, number: int, of_caption: int) -> dict[str, Any]:
    uids = image_uid(record.jpg_0), image_uid(record.jpg_1)
    best = {1.0: uids[0], 0.0: uids[1], TIE: "tie"}[record.label_0]
    return {
        "are_different": uids[0] != uids[1],
        "best_image_uid": best,
        "caption": record.caption,
        "created_at": _EPOCH + dt.timedelta(seconds=number),
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": "",
        "image_1_uid": uids[1],
        "image_1_url": "",
        "jpg_0": record.jpg_0,
        "jpg_1": record.jpg_1,
        "label_0": record.label_0,
        "label_1": 1.0 - record.label_0,
        "model_0": record.model_0,
        "model_1": record.model_1,
        "ranking_id": number,
        "user_id": record.user_id,
        "num_example_per_prompt": of_caption,
    }


def write_pairs(records: Sequence[PairRecord], path: Path, rows_per_group: int = 256) -> None:
    """Write a parquet file whose bytes depend on the records alone; an older file stays until the new one is whole.

    Raises:
        UserError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts = Counter(r.caption for r in records)
    rows = [_row(r, i, counts[r.caption]) for i, r in enumerate(records)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema()), sink, row_group_size=rows_per_group)
    write_file(Path(path), sink.getvalue().to_pybytes())
