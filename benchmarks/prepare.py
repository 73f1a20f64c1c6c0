"""Preparing data: pictures per second, what a kill costs, and memory and start-up by the size of the data set.

    python benchmarks/prepare.py [--shapes tiny quarter] [--pairs 16] [--rounds 3] [--rows 1000 10000 100000]
                                 [--open 1000 100000 1000000] [--json out.json]

Four things, each against its own baseline, on whatever device there is:

    speed      one picture at a time, decoded, transformed and encoded in the loop, as the released training scripts do it;
               against ``build_cache``: threads decode ahead, batches are encoded, shards are written and flushed to the disk.
               Both encode every prompt, too. In one process, in alternation, medians
    kill       a process that fills a cache gets SIGKILL, again and again; counted is what was encoded more than once
    memory     the peak of a fresh process that fills a cache of so many rows, above what it held before (Linux)
    start-up   a fresh process opens a cache, holds out validation rows and makes its first batch: seconds and memory

Kill, memory and start-up use pictures that are drawn when they are asked for and a real encoder that is one convolution, so that
the numbers are those of our own code. For start-up rows share a thousand pictures, and each has a prompt of its own.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.data.cache import PairCache, build_cache
from diffalign.data.cache_values import FillOptions
from diffalign.data.hold_out import split_rows
from diffalign.data.layouts import chosen_rejected
from diffalign.data.loader import LoaderSettings, PairLoader
from diffalign.data.open import open_pairs
from diffalign.data.table import PairTable
from diffalign.data.transform import CENTER, Transform
from pipelines import heap

PIXELS = 16
SHARED = 1000
"""Pictures that the rows of a start-up share."""


class DrawnRows:
    """Rows that exist only when they are asked for; pictures and prompts follow from the number of the row."""

    columns = ("prompt", "chosen", "rejected")
    base = None

    def __init__(self, rows: int, pictures: int) -> None:
        self._rows, self._pictures = rows, pictures
        self.description = f"{rows} drawn rows"

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int, columns: Sequence[str]) -> Mapping[str, Any]:
        first, second = (drawn((2 * index + side) % self._pictures) for side in range(2))
        return {"prompt": f"a picture of a scene with the number {index}", "chosen": first, "rejected": second}

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        return (tuple(self.row(index, ())[name] for name in columns) for index in range(self._rows))

    def schema(self) -> None:
        return None

    def origin(self, index: int) -> str:
        return f"drawn:row {index}"

    def identity(self, images: Sequence[str], others: Sequence[str]) -> list[Any]:
        return ["drawn", self._rows, self._pictures]


@functools.lru_cache(maxsize=2 * SHARED)
def drawn(number: int) -> bytes:
    """A PNG that no other number has."""
    pixels = np.zeros((PIXELS, PIXELS, 3), dtype=np.uint8)
    pixels.reshape(-1)[:64] = np.frombuffer(number.to_bytes(8, "little") * 8, dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def drawn_table(rows: int, pictures: int | None = None) -> PairTable:
    """Pairs whose pictures all differ, or share so many."""
    source = DrawnRows(rows, pictures or 2 * rows)
    return PairTable(source, chosen_rejected, {name: name for name in source.columns}, range(rows), "keep", {})


class SmallEncoder:
    """One convolution for pictures and eight numbers for a prompt. Every picture leaves a byte in ``log``; calls may be slow."""

    def __init__(self, log: Path | None = None, slow: float = 0.0) -> None:
        torch.manual_seed(0)
        self._conv, self._slow = torch.nn.Conv2d(3, 8, 4, stride=4), slow
        self._log = log and log.open("ab", buffering=0)

    def fingerprint(self) -> dict[str, Any]:
        return {"weights": "one convolution"}

    def encode_images(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._log:
            self._log.write(b"." * len(pixels))
        time.sleep(self._slow)
        mean, std = self._conv(pixels).chunk(2, dim=1)
        return {"mean": mean, "std": std.sigmoid()}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        numbers = torch.tensor([[zlib.crc32(prompt.encode()) % 97] for prompt in prompts], dtype=torch.float32)
        return {"encoder_hidden_states": numbers[:, :, None].expand(-1, 2, 4)}


def filled(folder: Path, rows: int, pictures: int | None = None, log: Path | None = None, slow: float = 0.0) -> PairCache:
    """A cache of drawn pairs."""
    options = FillOptions(batch_size=64, workers=2)
    return build_cache(drawn_table(rows, pictures), SmallEncoder(log, slow), folder, Transform(PIXELS), options)


# -------------------------------------------------------------------------------------------------------------------- speed


def speed(shape: str, pairs: int, rounds: int) -> dict[str, Any]:
    """Pictures per second of either way, and their ratio: medians of ``rounds``."""
    from models import SHAPES, build_pipeline, write_pairs

    from pipelines.families import stable_diffusion

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as place:
        pixels = SHAPES[shape]["pixels"]
        table, transform = open_pairs(write_pairs(Path(place), pixels, pairs)), Transform(pixels)
        encoder = stable_diffusion.build(build_pipeline(shape)).encoder
        encoder.work_on(device)
        seconds: dict[str, list[float]] = {"one at a time": [], "batches": []}
        for k in range(-1, rounds):  # the first is to get warm
            for name, way in (("one at a time", one_at_a_time), ("batches", in_batches)):
                start = time.perf_counter()
                way(table, encoder, transform, Path(place) / f"cache {k}")
                seconds[name] += [time.perf_counter() - start] if k >= 0 else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: 2 * pairs / value for name, value in medians.items()}
    return {"shape": shape, "pictures": 2 * pairs, "per_second": rates, "ratio": rates["batches"] / rates["one at a time"]}


@torch.no_grad()
def one_at_a_time(table: PairTable, encoder: Any, transform: Transform, folder: Path) -> list[torch.Tensor]:
    """What the loop of a training script does for every pair, without the training; the latents [C, h, w]."""
    latents = []
    for pair in table:
        for side in pair.sides:
            pixels = transform.apply(pair.side(side).open(), CENTER, False)
            latents.append(encoder.encode_images(pixels[None])["mean"][0].cpu())
        encoder.encode_prompts([pair.prompt])["encoder_hidden_states"].cpu()
    return latents


def in_batches(table: PairTable, encoder: Any, transform: Transform, folder: Path) -> PairCache:
    """As ``--prepare`` does it."""
    with heap.kept():
        return build_cache(table, encoder, folder, transform)


# --------------------------------------------------------------------------------------------------------- in fresh processes


def again(*words: object) -> subprocess.Popen:
    """This program in a process of its own, at one of ``TASKS``."""
    return subprocess.Popen([sys.executable, __file__, "--task", *map(str, words)], stdout=subprocess.PIPE, text=True)


def answer(*words: object) -> dict[str, Any]:
    """What such a process finds."""
    process = again(*words)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{words} ended with status {process.returncode}")
    return json.loads(said)


def kill(rows: int, kills: int) -> dict[str, Any]:
    """Fill a cache and kill whoever does it ``kills`` times, each after another shard or two."""
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place) / "cache", Path(place) / "log"
        for k in range(kills):
            process = again("fill", folder, rows, log, 0.02)
            while len(list(folder.glob("journal/images-*"))) < k + 1:
                if process.poll() is not None:
                    raise RuntimeError("the process ended before it could be killed; give it more rows")
                time.sleep(0.005)
            time.sleep(0.05)  # into the next shard
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        answer("fill", folder, rows, log, 0.0)
        per_shard = json.loads((folder / "complete.json").read_text())["images_per_shard"]
        twice = log.stat().st_size - 2 * rows
    return {"pictures": 2 * rows, "kills": kills, "encoded_again": twice, "per_shard": per_shard}


def fill(folder: str, rows: str, log: str, slow: str) -> dict[str, Any]:
    cache = filled(Path(folder), int(rows), log=Path(log), slow=float(slow))
    return {"pairs": len(cache)}


def memory(rows: str, folder: str = "", pictures: str = "0") -> dict[str, Any]:
    """MiB at the peak above what was held before, private ones and with the mapped files; and pictures per second."""
    with tempfile.TemporaryDirectory() as place:
        filled(Path(place) / "warm", 256)  # libraries load parts of themselves when they are first used
        before, private, start = held("VmRSS"), held("RssAnon"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")
        most, done = private, threading.Event()

        def look() -> None:
            nonlocal most
            while not done.wait(0.01):
                most = max(most, held("RssAnon"))

        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(look)
            filled(Path(folder or place) / "cache", int(rows), int(pictures) or None)
            seconds = time.perf_counter() - start
            done.set()
            looking.result()
    found = {"mib": most - private, "with_mapped_mib": held("VmHWM") - before}
    return {"rows": int(rows), **found, "seconds": seconds}


def start_up(folder: str) -> dict[str, Any]:
    """Seconds to open a cache and to its first batch, and MiB for it: private ones, and of the mapped files."""
    settings = LoaderSettings(batch_size=4)
    before, files, start = held("RssAnon"), held("RssFile"), time.perf_counter()
    cache = PairCache.open(folder)
    opened = time.perf_counter()
    rows, _ = split_rows(cache.prompt_numbers, 64, 0)
    split = time.perf_counter()
    next(PairLoader(cache, rows, settings).steps(0, 1))
    end = time.perf_counter()
    seconds = {"open": opened - start, "split": split - opened, "first batch": end - split}
    return {"rows": len(cache), "seconds": seconds, "mib": held("RssAnon") - before, "mapped_mib": held("RssFile") - files}


def held(what: str) -> float:
    """MiB of this process, as Linux tells it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{what}:"))
    return int(line.split()[1]) / 2**10


