"""Aspect-ratio buckets: one shape for a pair, nothing of the winner lost that need not be, and batches of one shape."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_runs import assert_equal, listening, on_disk, run, weights
from miniatures import PIXELS
from PIL import Image
from test_data_cache import SmallEncoder

from diffalign.data import buckets
from diffalign.data.buckets import BucketOrder
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.cache_values import FillOptions
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.data.open import open_pairs
from diffalign.data.transform import CENTER, Transform
from diffalign.errors import UserError

SIZES = [(64, 64), (96, 32), (32, 96), (80, 50)]
"""(width, height) of winners, in turn."""
HOW = {"buckets": True, "bucket_step": 8}


def write_pairs(folder: Path, n: int) -> Path:
    """Winners of several shapes; every loser is a square."""
    folder.mkdir(exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        for side, (width, height) in (("w", SIZES[i % 4]), ("l", (48, 48))):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{side}{i}.png")
        rows.append({"prompt": f"prompt {i}", "chosen": f"w{i}.png", "rejected": f"l{i}.png"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def built(folder: Path, n: int = 10, **more: Any) -> PairCache:
    transform = Transform(PIXELS, **{**HOW, **more})
    return build_cache(
        open_pairs(write_pairs(folder, n)), SmallEncoder(), folder / "cache", transform, FillOptions(dtype="float32")
    )


# --------------------------------------------------------------------------------------------------------------- shapes


def test_the_shapes_by_hand() -> None:
    """Of 32 x 32 = 1024 pixels in steps of 8: 16 x 64, 24 x 40, 32 x 32 ..."""
    found = buckets.shapes(32, 8)
    assert {(16, 64), (24, 40), (32, 32), (40, 24), (64, 16)} <= set(found)
    assert all(h * w <= 1024 and h % 8 == w % 8 == 0 and (w, h) in found for h, w in found)
    assert buckets.nearest((64, 64), 32, 8) == (32, 32) and buckets.nearest((100, 60), 32, 8) == (24, 40)
    assert buckets.nearest((60, 100), 32, 8) == (40, 24) and buckets.nearest((900, 100), 32, 8) == (16, 64)


@pytest.mark.parametrize("resolution", [512, 1024])
def test_hardly_anything_of_a_winner_is_cut_off(resolution: int) -> None:
    """Against half of a 2:1 picture that a square would cost."""
    transform = Transform(resolution, buckets=True)
    for width, height in product(range(500, 1001, 50), repeat=2):  # ratios up to 2:1
        high, wide = transform.target((width, height))
        kept = min(high / height, wide / width) / max(high / height, wide / width)
        assert kept > {512: 0.85, 1024: 0.92}[resolution], (width, height, high, wide)


def test_a_picture_is_resized_to_just_cover_its_bucket_and_cut_to_it() -> None:
    """100 x 60 to 24 high and 40 wide: scaled by 0.4, nothing is cut. 60 x 60: scaled by 2/3, 8 of 40 rows above and below."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    transform = Transform(PIXELS, flip=True, **HOW)
    upright, mirrored = transform.views(image, CENTER, (24, 40))
    expected = np.asarray(image.resize((40, 24), Image.Resampling.BILINEAR), dtype=np.float32) / 127.5 - 1
    torch.testing.assert_close(upright, torch.from_numpy(expected).permute(2, 0, 1))
    assert torch.equal(mirrored, upright.flip(-1))
    assert transform.framings((100, 60), CENTER, (24, 40)) == [(60, 100, 0, 0, 24, 40)] * 2
    assert transform.framings((60, 60), CENTER, (24, 40)) == [(60, 60, 8, 0, 24, 40)] * 2
    assert transform.apply(image.crop((0, 0, 60, 60)), CENTER, False, (24, 40)).shape == (3, 24, 40)


