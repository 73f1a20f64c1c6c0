"""The cache: one transform per pair, every picture encoded once, and nothing lost or half-written whatever happens."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.data import cache_files
from diffalign.data.cache import PairCache, build_cache, cache_fingerprint, fill_cache
from diffalign.data.cache_files import shard_name
from diffalign.data.cache_shards import ShardFiller
from diffalign.data.cache_values import FillOptions
from diffalign.data.open import open_pairs
from diffalign.data.transform import CENTER, Transform
from diffalign.errors import StaleCacheError, UserError
from diffalign.protocols import Encoder

SIDE = 16
CENTRAL = Transform(SIDE)


class SmallEncoder:
    """A real, if small, encoder: a strided convolution for pictures, seeded vectors for words. Counts what it is given."""

    def __init__(self, weights: str = "a", fail_after: int | None = None, scale: float = 1.0) -> None:
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.weights, self.fail_after, self.scale = weights, fail_after, scale
        self.images = self.calls = 0
        self.texts: list[str] = []

    def fingerprint(self) -> dict[str, object]:
        return {"weights": self.weights, "tokens": {"length": 3}}

    def _call(self) -> None:
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise KeyboardInterrupt

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        self._call()
        self.images += len(pixels)
        mean, spread = self.conv(pixels).chunk(2, dim=1)
        return {"mean": mean * self.scale, "std": (0.1 * spread).exp()}

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self._call()
        self.texts += prompts
        states = torch.stack([_vector(p) for p in prompts])
        return {"encoder_hidden_states": states, "mask": torch.ones(len(prompts), 3, dtype=torch.int64)}


def _vector(prompt: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))


def png(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_pairs(root: Path, images: list[tuple[int, int]], broken: tuple[int, ...] = ()) -> Path:
    """A parquet file in which pair i shows the pictures with the given seeds; every third prompt is the same."""
    first = [png(a) for a, _ in images]
    second = [png(b)[: 200 if i in broken else None] for i, (_, b) in enumerate(images)]
    labels = [(1.0, 0.0, 0.5)[i % 3] for i in range(len(images))]
    captions = ["often" if i % 3 == 0 else f"prompt {i}" for i in range(len(images))]
    pq.write_table(pa.table({"jpg_0": first, "jpg_1": second, "label_0": labels, "caption": captions}), root / "p.parquet")
    return root / "p.parquet"


DISTINCT = [(2 * i, 2 * i + 1) for i in range(11)]


def contents(root: Path) -> dict[str, bytes]:
    """Every file but the timing."""
    files = (f for f in root.rglob("*") if f.is_file() and f.name not in ("complete.json", ".lock", ".lock-end"))
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in files}


# ----------------------------------------------------------------------------------------------------------------- transform


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (24, 31), (200, 90), (7, 9)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_pixels_have_the_promised_shape_range_and_mirror(size, crop):
    transform = Transform(SIDE, crop, flip=True)
    image = Image.open(io.BytesIO(png(0, size)))
    upright, mirrored = transform.views(image, transform.position(3))
    assert upright.shape == (3, SIDE, SIDE) and upright.dtype == torch.float32
    assert upright.min() >= -1 and upright.max() <= 1 and upright.std() > 0.05
    assert torch.equal(mirrored, upright.flip(-1))
    assert torch.equal(mirrored, transform.apply(image, transform.position(3), flipped=True))


@pytest.mark.parametrize(
    ("size", "position", "expected"),
    [
        # 20 high, 40 wide: 16 x 32 after resizing, and 16 columns of 32 are left
        ((40, 20), (0.5, 0.25), [(20, 40, 0, 4, 16, 16), (20, 40, 0, 12, 16, 16)]),
        ((40, 20), CENTER, [(20, 40, 0, 8, 16, 16), (20, 40, 0, 8, 16, 16)]),
        # 48 high, 8 wide: 96 x 16; a crop at the lower end begins at row 80, mirrored or not
        ((8, 48), (1.0, 0.7), [(48, 8, 80, 0, 16, 16), (48, 8, 80, 0, 16, 16)]),
        ((16, 16), CENTER, [(16, 16, 0, 0, 16, 16)] * 2),
    ],
)
def test_the_framing_by_hand(size, position, expected):
    assert Transform(SIDE, flip=True).framings(size, position) == expected
    assert Transform(SIDE).framings(size, position) == expected[:1]


def test_the_framing_says_which_pixels_were_taken():
    """A picture of its own coordinates, at scale one: the upper left pixel of a view is the one that the framing names."""
    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(40), indexing="ij")
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8))
    transform = Transform(SIDE, "random", flip=True)
    (upright, mirrored), position = transform.views(image, transform.position(5)), transform.position(5)
    (*_, top, left, _, _), (*_, left_of_mirrored, _, _) = transform.framings(image.size, position)
    first = ((upright[:2, 0, 0] + 1) * 127.5).round().tolist()
    assert first == [top, left] and 0 < left < 40 - SIDE
    of_mirrored = ((mirrored[1, 0, 0] + 1) * 127.5).round()  # a column of the picture, which its mirror image has elsewhere
    assert 39 - of_mirrored == left_of_mirrored != left


@pytest.mark.parametrize("size", [(3000, 4), (4, 3000)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_of_a_very_long_picture_only_the_crop_is_enlarged(size, crop, monkeypatch):
    transform, image, asked = Transform(SIDE, crop), Image.open(io.BytesIO(png(0, size))), []
    plain = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a, **k: asked.append(size) or plain(self, size, *a, **k))
    found = transform.apply(image, transform.position(3), False)
    monkeypatch.undo()
    (_, _, top, left, *_) = transform.framings(size, transform.position(3))[0]
    whole = image.resize(tuple(4 * side for side in size), Image.Resampling.BILINEAR)
    cut = np.asarray(whole.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32)
    assert asked == [(SIDE, SIDE)]
    assert np.abs((found.permute(1, 2, 0).numpy() + 1) * 127.5 - cut).max() < 1.01


def test_a_picture_of_the_right_size_is_only_rescaled_to_plus_minus_one():
    pixels = np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)
    found = CENTRAL.apply(Image.fromarray(pixels), CENTER, flipped=False)
    expected = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_random_crops_differ_between_pairs_and_repeat_with_the_seed():
    positions = [Transform(SIDE, "random", seed=1).position(i) for i in range(20)]
    assert len(set(positions)) == 20 and all(0 <= v <= 1 for p in positions for v in p)
    assert positions == [Transform(SIDE, "random", seed=1).position(i) for i in range(20)]
    assert positions != [Transform(SIDE, "random", seed=2).position(i) for i in range(20)]
    assert Transform(SIDE).position(4) == CENTER


def test_a_crop_at_the_ends_takes_the_ends():
    gradient = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (SIDE, 1, 3)))
    left, right = (CENTRAL.apply(gradient, (0.0, place), flipped=False)[0, 0] for place in (0.0, 1.0))
    assert (left[0], right[-1]) == (-1.0, torch.tensor(63 / 127.5 - 1))


def test_winner_and_loser_get_the_same_crop_and_mirror(tmp_path):
    """Both sides show the same scene (as PNG and as BMP, so that the files differ): their latents must agree exactly."""
    columns = {"prompt": [], "chosen": [], "rejected": []}
    for i in range(6):
        image, bmp = Image.open(io.BytesIO(png(i, (60, 20)))), io.BytesIO()
        image.save(bmp, "BMP")
        columns["prompt"].append("p")
        columns["chosen"].append(png(i, (60, 20)))
        columns["rejected"].append(bmp.getvalue())
    pq.write_table(pa.table(columns), tmp_path / "same.parquet")
    cache = build_cache(
        open_pairs(tmp_path / "same.parquet"), SmallEncoder(), tmp_path / "c", Transform(SIDE, "random", flip=True)
    )
    for i in range(6):
        for flipped in (False, True):
            assert torch.equal(cache.moments(i, "winner", flipped)[0], cache.moments(i, "loser", flipped)[0])
        assert not torch.equal(cache.moments(i, "winner", True)[0], cache.moments(i, "winner", False)[0])


# ------------------------------------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_pair_gets_the_encoding_of_its_own_pictures_and_prompt(tmp_path, crop, flip):
    table, encoder, transform = open_pairs(write_pairs(tmp_path, DISTINCT)), SmallEncoder(), Transform(SIDE, crop, flip, seed=5)
    cache = build_cache(table, encoder, tmp_path / "c", transform, FillOptions(dtype="float32", batch_size=3, shard_items=4))
    assert isinstance(encoder, Encoder) and len(cache) == 11 and cache.latent_shape == (4, 4, 4)
    with torch.no_grad():
        for i, pair in enumerate(table):
            for side in ("winner", "loser"):
                for flipped in (False, True) if flip else (False,):
                    pixels = transform.apply(pair.side(side).open(), transform.position(i), flipped)
                    expected = encoder.encode_images(pixels[None])
                    mean, std = cache.moments(i, side, flipped)
                    torch.testing.assert_close(mean, expected["mean"][0], rtol=1e-5, atol=1e-6)
                    torch.testing.assert_close(std, expected["std"][0], rtol=1e-5, atol=1e-6)
            assert torch.equal(cache.conditioning(i)["encoder_hidden_states"], _vector(pair.prompt))
    assert torch.equal(cache.conditioning(None)["encoder_hidden_states"], _vector(""))
    assert cache.conditioning(0)["mask"].dtype == torch.int64
    assert cache.labels.tolist() == [pair.label for pair in table] and cache.weights.tolist() == [1.0] * 11
    assert list(cache.prompts) == [pair.prompt for pair in table] and cache.origins[3] == "p.parquet:row 3"
    if not flip:
        with pytest.raises(ValueError, match="flip=False"):
            cache.moments(0, "winner", True)


def test_pictures_and_prompts_are_encoded_once(tmp_path):
    images = [(0, 1), (0, 2), (1, 0), (3, 3), (0, 1)]
    table, encoder = open_pairs(write_pairs(tmp_path, images)), SmallEncoder()
    cache = build_cache(table, encoder, tmp_path / "c", CENTRAL)
    assert encoder.images == 4 and sorted(encoder.texts) == ["", "often", "prompt 1", "prompt 2", "prompt 4"]
    stats = cache.stats()
    assert (stats["unique_images"], stats["unique_prompts"], stats["pairs"], stats["skipped"]) == (4, 5, 5, 0)
    assert stats["bytes"] == sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file())
    assert torch.equal(cache.moments(0, "winner")[0], cache.moments(4, "loser")[0])
    by_crop = SmallEncoder()
    build_cache(table, by_crop, tmp_path / "r", Transform(SIDE, "random", flip=True))
    assert by_crop.images == 2 * (2 + 2 + 2 + 1 + 2), "each pair has its own crop; a pair of equal pictures shares it"


def test_how_many_were_skipped_is_known_without_a_look_at_the_folder(tmp_path, monkeypatch):
    table = open_pairs(write_pairs(tmp_path, DISTINCT, broken=(2, 5)))
    cache = build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(max_unreadable=0.5))
    monkeypatch.setattr(cache_files.CacheFolder, "size_on_disk", lambda _: pytest.fail("looked at every file"))
    assert cache.skipped_count == len(cache.skipped) == 2


@pytest.mark.parametrize("flip", [False, True])
def test_the_cache_knows_how_each_picture_of_a_pair_was_cut(tmp_path, flip):
    first, second = [png(0, (24, 20)), png(1, (20, 40))], [png(2, (64, 16)), png(3, (16, 16))]
    table = pa.table({"jpg_0": first, "jpg_1": second, "label_0": [1.0, 1.0], "caption": ["one", "two"]})
    pq.write_table(table, tmp_path / "p.parquet")
    transform = Transform(SIDE, "random", flip, seed=4)
    cache = build_cache(open_pairs(tmp_path / "p.parquet"), SmallEncoder(), tmp_path / "c", transform)
    for row, sizes in enumerate([((24, 20), (64, 16)), ((20, 40), (16, 16))]):
        for side, size in zip(("winner", "loser"), sizes, strict=True):
            expected = transform.framings(size, transform.position(row))
            for flipped, numbers in enumerate(expected):
                assert cache.framing(row, side, bool(flipped)).tolist() == list(numbers)
    assert cache.framing(0, "winner")[:2].tolist() == [20, 24] and cache.framing(0, "loser")[:2].tolist() == [16, 64]


def test_arrays_are_memory_mapped_and_half_precision_by_default(tmp_path):
    table, encoder = open_pairs(write_pairs(tmp_path, DISTINCT)), SmallEncoder()
    cache = build_cache(table, encoder, tmp_path / "c", CENTRAL, FillOptions(shard_items=8))
    names = [f"{k:05d}.{tensor}.npy" for k in range(3) for tensor in ("framing", "moments")]
    assert [f.name for f in sorted((tmp_path / "c/images").iterdir())] == names
    shard = cache._shard(shard_name("images", 0, "moments"))
    assert isinstance(shard, np.memmap) and shard.dtype == np.float16 and shard.shape == (8, 2, 4, 4, 4)
    assert cache.moments(0, "loser")[0].dtype == torch.float32
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.moments(7, "loser")[1], cache.moments(7, "loser")[1])


def test_a_complete_cache_opens_without_the_pictures(tmp_path):
    place = write_pairs(tmp_path, DISTINCT)
    expected = cache_fingerprint(open_pairs(place), SmallEncoder(), CENTRAL)
    first = build_cache(open_pairs(place), SmallEncoder(), tmp_path / "c", CENTRAL)
    place.unlink()
    again = PairCache.open(tmp_path / "c", expected)
    assert len(again) == 11 and torch.equal(again.moments(5, "loser")[0], first.moments(5, "loser")[0])


def test_a_complete_cache_is_not_encoded_again(tmp_path):
    table, idle = open_pairs(write_pairs(tmp_path, DISTINCT)), SmallEncoder()
    build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)
    build_cache(table, idle, tmp_path / "c", CENTRAL)
    assert idle.calls == 0


def test_large_items_make_smaller_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardFiller, "MAX_BYTES", 5 * (2 * 4 * 4 * 4 * 2 + 6 * 4))  # five pictures in float16, with their framing
    cache = build_cache(
        open_pairs(write_pairs(tmp_path, DISTINCT)), SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(batch_size=2)
    )
    assert cache._shard(shard_name("images", 0, "moments")).shape[0] == 5


# ---------------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize(("workers", "flip"), [(0, False), (2, True)])
@pytest.mark.parametrize("calls", [1, 4, 7, 10])
def test_a_killed_build_goes_on_where_it_was_and_ends_in_the_same_bytes(tmp_path, calls, workers, flip):
    images = [*DISTINCT[:5], (0, 1), (3, 90), *DISTINCT[5:]]
    table = open_pairs(write_pairs(tmp_path, images, broken=(2, 8)))
    settings = FillOptions(batch_size=3, shard_items=4, max_unreadable=0.2, workers=workers)
    whole, killed, rest = SmallEncoder(), SmallEncoder(fail_after=calls), SmallEncoder()
    transform = Transform(SIDE, flip=flip)
    build_cache(table, whole, tmp_path / "whole", transform, settings)
    with pytest.raises(KeyboardInterrupt):
        build_cache(table, killed, tmp_path / "cut", transform, settings)
    with pytest.raises(UserError, match="not complete"):
        PairCache.open(tmp_path / "cut")
    committed = sum(len(np.load(f)) for f in (tmp_path / "cut").glob("images/*.moments.npy"))
    cache = build_cache(table, rest, tmp_path / "cut", transform, settings)
    assert rest.images == whole.images - committed, "committed pictures are not encoded again"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert [origin for origin, _ in cache.skipped] == ["p.parquet:row 2", "p.parquet:row 8"] and len(cache) == 11


def test_half_written_and_uncommitted_files_are_ignored(tmp_path):
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    build_cache(table, SmallEncoder(), tmp_path / "whole", CENTRAL, FillOptions(shard_items=8))
    with pytest.raises(KeyboardInterrupt):
        build_cache(table, SmallEncoder(fail_after=1), tmp_path / "cut", CENTRAL, FillOptions(shard_items=8))
    (tmp_path / "cut/images/00001.moments.npy").write_bytes(b"in place, but the journal does not know it")
    (tmp_path / "cut/journal/images-00001.json.partial").write_text('{"shards": 2, "it')
    build_cache(table, SmallEncoder(), tmp_path / "cut", CENTRAL, FillOptions(shard_items=8))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_full_disk_keeps_what_was_committed_and_says_what_is_needed(tmp_path, monkeypatch):
    table, original = open_pairs(write_pairs(tmp_path, DISTINCT)), cache_files.write_bytes

    def full(stream, content):
        if "images/00002.moments" in Path(stream.name).as_posix():
            stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(stream, content)

    with monkeypatch.context() as patch:
        patch.setattr(cache_files, "write_bytes", full)
        with pytest.raises(
            UserError,
            match=r"images/00002.moments.npy .*No space left.*this file alone needs [\d,]+\).* another folder \(--cache\)",
        ):
            build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(shard_items=8))
    assert not list((tmp_path / "c").rglob("*.partial"))
    rest = SmallEncoder()
    cache = build_cache(table, rest, tmp_path / "c", CENTRAL, FillOptions(shard_items=8))
    assert rest.images == 22 - 16 and len(cache) == 11


def test_two_builds_at_once_are_refused_but_a_complete_cache_opens(tmp_path):
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    with cache_files.CacheFolder(tmp_path / "c").locked(), pytest.raises(UserError, match="Another process is filling"):
        build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)
    assert len(build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)) == 11
    with cache_files.CacheFolder(tmp_path / "c").locked():
        assert len(build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)) == 11, "opening a complete one needs no lock"


# ------------------------------------------------------------------------------------------------------------------ refusals


def test_rows_that_no_file_and_no_tokenizer_takes_are_skipped_as_others(tmp_path):
    for seed in range(4):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    row = {"prompt": "p", "chosen": "0.png", "rejected": "1.png"}
    wrong = [
        {"prompt": "half \ud83d"},
        {"chosen": "a\0.png"},
        {"chosen": "a\ud83d.png"},
        {"chosen": "~nobody-of-this-name/a.png"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row | more) + "\n" for more in [{}, *wrong, {"rejected": "2.png"}]))
    cache = build_cache(
        open_pairs(tmp_path / "p.jsonl"), SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(max_unreadable=0.7)
    )
    assert len(cache) == 2 and len(cache.skipped) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are text")
def test_names_that_are_not_utf8_are_no_hindrance(tmp_path):
    for name in (b"\xe9", b"fine"):
        folder = tmp_path / "pairs" / os.fsdecode(name)
        folder.mkdir(parents=True)
        (folder / "prompt.txt").write_text("p")
        (folder / "win.png").write_bytes(png(0))
        (folder / "lose.png").write_bytes(png(1) if name == b"fine" else b"")
    cache = build_cache(open_pairs(tmp_path / "pairs"), SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(max_unreadable=0.7))
    assert len(cache) == 1 and cache.skipped[0][0] == r"pairs/\udce9"


def test_unreadable_rows_are_skipped_under_the_limit_and_refused_above(tmp_path):
    table = open_pairs(write_pairs(tmp_path, DISTINCT, broken=(3, 7)))
    with pytest.raises(UserError, match=r"of 11 pairs cannot be used.*limit of 10.00%: p.parquet:row 3: .*decoded.*row 7"):
        build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(max_unreadable=0.1))
    cache = build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(max_unreadable=0.2))
    assert len(cache) == 9 and cache.rows().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert [(o, r.split(":")[0]) for o, r in cache.skipped] == [("p.parquet:row 3", "loser"), ("p.parquet:row 7", "winner")]
    with pytest.raises(UserError, match="2 of 11 pairs"):
        build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)


def test_a_stale_cache_is_refused_naming_every_difference(tmp_path):
    place = write_pairs(tmp_path, DISTINCT)
    build_cache(open_pairs(place), SmallEncoder(), tmp_path / "c", CENTRAL)
    before = contents(tmp_path / "c")
    with pytest.raises(StaleCacheError) as caught:
        build_cache(open_pairs(place), SmallEncoder("b"), tmp_path / "c", Transform(24, flip=True), FillOptions(dtype="float32"))
    message = str(caught.value)
    for part in ('encoder.weights was "a" and is now "b"', "transform.resolution was 16 and is now 24", 'dtype was "float16"'):
        assert part in message
    assert (
        "transform.flip was false and is now true" in message and "another folder (--cache)" in message and "data." not in message
    )
    with pytest.raises(StaleCacheError, match="data.fingerprint.*data.ties"):
        build_cache(open_pairs(place, ties="drop"), SmallEncoder(), tmp_path / "c", CENTRAL)
    assert contents(tmp_path / "c") == before
    assert json.loads((tmp_path / "c/fingerprint.json").read_text())["encoder"]["tokens"] == {"length": 3}


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not a cache of diffalign"):
        build_cache(table, SmallEncoder(), tmp_path / "mine", CENTRAL)
    with pytest.raises(UserError, match="There is no cache in"):
        PairCache.open(tmp_path / "nowhere")


@pytest.mark.parametrize(("scale", "reason"), [(1e6, "more than float16 holds; use dtype float32"), (float("nan"), "not finite")])
def test_values_that_the_cache_cannot_hold_stop_it(tmp_path, scale, reason):
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    with pytest.raises(UserError, match=f"{reason}.*a picture of p.parquet:row 0"):
        build_cache(table, SmallEncoder(scale=scale), tmp_path / "c", CENTRAL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"dtype": "int8"}, "float16, float32"), ({"max_unreadable": 2}, "share"), ({"batch_size": 0}, "at least 1")],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        build_cache(open_pairs(write_pairs(tmp_path, DISTINCT)), SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(**wrong))
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------------------------------------ mending


@pytest.mark.parametrize(
    ("lost", "images", "prompts"),
    [
        ({"images/00001.moments.npy": None}, 8, 0),
        ({"images/00000.framing.npy": 40, "images/00002.moments.npy": 0}, 8 + 6, 0),
        ({"prompts/00000.mask.npy": None}, 0, 8),  # the empty one is among them
        ({"journal/images-00001.json": None}, 8, 0),
        ({"journal/images-00001.json": 5}, 8, 0),
        ({"pairs.npy": 100}, 0, 0),
        ({"prompts.ends": None, "origins.utf8": None}, 0, 0),
        ({"complete.json": 3}, 0, 0),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_lost_is_made_anew_and_nothing_else(tmp_path, lost, images, prompts):
    """Three shards of pictures, two of prompts: bytes for bytes what was there."""
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(shard_items=8))
    before = contents(tmp_path / "c")
    for name, left in lost.items():
        file = tmp_path / "c" / name
        file.unlink() if left is None else os.truncate(file, left)
    told: list[str] = []
    encoder = SmallEncoder()
    assert fill_cache(table, encoder, tmp_path / "c", CENTRAL, FillOptions(shard_items=8), mended=told.extend) == 0
    assert (encoder.images, len(encoder.texts)) == (images, prompts)
    assert contents(tmp_path / "c") == before
    assert set(told) == (set(lost) if images or prompts else {"the index"})
    assert len(build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)) == 11


def test_a_whole_cache_has_nothing_to_mend(tmp_path):
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(shard_items=8))
    fill_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, mended=lambda lost: pytest.fail(str(lost)))


def test_a_damaged_cache_says_how_it_is_mended(tmp_path):
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    cache = build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(shard_items=8))
    (tmp_path / "c" / "images" / "00001.moments.npy").unlink()
    with pytest.raises(UserError, match="--prepare encodes what is lost and keeps the rest"):
        [cache.moments(row, "winner") for row in range(11)]


def test_who_may_wait_waits_until_the_other_is_done(tmp_path):
    """Two jobs of a sweep on one cache: the second opens what the first has encoded."""
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    build_cache(table, SmallEncoder(), tmp_path / "done", CENTRAL)
    waiting, told = threading.Event(), []

    def busy(line: str) -> None:
        told.append(line)
        waiting.set()

    second = SmallEncoder()
    with ThreadPoolExecutor(1) as pool:
        with cache_files.CacheFolder(tmp_path / "c").locked():
            later = pool.submit(build_cache, table, second, tmp_path / "c", CENTRAL, busy=busy)
            assert waiting.wait(30) and not later.done()
            shutil.copytree(tmp_path / "done", tmp_path / "c", dirs_exist_ok=True)  # what the other one does
        assert len(later.result(30)) == 11
    assert second.images == 0
    assert told == [f"another process is filling the cache in {tmp_path / 'c'}; this one waits for it to end"]


def test_a_disk_that_takes_half_an_array_is_full(tmp_path, monkeypatch):
    """NumPy says so without a number."""

    def half(stream, content):
        raise OSError("241664 requested and 79808 written")

    monkeypatch.setattr(cache_files, "write_bytes", half)
    with pytest.raises(UserError, match=r"this file alone needs 1,000\). Free some space or name another folder \(--cache\)"):
        cache_files.CacheFolder(tmp_path / "c").write("x", b"1" * 1000)


def test_what_is_left_of_a_removed_cache_goes_where_a_stale_one_may(tmp_path):
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)
    (tmp_path / "c" / "fingerprint.json").unlink()
    with pytest.raises(UserError, match="fingerprint.json"):
        build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)
    assert len(build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL, renew=True)) == 11
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "a.png").write_bytes(png(1))
    with pytest.raises(UserError, match="is not a cache of diffalign"):
        build_cache(table, SmallEncoder(), tmp_path / "mine", CENTRAL, renew=True)
    assert (tmp_path / "mine" / "images" / "a.png").is_file()