def opened(rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        filling = answer("memory", rows, place, SHARED)
        return {**answer("open", Path(place) / "cache"), "filling": filling}


TASKS = {"fill": fill, "memory": memory, "open": start_up}


# -------------------------------------------------------------------------------------------------------------------- report


def report(found: Mapping[str, Any]) -> None:
    for row in found["speed"]:
        one, many = row["per_second"]["one at a time"], row["per_second"]["batches"]
        print(f"{row['shape']:8s} one at a time {one:8.1f}, cache {many:8.1f} pictures per second: {row['ratio']:.2f}x")
    if row := found["kill"]:
        print(
            f"{row['kills']} kills in {row['pictures']} pictures: {row['encoded_again']} encoded again, "
            f"{row['per_shard']} to a shard"
        )
    for row in found["memory"]:
        print(_of_filling(row))
    for row in found["start-up"]:
        parts = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in row["seconds"].items())
        print(f"{_of_filling(row['filling'])} ({SHARED} pictures)")
        print(f"{row['rows']:>9,d} rows opened: {row['mib']:6.1f} MiB and {row['mapped_mib']:.1f} of mapped files; ms: {parts}")


def _of_filling(row: Mapping[str, Any]) -> str:
    peak = f"{row['mib']:6.1f} MiB at the peak, {row['with_mapped_mib']:.1f} with mapped files"
    return f"{row['rows']:>9,d} rows filled: {peak}; {row['seconds']:.1f} seconds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["tiny", "quarter"])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--open", type=int, nargs="*", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        name, *words = args.task
        print(json.dumps(TASKS[name](*words)))
        return
    found = {
        "speed": [speed(shape, args.pairs, args.rounds) for shape in args.shapes],
        "kill": kill(256 * (args.kills + 2), args.kills) if args.kills else None,
        "memory": [answer("memory", rows) for rows in args.rows],
        "start-up": [opened(rows) for rows in args.open],
    }
    report(found)
    if args.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({**facts, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