@pytest.mark.parametrize(("resolution", "step"), [(512, 32), (1024, 64)])
def test_nothing_of_a_winner_is_cut_off_where_it_is_to_fit(resolution: int, step: int) -> None:
    """Both sides are resized to the bucket's; a picture of quite another shape, a loser's say, is cut as ever."""
    fit, cut = (Transform(resolution, buckets=True, bucket_step=step, crop=crop) for crop in ("fit", "center"))
    for width, height in product(range(500, 2001, 125), repeat=2):  # ratios up to 4:1
        target = fit.target((width, height))
        assert fit.framings((width, height), CENTER, target) == [(height, width, 0, 0, *target)]
    square, wide = (resolution, resolution), fit.target((1600, 900))
    assert (
        fit.framings(square, CENTER, wide) == cut.framings(square, CENTER, wide) and cut.framings(square, CENTER, wide)[0][2] > 0
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 103, 3), dtype=np.uint8))
    expected = np.asarray(image.resize(square, Image.Resampling.BILINEAR), dtype=np.float32) / 127.5 - 1
    torch.testing.assert_close(fit.apply(image, CENTER, False), torch.from_numpy(expected).permute(2, 0, 1))


def test_without_buckets_nothing_is_new() -> None:
    assert "buckets" not in Transform(32).describe() and "bucket_step" in Transform(32, **HOW).describe()
    with pytest.raises(UserError, match="bucket_step is 64; it must be from 1 to the resolution, 32"):
        Transform(32, buckets=True)


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("flip", [False, True])
def test_a_pair_is_encoded_in_its_winners_shape(flip: bool, tmp_path: Path) -> None:
    cache, encoder = built(tmp_path, flip=flip), SmallEncoder()
    transform, table = Transform(PIXELS, flip=flip, **HOW), open_pairs(tmp_path / "pairs.jsonl")
    for row in range(len(cache)):
        target = transform.target(SIZES[row % 4])
        assert cache.shape_of(row) == (4, target[0] // 4, target[1] // 4)
        assert transform.shapes[cache.bucket_numbers[row]] == target
        for side in ("winner", "loser"):
            with Image.open(io.BytesIO(table[row].side(side).read_bytes())) as image:
                views = transform.views(image.convert("RGB"), CENTER, target)
            for flipped, view in enumerate(views):
                expected = encoder.encode_images(view[None])
                mean, std = cache.moments(row, side, bool(flipped))
                torch.testing.assert_close(mean, expected["mean"][0], rtol=0, atol=1e-6)
                torch.testing.assert_close(std, expected["std"][0], rtol=0, atol=1e-6)
                assert cache.framing(row, side, bool(flipped))[4:].tolist() == list(target)
    assert len({cache.shape_of(row) for row in range(len(cache))}) == 4


def test_one_picture_in_two_shapes_is_encoded_twice(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    rows = [{"prompt": "a", "chosen": "w0.png", "rejected": "l0.png"}, {"prompt": "b", "chosen": "w1.png", "rejected": "l0.png"}]
    rows.append({"prompt": "c", "chosen": "w1.png", "rejected": "l0.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = SmallEncoder()
    build_cache(open_pairs(tmp_path / "pairs.jsonl"), encoder, tmp_path / "cache", Transform(PIXELS, **HOW))
    assert encoder.images == 4  # w0, w1, and l0 in the shape of either


# --------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(1, 1, 1), (2, 2, 1), (3, 1, 2)])
def test_every_batch_has_one_shape_and_no_row_is_left_out(batch: int, accumulation: int, world: int, tmp_path: Path) -> None:
    cache = built(tmp_path)
    how = LoaderSettings(batch, accumulation)
    loaders = [PairLoader(cache, range(10), how, rank, world) for rank in range(world)]
    counts = [sum(i % 4 == k for i in range(10)) for k in range(4)]
    blocks = sum(-(-count // batch) for count in counts)
    steps = blocks  # as many epochs as there are micro-batches in a step
    seen: Counter[int] = Counter()
    for loader in loaders:
        for micro in loader.steps(0, steps):
            for made in micro:
                assert made.winner.shape == made.loser.shape == made.noise.shape
                assert {cache.shape_of(row) for row in made.index.tolist()} == {tuple(made.winner.shape[1:])}
                seen.update(made.index.tolist())
    epochs = accumulation * world
    assert set(seen) == set(range(10)) and min(seen.values()) >= epochs
    assert sum(seen.values()) == epochs * blocks * batch


def test_the_order_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    cache = built(tmp_path)
    alone = [b.index.tolist() for micro in PairLoader(cache, range(10), LoaderSettings(2, 2)).steps(0, 4) for b in micro]
    both = [PairLoader(cache, range(10), LoaderSettings(2, 1), rank, 2).steps(0, 4) for rank in (0, 1)]
    together = [b.index.tolist() for micros in zip(*both, strict=True) for (b,) in micros]
    assert alone == together


def test_an_order_by_hand() -> None:
    """Three rows of one shape and one of another in batches of two: three blocks, in which one row of each comes again."""
    order = BucketOrder([3, 5, 3, 3], batch_size=2, seed=0)
    epochs = [[{order.row(epoch * 6 + 2 * k + i) for i in (0, 1)} for k in range(3)] for epoch in range(20)]
    for blocks in epochs:
        assert {1} in blocks and set().union(*blocks) == {0, 1, 2, 3}
        assert all(block == {1} or (1 not in block and len(block) == 2) for block in blocks)
    assert len({tuple(map(tuple, blocks)) for blocks in epochs}) > 3
    assert [order.row(p) for p in range(6)] == [BucketOrder([3, 5, 3, 3], 2, 0).row(p) for p in range(6)]


def test_pairs_of_rare_shapes_are_told() -> None:
    """Four of bucket 1, three of 2 and one of 7: how often the last comes in an epoch of blocks of four is counted."""
    numbers = [1, 1, 1, 1, 2, 2, 2, 7]
    line = buckets.told_rare(numbers, 4)
    assert line.startswith("4 of 8 pairs have one of 2 shapes that do not fill a batch of 4: they come up to 4 times an epoch")
    order = BucketOrder(numbers, 4, 0)
    assert Counter(order.row(position) for position in range(12))[7] == 4
    assert buckets.told_rare(numbers, 1) == "" and buckets.told_rare([0] * 5, 4) == ""


def test_validation_batches_hold_one_shape_and_all_draws(tmp_path: Path) -> None:
    made = validation_batches(built(tmp_path), range(10), LoaderSettings(3), draws_per_pair=2)
    assert all(len({tuple(x.shape) for x in (batch.winner, batch.loser, batch.noise)}) == 1 for batch in made)
    assert Counter(row for batch in made for row in batch.index.tolist()) == dict.fromkeys(range(10), 2)


def test_a_curriculum_and_buckets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave one of them out"):
        PairLoader(built(tmp_path), range(10), LoaderSettings(2, curriculum="margin", steps=10))


# ----------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("family", ["sdxl", "pixart"])
def test_a_run_on_pairs_of_several_shapes(family: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same weights whether the cache is new or not, and SDXL is told each bucket's size."""
    saved, pairs, calls = on_disk(family, tmp_path), write_pairs(tmp_path / "data", 8), []
    with listening(calls):
        run(saved, pairs, "diffusion-dpo", tmp_path / "run", adapter="lora", steps=4, **HOW)
    assert "1 of 7 pairs have one of 1 shapes that do not fill a batch of 2" in " ".join(capsys.readouterr().out.split())
    run(saved, pairs, "diffusion-dpo", tmp_path / "again", adapter="lora", steps=4, **HOW)
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "again"))
    if family == "sdxl":
        targets = {tuple(row[4:].tolist()) for call in calls for row in call["added_cond_kwargs"]["time_ids"]}
        assert len(targets) >= 3 and targets <= set(buckets.shapes(PIXELS, 8))


def test_objectives_that_sample_refuse_buckets(tmp_path: Path) -> None:
    saved, pairs = on_disk("sdxl", tmp_path), write_pairs(tmp_path / "data", 4)
    with pytest.raises(UserError, match="data.buckets: this objective samples pictures of its own"):
        run(saved, pairs, "seppo", tmp_path / "run", **HOW)
