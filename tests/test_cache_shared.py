"""Preparing as a job for many: whoever fills a cache, and however often, it is the same cache, and nothing is encoded twice.

Then what reading costs: a step reads the bytes of its own rows, and opening reads none.
"""

from __future__ import annotations

import errno
import gc
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_cache import CENTRAL, DISTINCT, SIDE, SmallEncoder, contents, png, write_pairs
from threads import Process, in_threads
from torch import Tensor

from diffalign import written_aside
from diffalign.data import cache_files, cache_rows, file_locks
from diffalign.data.cache import PairCache, build_cache, fill_cache
from diffalign.data.cache_files import CacheFolder
from diffalign.data.cache_shards import share_of
from diffalign.data.cache_values import FillOptions, Numbering, Shards, Strings
from diffalign.data.hold_out import split_rows
from diffalign.data.loader import LoaderSettings, PairLoader
from diffalign.data.open import open_pairs
from diffalign.data.table import PairTable
from diffalign.data.transform import Transform
from diffalign.errors import StaleCacheError, UserError
from pipelines import ingredients

IMAGES = [*((2 * i, 2 * i + 1) for i in range(9)), (0, 1), (17, 3), (40, 41), (42, 43), (44, 43), (40, 0)]
BROKEN = (5, 12, 13)
"""Rows whose second picture is cut short; that of 12 and 13 is the same."""
PICTURES = 23
"""That differ, the two broken ones among them."""
TEXTS = 1 + 1 + 10
"""The empty prompt, the one that every third row has, and those of the others."""
FLIPPED = Transform(SIDE, flip=True)
HOW = FillOptions(batch_size=3, shard_items=4, max_unreadable=0.3, workers=2)
SHARDS = 12 + 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_rows, "PART", 4)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    return open_pairs(write_pairs(tmp_path_factory.mktemp("data"), IMAGES, BROKEN))


@pytest.fixture
def whole(table: PairTable, tmp_path: Path) -> dict[str, bytes]:
    """What one process makes of it."""
    build_cache(table, SmallEncoder(), tmp_path / "whole", FLIPPED, HOW)
    return contents(tmp_path / "whole")


def filled(table: PairTable, folder: Path, encoder: SmallEncoder, **more: Any) -> int:
    return fill_cache(table, encoder, folder, FLIPPED, HOW, **more)


def counted(encoders: Sequence[SmallEncoder]) -> tuple[int, int, int]:
    """Pictures that were encoded, in both orientations; prompts; and prompts that differ."""
    texts = [text for encoder in encoders for text in encoder.texts]
    return sum(encoder.images for encoder in encoders), len(texts), len(set(texts))


# ------------------------------------------------------------------------------------------------------------- many fill it


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_encoding_and_end_in_the_same_bytes(
    world: int, table: PairTable, whole: dict[str, bytes], tmp_path: Path
) -> None:
    encoders = [SmallEncoder() for _ in range(world)]
    assert in_threads(world, lambda p: filled(table, tmp_path / "c", encoders[p.rank], processes=p)) == [0] * world
    assert contents(tmp_path / "c") == whole
    assert counted(encoders) == (2 * PICTURES, TEXTS, TEXTS)
    assert all(encoder.images >= 2 * PICTURES // world - 4 and encoder.texts for encoder in encoders), "each has its share"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_jobs_need_not_run_at_the_same_time(
    order: tuple[int, ...], table: PairTable, whole: dict[str, bytes], tmp_path: Path
) -> None:
    encoders, missing = [SmallEncoder() for _ in order], []
    for which in order:
        with pytest.raises(UserError, match="There is no cache|is not complete"):
            PairCache.open(tmp_path / "c")
        missing.append(filled(table, tmp_path / "c", encoders[which], part=(which, 3)))
    assert missing == [10, 5, 0] and contents(tmp_path / "c") == whole
    again = 0 if order[0] == 0 else 1  # the first batch, by a job that comes first and does not have it
    assert counted(encoders) == (2 * PICTURES + 2 * again, TEXTS + 3 * again, TEXTS)


