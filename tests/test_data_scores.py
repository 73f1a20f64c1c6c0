"""A judge's scores of both pictures: from the columns that ``relabel`` writes, through the cache, into the batch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_data_cache import CENTRAL, DISTINCT, SmallEncoder, png, write_pairs
from worlds import PairsInMemory

from diffalign.data.cache import PairCache, build_cache, cache_fingerprint
from diffalign.data.cache_values import FillOptions
from diffalign.data.draws import draw
from diffalign.data.loader import LoaderSettings, PairLoader, collate, validation_batches
from diffalign.data.open import open_pairs
from diffalign.data.pairs import RowProblem
from diffalign.data.validate import check
from diffalign.errors import StaleCacheError, UserError
from diffalign.levels import Levels

NAN = float("nan")


def pick_a_pic(path: Path, labels: list[float], **more: list) -> Path:
    n = len(labels)
    columns = {"jpg_0": [png(2 * i) for i in range(n)], "jpg_1": [png(2 * i + 1) for i in range(n)]}
    pq.write_table(pa.table(columns | {"label_0": labels, "caption": [f"prompt {i}" for i in range(n)]} | more), path)
    return path


def chosen_rejected(root: Path, *rows: dict) -> Path:
    for i in range(4):
        (root / f"{i}.png").write_bytes(png(i))
    base = {"prompt": "p", "chosen": "0.png", "rejected": "1.png"}
    (root / "pairs.jsonl").write_text("\n".join(json.dumps(base | row) for row in rows))
    return root / "pairs.jsonl"


# ------------------------------------------------------------------------------------------------------------------ the table


def test_scores_follow_the_preference(tmp_path: Path) -> None:
    place = pick_a_pic(tmp_path / "p.parquet", [1.0, 0.0, 0.5, 0.25], score_0=[1.0, 2.0, 3.0, 4.0], score_1=[5.0, 6.0, 7.0, 8.0])
    table = open_pairs(place)
    assert [pair.scores for pair in table] == [(1.0, 5.0), (6.0, 2.0), (3.0, 7.0), (8.0, 4.0)]
    assert table.stored(1).pair == table[1] and table.stored(1).images[0].data == png(2)


def test_chosen_and_rejected_have_scores_of_their_own(tmp_path: Path) -> None:
    rows = ({"score_chosen": 1, "score_rejected": 2}, {"label": 0.0, "score_chosen": 1, "score_rejected": "2.5"}, {})
    assert [pair.scores for pair in open_pairs(chosen_rejected(tmp_path, *rows))] == [(1.0, 2.0), (2.5, 1.0), None]


@pytest.mark.parametrize("cell", [None, "", " ", NAN, "nan"])
def test_an_empty_cell_means_no_scores(tmp_path: Path, cell: object) -> None:
    pair = open_pairs(chosen_rejected(tmp_path, {"score_chosen": 1, "score_rejected": cell}))[0]
    assert pair.scores is None and pair.label == 1.0


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("good", "score_rejected is 'good', not a number"), (math.inf, "score_rejected is inf; it must be finite$")],
)
def test_a_score_that_makes_no_sense_is_a_problem_of_its_row(tmp_path: Path, cell: object, reason: str) -> None:
    place = chosen_rejected(tmp_path, {"score_chosen": 1, "score_rejected": cell}, {})
    with pytest.raises(RowProblem, match=rf"pairs.jsonl:line 1: {reason}"):
        open_pairs(place)[0]


JUDGED = {
    **{"clip_0": [1.0, 2.0], "clip_1": [3.0, 4.0], "clip_margin": [-2.0, 2.0]},
    **{"mine_0": [5.0, NAN], "mine_1": [7.0, 8.0], "mine_margin": [-2.0, NAN]},
    **{"model_0": ["sd", "sd"], "model_1": ["xl", "xl"]},
}


def test_the_scores_of_a_judge_are_found_by_its_name(tmp_path: Path) -> None:
    place = pick_a_pic(tmp_path / "p.parquet", [1.0, 0.0], **JUDGED)
    assert [pair.scores for pair in open_pairs(place)] == [None, None]
    assert [pair.scores for pair in open_pairs(place, scores="clip")] == [(1.0, 3.0), (4.0, 2.0)]
    assert [pair.scores for pair in open_pairs(place, scores="mine")] == [(5.0, 7.0), None]
    assert [open_pairs(place, scores=s).scored for s in (None, "clip")] == [False, True]
    other = chosen_rejected(tmp_path, {"clip_chosen": 1.0, "clip_rejected": 0.0, "label": 0.0})
    assert open_pairs(other, scores="clip")[0].scores == (0.0, 1.0)
    assert (
        open_pairs(place).fingerprint
        != open_pairs(place, scores="clip").fingerprint
        != open_pairs(place, scores="mine").fingerprint
    )


def test_a_judge_that_has_no_columns_is_answered_with_those_that_have(tmp_path: Path) -> None:
    place = pick_a_pic(tmp_path / "p.parquet", [1.0, 0.0], **JUDGED)
    with pytest.raises(UserError, match=r"no scores by 'hps' \(it lacks hps_0 and hps_1\); there are those of clip, mine\.$"):
        open_pairs(place, scores="hps")
    with pytest.raises(UserError, match=r"scores='clip' and columns score_1=mine_1 both say where the scores are"):
        open_pairs(place, scores="clip", columns={"score_1": "mine_1"})
    with pytest.raises(UserError, match="there are none; `diffalign relabel` writes them"):
        open_pairs(pick_a_pic(tmp_path / "q.parquet", [1.0]), scores="clip")


def test_columns_of_scores_can_be_named_one_by_one(tmp_path: Path) -> None:
    place = pick_a_pic(tmp_path / "p.parquet", [1.0, 0.0], **JUDGED)
    table = open_pairs(place, columns={"score_0": "mine_0", "score_1": "clip_1"})
    assert [pair.scores for pair in table] == [(5.0, 3.0), None]


def test_the_report_tells_how_many_have_scores(tmp_path: Path) -> None:
    place = pick_a_pic(tmp_path / "p.parquet", [1.0, 0.0], **JUDGED)
    report = check(open_pairs(place, scores="mine"))
    assert (report.scored, report.scores) == (1, (5.0, 7.0))
    assert "scores       5 to 7, of 1 pairs" in report.to_text()
    assert "scores" not in check(open_pairs(place)).to_text()


# ----------------------------------------------------------------------------------------------------------- cache and batches


@pytest.fixture
def cache(tmp_path: Path) -> PairCache:
    """The second of three pairs has no scores; the third is turned round."""
    place = pick_a_pic(tmp_path / "p.parquet", [1.0, 1.0, 0.0], score_0=[0.1, NAN, 0.3], score_1=[1.1, 1.2, 1.3])
    return build_cache(open_pairs(place), SmallEncoder(), tmp_path / "c", CENTRAL)


def test_the_cache_keeps_them(cache: PairCache, tmp_path: Path) -> None:
    wanted = torch.tensor([[0.1, 1.1], [NAN, NAN], [1.3, 0.3]])
    for found in (cache, PairCache.open(tmp_path / "c")):
        assert found.scores.dtype == torch.float32
        torch.testing.assert_close(found.scores, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_killed_build_keeps_the_scores_of_what_was_committed(tmp_path: Path) -> None:
    numbers = [i / 7 for i in range(6)]
    place = pick_a_pic(tmp_path / "p.parquet", [1.0, 0.0] * 3, score_0=numbers, score_1=[*numbers[1:], NAN])
    how = FillOptions(batch_size=2, shard_items=4)
    whole = build_cache(open_pairs(place), SmallEncoder(), tmp_path / "whole", CENTRAL, how)
    with pytest.raises(KeyboardInterrupt):
        build_cache(open_pairs(place), SmallEncoder(fail_after=4), tmp_path / "cut", CENTRAL, how)
    assert list((tmp_path / "cut" / "journal").iterdir())
    rest = build_cache(open_pairs(place), SmallEncoder(), tmp_path / "cut", CENTRAL, how)
    torch.testing.assert_close(rest.scores, whole.scores, rtol=0, atol=0, equal_nan=True)
    assert (tmp_path / "cut/pairs.npy").read_bytes() == (tmp_path / "whole/pairs.npy").read_bytes()
    assert whole.scores[5].isnan().all() and whole.scores[:5].isfinite().all()


def test_another_judge_makes_another_cache(tmp_path: Path) -> None:
    place = pick_a_pic(tmp_path / "p.parquet", [1.0, 0.0], **JUDGED)
    build_cache(open_pairs(place, scores="clip"), SmallEncoder(), tmp_path / "c", CENTRAL)
    with pytest.raises(StaleCacheError, match="data.fingerprint was"):
        build_cache(open_pairs(place, scores="mine"), SmallEncoder(), tmp_path / "c", CENTRAL)


def test_a_cache_of_an_older_version_is_told_by_name(tmp_path: Path) -> None:
    table = open_pairs(write_pairs(tmp_path, DISTINCT))
    build_cache(table, SmallEncoder(), tmp_path / "c", CENTRAL)
    known = tmp_path / "c" / "fingerprint.json"
    known.write_text(json.dumps(json.loads(known.read_text()) | {"version": 1}))
    with pytest.raises(StaleCacheError, match="is of version 1, and this diffalign reads version 5"):
        PairCache.open(tmp_path / "c")
    with pytest.raises(StaleCacheError, match="version was 1 and is now 5"):
        PairCache.open(tmp_path / "c", cache_fingerprint(table, SmallEncoder(), CENTRAL))


def test_batches_carry_the_scores_of_their_rows(cache: PairCache) -> None:
    settings = LoaderSettings(batch_size=2, seed=3)
    batches = [b for step in PairLoader(cache, range(3), settings).steps(0, 6) for b in step]
    batches += validation_batches(cache, [2, 1], settings, 2)
    for batch in batches:
        assert batch.scores.dtype == torch.float32
        torch.testing.assert_close(batch.scores, cache.scores[batch.index], rtol=0, atol=0, equal_nan=True)
    only = collate(cache, [1], [draw(0, 0, cache.latent_shape, Levels(), 0.0, False)], True)
    assert only.scores.isnan().all(), "where others have scores, a batch without any has the field, too"


def test_data_without_scores_make_batches_without(tmp_path: Path) -> None:
    plain = build_cache(open_pairs(write_pairs(tmp_path, DISTINCT)), SmallEncoder(), tmp_path / "c", CENTRAL)
    assert plain.scores is None
    pairs = PairsInMemory(4)
    for encoded in (plain, pairs):
        (batch,) = next(PairLoader(encoded, range(4), LoaderSettings(batch_size=2)).steps(0, 1))
        assert batch.scores is None and batch.slice(0, 1).scores is None and batch.to("cpu").scores is None
    pairs.scores = torch.arange(8.0).reshape(4, 2)
    (batch,) = next(PairLoader(pairs, range(4), LoaderSettings(batch_size=2)).steps(0, 1))
    assert torch.equal(batch.scores, pairs.scores[batch.index])


def test_scores_are_cut_and_moved_with_their_batch(cache: PairCache) -> None:
    draws = [draw(0, p, cache.latent_shape, Levels(), 0.0, False) for p in range(3)]
    batch = collate(cache, [0, 2, 1], draws, True)
    half = batch.to("cpu", torch.bfloat16)
    assert half.winner.dtype == torch.bfloat16 and half.scores.dtype == torch.float32
    assert half.scores[0].tolist() == cache.scores[0].tolist()
    part = batch.slice(1, 3)
    assert part.scores[0].tolist() == cache.scores[2].tolist() and len(part.scores) == len(part) == 2
    assert batch.to("meta").scores.device.type == "meta"
    assert replace(batch, scores=None).slice(1, 3).scores is None