def test_jobs_of_several_processes_have_parts_of_parts(table: PairTable, whole: dict[str, bytes], tmp_path: Path) -> None:
    encoders = [SmallEncoder() for _ in range(4)]

    def work(process: Process, job: int) -> int:
        return filled(table, tmp_path / "c", encoders[2 * job + process.rank], processes=process, part=(job, 2))

    missing = [in_threads(2, lambda process, job=job: work(process, job)) for job in (0, 1)]
    assert missing == [[7, 7], [0, 0]] and contents(tmp_path / "c") == whole
    assert counted(encoders) == (2 * PICTURES, TEXTS, TEXTS) and all(encoder.images for encoder in encoders)


@pytest.mark.parametrize("calls", [0, 1, 4, 7])
def test_killed_jobs_cost_a_shard_each_and_another_number_of_jobs_goes_on(
    calls: int, table: PairTable, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for which in range(2):
        with pytest.raises(KeyboardInterrupt):
            filled(table, tmp_path / "c", SmallEncoder(fail_after=calls), part=(which, 2))
    journal, rest = tmp_path / "c" / "journal", SmallEncoder()
    images, prompts = (sorted(journal.glob(f"{kind}-*")) for kind in ("images", "prompts"))
    committed = sum(len(np.load(tmp_path / f"c/images/{entry.stem[-5:]}.moments.npy")) for entry in images)
    assert len(images) >= 2 * (calls // 2) - 2
    assert filled(table, tmp_path / "c", rest) == 0 and contents(tmp_path / "c") == whole
    assert rest.images == 2 * PICTURES - committed and len(rest.texts) == TEXTS - 4 * len(prompts)


def test_rows_are_read_once_and_by_whoever_is_there(table: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four parts of the rows the second of two jobs has two, and reads the other two as well: nobody else is there."""
    read, original = [], PairTable.__getitem__
    monkeypatch.setattr(PairTable, "__getitem__", lambda self, row: read.append(row) or original(self, row))
    with pytest.raises(KeyboardInterrupt):
        filled(table, tmp_path / "c", SmallEncoder(fail_after=0), part=(1, 2))
    assert read[:15] == [*range(8, 15), *range(4, 8), *range(4)] and set(read[15:]) <= {0, 1, 2}
    read.clear()
    filled(table, tmp_path / "c", SmallEncoder())
    assert sorted(read) == [0, *range(9), 11, 12, 13], "again for the pictures that belong to them; the first for the first batch"


def test_rows_that_show_a_broken_picture_are_skipped_wherever_they_are(table: PairTable, tmp_path: Path) -> None:
    cache = build_cache(table, SmallEncoder(), tmp_path / "c", FLIPPED, HOW)
    assert [origin for origin, _ in cache.skipped] == [f"p.parquet:row {row}" for row in BROKEN]
    assert [reason.split(":")[0] for _, reason in cache.skipped] == ["loser", "loser", "winner"], (
        "labels are 1, 0 and 1/2 in turn"
    )
    assert cache.rows().tolist() == [row for row in range(15) if row not in BROKEN]
    assert list(cache.origins) == [table.origin(row) for row in cache.rows()]
    assert list(cache.prompts) == [table[row].prompt for row in cache.rows()]
    assert cache.stats()["skipped"] == 3 and cache.stats()["unique_images"] == PICTURES


def test_whoever_fills_alone_is_alone_and_whoever_shares_is_not(table: PairTable, tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "c")
    with folder.locked(shared=True):
        with pytest.raises(UserError, match="Another process is filling"):
            filled(table, tmp_path / "c", SmallEncoder())
        assert filled(table, tmp_path / "c", SmallEncoder(), part=(0, 2)) > 0
    with folder.locked(), pytest.raises(UserError, match="Another process is filling"):
        filled(table, tmp_path / "c", SmallEncoder(), part=(1, 2))
    with pytest.raises(StaleCacheError, match="transform.flip was true and is now false"):
        fill_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, part=(1, 2))


def test_on_windows_whoever_fills_alone_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one waits, once it has said so; those who share have no lock."""
    fcntl = pytest.importorskip("fcntl")  # the one kind of lock that Windows has is made of POSIX's

    def locking(number: int, how: int, size: int) -> None:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    monkeypatch.setattr(file_locks, "fcntl", None)
    monkeypatch.setattr(file_locks, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking), raising=False)
    monkeypatch.setattr(file_locks, "SECONDS_BETWEEN_TRIES", 0.01)
    folder, told, entered = CacheFolder(tmp_path / "c"), [], threading.Event()

    def enter() -> None:
        with folder.locked(busy=told.append):
            entered.set()

    second = threading.Thread(target=enter)
    with folder.locked():
        with pytest.raises(UserError, match="Another process is filling"), folder.locked():
            pass
        with folder.locked(shared=True):
            second.start()
        while not told:
            time.sleep(0.01)
        assert not entered.is_set()
    second.join(10)
    assert entered.is_set() and "waits for it to end" in told[0]


def test_what_another_has_written_and_reads_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows does not rename over a file that is open; shards of one name and size are the same."""
    folder = CacheFolder(tmp_path / "c")
    folder.write("images/00000.npy", b"same")

    def held(*_: Path) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(written_aside.os, "replace", held)
    folder.write("images/00000.npy", b"same")
    with pytest.raises(UserError, match=r"00000.npy \(6 bytes\) could not be written"):
        folder.write("images/00000.npy", b"longer")
    assert [path.name for path in (tmp_path / "c" / "images").iterdir()] == ["00000.npy"]


def test_half_written_files_of_others_who_share_are_left_alone(table: PairTable, tmp_path: Path) -> None:
    filled(table, tmp_path / "c", SmallEncoder(), part=(0, 3))
    aside = tmp_path / "c" / "images" / f"00003.moments.npy.1234{cache_files.PARTIAL}"
    aside.write_bytes(b"half")
    filled(table, tmp_path / "c", SmallEncoder(), part=(1, 3))
    assert aside.exists()
    filled(table, tmp_path / "c", SmallEncoder())
    assert not aside.exists()


def meanwhile(patch: pytest.MonkeyPatch, where: Any, name: str, early: bool, happens: Callable[[], None]) -> None:
    """Something happens before or after the first call of a method."""
    original, calls = getattr(where, name), []

    def call(*given: Any) -> Any:
        calls.append(name)
        first = len(calls) == 1
        if first and early:
            happens()
        found = original(*given)
        if first and not early:
            happens()
        return found

    patch.setattr(where, name, call)


MOMENTS = {
    "when it begins to read": (cache_rows.Rows, "read", True, []),
    "when it reads": (cache_rows.Rows, "_read_part", True, [8, 9, 10, 11]),
    "when it has read": (cache_rows.Rows, "read", False, []),
    "when it has numbered the rows": (cache_rows.Rows, "join", False, []),
    "when it has the index": (cache_rows.Rows, "index", False, []),
}
"""And the rows that are read afterwards."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_other_jobs_may_complete_the_cache_at_any_moment(
    moment: str, table: PairTable, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are gone by then: that is no damage, they are not read again, and nothing is left behind."""
    where, name, early, still = MOMENTS[moment]
    read, original, encoder = [], PairTable.__getitem__, SmallEncoder()
    monkeypatch.setattr(PairTable, "__getitem__", lambda self, row: read.append(row) or original(self, row))

    def complete() -> None:
        assert [filled(table, tmp_path / "c", SmallEncoder(), part=(which, 2)) for which in (0, 1)] == [7, 0]
        read.clear()

    meanwhile(monkeypatch, where, name, early, complete)
    assert filled(table, tmp_path / "c", encoder, part=(1, 2)) == 0 and contents(tmp_path / "c") == whole
    assert read == still and encoder.calls == 0


def test_processes_agree_on_what_other_jobs_have_completed(
    table: PairTable, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes one has the index when the others complete the cache, and one does not have it yet."""
    original, turn, done = cache_rows.Rows.index, RLock(), []

    def index(self: cache_rows.Rows) -> cache_rows.Index:
        with turn:
            found = original(self)
            if not done:
                done.append(True)
                assert [filled(table, tmp_path / "c", SmallEncoder(), part=(which, 2)) for which in (0, 1)] == [7, 0]
            return found

    monkeypatch.setattr(cache_rows.Rows, "index", index)
    missing = in_threads(2, lambda process: filled(table, tmp_path / "c", SmallEncoder(), processes=process, part=(1, 2)))
    assert missing == [0, 0] and contents(tmp_path / "c") == whole


def test_what_killed_jobs_left_half_written_goes_when_the_cache_is_complete(
    table: PairTable, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was a living job's that had been beaten to its shard, the shard is there. A cache inside is left alone."""
    assert filled(table, tmp_path / "c", SmallEncoder(), part=(0, 2)) == 7
    places = [f"{place}{cache_files.PARTIAL}" for place in ("images/00009.moments.npy.1234", "origins.utf8.1234", "journal/x")]
    inside = tmp_path / "c/reference/errors" / f"00000.npy.1234{cache_files.PARTIAL}"
    inside.parent.mkdir(parents=True)
    for path in (inside, *(tmp_path / "c" / place for place in places)):
        path.write_bytes(b"half")
    others: list[int] = []
    write_bytes = cache_files.write_bytes

    def write(stream: Any, content: Any) -> None:
        write_bytes(stream, content)
        if "images/00010.moments" in Path(stream.name).as_posix() and not others:
            others.append(1)
            assert filled(table, tmp_path / "c", SmallEncoder(), part=(1, 2)) == 0

    monkeypatch.setattr(cache_files, "write_bytes", write)
    assert filled(table, tmp_path / "c", SmallEncoder(), part=(1, 2)) == 0 and others
    assert contents(tmp_path / "c") == whole | {inside.relative_to(tmp_path / "c").as_posix(): b"half"}


def test_shares_are_contiguous_and_cover_everything() -> None:
    for count in (0, 1, 7, 16):
        parts = [share_of(count, (which, 3)) for which in range(3)]
        assert [number for part in parts for number in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and (count == 0 or parts[0][0] == 0)


# -------------------------------------------------------------------------------------------------------- memory and reading


def many(folder: Path, n: int) -> PairTable:
    """Pairs of pictures that differ in bytes that no decoder looks at, and of prompts that differ."""
    stamped = [png(0, (8, 8)) + number.to_bytes(4, "little") for number in range(2 * n)]
    prompts = [f"a prompt of some length, number {i}" for i in range(n)]
    columns = {"prompt": prompts, "chosen": stamped[::2], "rejected": stamped[1::2]}
    pq.write_table(pa.table(columns), folder / f"{n}.parquet")
    return open_pairs(folder / f"{n}.parquet")


class Forgetful(SmallEncoder):
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        encoded = super().encode_prompts(prompts)
        self.texts.clear()
        return encoded


@pytest.fixture
def tidy() -> Iterator[None]:
    """Cycles are collected soon, so that what is measured is what is held."""
    before = gc.get_threshold()
    gc.set_threshold(100, 2, 2)
    yield
    gc.set_threshold(*before)


def test_memory_while_filling_does_not_grow_with_the_rows(tidy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the rows, 432 more: a list of their prompts alone would be 45 kB more."""
    monkeypatch.setattr(cache_rows, "PART", 32)
    how, peaks = FillOptions(batch_size=32, shard_items=32, workers=0), []
    for n in (48, 48, 480):  # the first is to get warm
        table = many(tmp_path, n)
        tracemalloc.start()
        build_cache(table, Forgetful(), tmp_path / f"{len(peaks)}", Transform(8), how)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    print(peaks)
    assert peaks[2] - peaks[1] < 35_000


class Counted(np.memmap):
    """A memory map that knows how many bytes were taken out of it."""

    taken = 0

    def __getitem__(self, where: Any) -> Any:
        found = super().__getitem__(where)
        if not isinstance(where, str):  # a column is a view
            Counted.taken += found.nbytes
        return found


def test_a_step_reads_the_bytes_of_its_rows_and_opening_reads_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per pair: two latents of 2 x 4 x 4 x 4 halves and their framing, 3 x 5 halves and 3 x 8 bytes of the prompt; from the index
    label and weight, and three numbers, of which each picture's is asked for twice."""
    per_pair = 2 * (2 * 64 * 2 + 6 * 4) + (15 * 2 + 3 * 8) + 2 * 4 + 5 * 8
    load = Shards.load
    monkeypatch.setattr(Shards, "load", lambda self, name: load(self, name).view(Counted))
    for n in (11, 44):
        (tmp_path / f"{n}").mkdir()
        place = write_pairs(tmp_path / f"{n}", [(2 * i, 2 * i + 1) for i in range(n)])
        build_cache(open_pairs(place), SmallEncoder(), tmp_path / f"{n}/c", CENTRAL, FillOptions(shard_items=8))
        Counted.taken = 0
        cache = PairCache.open(tmp_path / f"{n}/c")
        assert Counted.taken == 0
        loader = PairLoader(cache, range(n), LoaderSettings(batch_size=3, accumulation=2))
        list(loader.steps(0, 4))
        assert Counted.taken == 4 * 6 * per_pair


def test_texts_are_read_one_at_a_time_from_their_file(tmp_path: Path) -> None:
    folder, texts = CacheFolder(tmp_path), ["", "a", "größer", "", "猫" * 50, "lone \ud800 half"]
    with Strings.writing(folder, "texts") as write:
        write(texts[:2])
        write([])
        write(texts[2:])
    found = Strings(folder, "texts")
    assert list(found) == texts and len(found) == 6 and found[-1] == texts[-1] and list(found[1:4]) == texts[1:4]
    with pytest.raises(IndexError):
        found[6]
    with Strings.writing(folder, "nothing"):
        pass
    assert list(Strings(folder, "nothing")) == []
    (tmp_path / "texts.ends").write_bytes(b"123")
    with pytest.raises(UserError, match="damaged: texts.ends: 3 bytes are no multiple of 8"):
        Strings(folder, "texts")


def test_things_are_numbered_by_first_appearance() -> None:
    numbering = Numbering()
    numbers, new = numbering.of([b"c", b"a", b"c", b"b"])
    assert numbers == [0, 1, 0, 2] and new.tolist() == [0, 1, 3]
    numbers, new = numbering.of([b"b", b"\x00", b"", b"a"])
    assert numbers == [2, 3, 4, 1] and new.tolist() == [1, 2] and len(numbering) == 5


# ------------------------------------------------------------------------------------------------------------------ hold out


def test_rows_are_held_out_as_ever() -> None:
    """Found by the release before numbers took the place of texts, so that a run of then goes on with the rows of then."""
    known = {
        ("fcadbecafa", 4, 0): ([1, 2, 3, 6, 7, 9], [0, 4, 5, 8]),
        ("fcadbecafa", 3, 1): ([0, 1, 2, 6, 7, 8, 9], [3, 4, 5]),
        ("ddddcbaa", 3, 2): ([0, 1, 2, 3, 5], [4, 6, 7]),
    }
    for (prompts, pairs, seed), expected in known.items():
        for same in (list(prompts), np.array([ord(p) for p in prompts])):
            assert tuple(rows.tolist() for rows in split_rows(same, pairs, seed)) == expected


def test_long_prompts_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eight prompts of eleven pairs and the empty one, three at a time."""

    asked: list[str] = []

    class Family:
        def truncated(self, prompts: Sequence[str]) -> list[Any]:
            asked.extend(prompts)
            return [type("Cut", (), {"prompt": p, "lost": p[-1:]}) for p in prompts for _ in range(2) if len(p) > 8]

    monkeypatch.setattr(ingredients, "PROMPTS_AT_ONCE", 3)
    build_cache(open_pairs(write_pairs(tmp_path, DISTINCT)), SmallEncoder(), tmp_path / "c", CENTRAL)
    said: list[str] = []
    for _ in range(2):
        ingredients._tell_of_long_prompts(Family(), PairCache.open(tmp_path / "c"), None, said.append)
    assert asked == ["", "often", *(f"prompt {i}" for i in (1, 2, 4, 5, 7, 8, 10))]
    assert said == ["1 prompts are too long for the text encoder; of 'prompt 10' it does not see '0'"] * 2
