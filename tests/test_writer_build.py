"""Preferences between rewrites, made: candidates, pictures, verdicts, pairs; cut off and gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
from test_writer_material import writer
from test_writer_sampling import biased
from threads import Process, in_threads

import reward_models
from diffalign.errors import UserError
from pipelines import families
from pipelines.prompts import Prompt
from pipelines.rewrite_pairs import read_rewrites
from pipelines.semantics import load_embedding
from pipelines.writers.build import Candidates, Pairing, Proposing, build, pair_up
from pipelines.writers.rewrite_scorer import DrawingSettings, RewriteScorer, standardised
from pipelines.writers.sampling import Decoding, Truncated
from pipelines.writers.sampling import candidates as rewrites_of
from pipelines.writers.writer import Writer

PROMPTS = ["a red circle on a blue background", "a red star", "a small green square"]
SHORT = (Decoding("sample", max_rewrite_tokens=6), Decoding("diverse-beam", max_rewrite_tokens=6))
PROPOSING = Proposing(count=4, decodings=SHORT)
SAMPLING = DrawingSettings(pictures=1, steps=2, guidance_scale=2.0, batch_size=8)


@pytest.fixture(scope="module")
def scorer() -> RewriteScorer:
    return RewriteScorer(families.load_pipeline("tiny"), {"oracle": reward_models.load("oracle")}, SAMPLING)


@pytest.fixture(scope="module")
def embedding() -> Any:
    return load_embedding("tiny")


def made(scorer: RewriteScorer, embedding: Any, out: Path, prompts: Sequence[str] = PROMPTS, **options: Any) -> Any:
    options = {"proposing": PROPOSING, "pairing": Pairing(min_gap=0.0), "chunk": 1, **options}
    return build(prompts, ending(), scorer, embedding, out, **options)


def ending(bias: float = 5.0) -> Writer:
    """It often ends a rewrite before six tokens, and not always."""
    made = writer("gpt2", template="rephrase")
    return biased(made, **{f"t{made.tokenizer.eos_token_id}": bias})


# ---------------------------------------------------------------------------------------------------------------- building


def test_best_and_worst_become_a_pair_with_all_that_is_known(scorer: RewriteScorer, embedding: Any, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    built = made(scorer, embedding, out)
    table = read_rewrites(out)
    assert built.pairs == len(table) == 3 and [row.prompt for row in table] == PROMPTS
    candidates = [json.loads(line) for line in (tmp_path / "pairs.candidates.jsonl").read_text().splitlines()[1:]]
    for row, found in zip(table, candidates, strict=True):
        scores = found["scores"]["oracle"]
        assert len(found["texts"]) == len(set(found["texts"])) >= 2
        best, worst = found["texts"].index(row.chosen), found["texts"].index(row.rejected)
        assert scores[best] == max(scores) and scores[worst] == min(scores)
        assert row.chosen_score > row.rejected_score
        assert row.distance == pytest.approx(found["distances"][best])
        assert row.provenance["chosen_oracle"] == pytest.approx(scores[best])
        assert row.provenance["chosen_way"] in ("sample", "diverse-beam")


def test_rewrites_that_had_not_ended_are_no_candidates(scorer: RewriteScorer, embedding: Any, tmp_path: Path) -> None:
    built = made(scorer, embedding, tmp_path / "pairs.jsonl", proposing=Proposing(count=6, decodings=SHORT[:1]))
    drawn = [text for texts in rewrites_of(ending(), PROMPTS, 6, Decoding(max_rewrite_tokens=6)) for text in texts]
    broken = [text for text in drawn if isinstance(text, Truncated)]
    assert 0 < len(broken) < len(drawn) and built.truncated == len(broken)
    lines = (tmp_path / "pairs.candidates.jsonl").read_text().splitlines()[1:]
    kept = [text for line in lines for text in json.loads(line)["texts"]]
    assert kept and not set(kept) & {str(text) for text in broken}
    assert f"{len(broken)} candidates had not ended at max_rewrite_tokens" in built.to_text()
    with pytest.raises(UserError, match="12 candidates had not ended: raise --max-rewrite-tokens"):
        build(PROMPTS, ending(-50.0), scorer, embedding, tmp_path / "none.jsonl", proposing=PROPOSING)


def test_a_prompt_that_cannot_be_rewritten_stops_nothing(scorer: RewriteScorer, embedding: Any, tmp_path: Path) -> None:
    mark = ending().tokenizer.eos_token
    bad = Prompt(f"a {mark} cat", origin="list.txt:7")
    asked = [PROMPTS[0], bad, Prompt(PROMPTS[1], origin="list.txt:8"), "word " * 400]
    built = made(scorer, embedding, tmp_path / "pairs.jsonl", prompts=asked)
    assert built.prompts == 2 and len(built.unwritable) == 2
    assert built.unwritable[0].startswith(f"list.txt:7: prompt contains {mark!r}")
    assert built.unwritable[1].startswith("prompt 4: the prompt takes")
    assert "2 prompts that cannot be rewritten were left out:\n  list.txt:7" in built.to_text()
    with pytest.raises(UserError, match="There are no prompts to rewrite; list.txt:7: prompt contains"):
        made(scorer, embedding, tmp_path / "none.jsonl", prompts=[bad])


def test_pictures_are_judged_for_the_prompt_and_not_for_the_rewrite(scorer: RewriteScorer) -> None:
    rows = [("a red circle", "a small blue square"), ("a small blue square", "a small blue square")]
    drawn = scorer.pictures([p for p, _ in rows], [r for _, r in rows])
    scores = scorer.scores([p for p, _ in rows], [r for _, r in rows])["oracle"]
    expected = reward_models.load("oracle").score(drawn, [p for p, _ in rows])
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-6)


def test_rewrites_of_a_prompt_are_drawn_from_the_same_noise_whoever_else_is_there(scorer: RewriteScorer) -> None:
    alone = scorer.scores(["a red star"], ["a red star, vivid"])["oracle"]
    prompts = ["a blue cross", "a red star", "a red star"]
    among = scorer.scores(prompts, [*prompts[:2], "a red star, vivid"])["oracle"]
    assert among[2] == pytest.approx(alone[0], abs=1e-5)
    assert SAMPLING.seeds("a red star") != SAMPLING.seeds("a blue cross")


def test_a_build_that_was_cut_off_goes_on(scorer: RewriteScorer, embedding: Any, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    made(scorer, embedding, whole)
    drawn = []

    def dying(stage: str, done: int, total: int) -> None:
        drawn.append(total)
        if done == 2 and total == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(scorer, embedding, cut, progress=dying)
    part = tmp_path / "cut.candidates.jsonl.part-0"
    part.write_bytes(part.read_bytes()[:-20])  # the last line was not written to its end
    made(scorer, embedding, cut, progress=dying)
    assert drawn == [3, 3, 2, 2]  # two done, one of them lost: two to go
    assert cut.read_text() == whole.read_text() and not part.exists()


def test_candidates_of_another_build_are_not_mixed_in(scorer: RewriteScorer, embedding: Any, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    made(scorer, embedding, out)
    with pytest.raises(UserError, match="is there already. Name another, or add --overwrite"):
        made(scorer, embedding, out)
    out.unlink()
    with pytest.raises(UserError, match="what is left of a build with another writer, generator, judges or settings"):
        made(scorer, embedding, out, proposing=Proposing(count=4, decodings=SHORT, seed=1))
    again: list[int] = []
    made(scorer, embedding, out, pairing=Pairing(0.0, max_distance=1.9), progress=lambda stage, done, total: again.append(total))
    assert again == []  # another pairing draws nothing anew
    made(scorer, embedding, out, proposing=Proposing(count=4, decodings=SHORT, seed=1), overwrite=True)


def test_processes_share_the_prompts(scorer: RewriteScorer, embedding: Any, tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole.parquet", tmp_path / "shared.parquet"
    made(scorer, embedding, whole)
    first, second = build_in_two(scorer, embedding, shared)
    assert first.pairs == 3 and second is None
    assert read_rewrites(whole).rows == read_rewrites(shared).rows


def test_processes_share_what_is_left(scorer: RewriteScorer, embedding: Any, tmp_path: Path) -> None:
    """Of three prompts the second is done: by their places, the first process would have both others to do."""
    whole, shared, drawn = tmp_path / "whole.jsonl", tmp_path / "shared.jsonl", []
    made(scorer, embedding, whole)
    assert made(scorer, embedding, shared, share=(1, 2)) is None
    build_in_two(scorer, embedding, shared, progress=lambda stage, done, total: drawn.append((done, total)))
    assert drawn == [(1, 1), (1, 1)]
    assert shared.read_text() == whole.read_text()


def build_in_two(scorer: RewriteScorer, embedding: Any, out: Path, **options: Any) -> list[Any]:
    """One works while the other waits: models are loaded by one thread at a time."""
    turn = Lock()

    def work(process: Process) -> Any:
        def wait() -> None:
            turn.release()
            process.all_gather_object(None)
            turn.acquire()

        with turn:
            return made(scorer, embedding, out, share=(process.rank, process.world), wait=wait, **options)

    return in_threads(2, work)


# ----------------------------------------------------------------------------------------------------------------- pairing


def candidates(*scores: float, distances: Sequence[float] = (), prompt: str = "p") -> Candidates:
    n = len(scores)
    texts = tuple(f"{prompt}{k}" for k in range(n))
    return Candidates(prompt, texts, ("sample",) * n, tuple(distances) or (0.1,) * n, {"judge": scores})


def test_candidates_that_are_too_close_make_no_pair(tmp_path: Path) -> None:
    found = [candidates(0.0, 1.0, 0.5), candidates(0.0, 0.1, 0.05, prompt="q"), candidates(3.0, prompt="r")]
    built = pair_up(found, tmp_path / "p.jsonl", Pairing(min_gap=1.0), 0.05, {})
    assert (built.pairs, built.too_close, built.too_few) == (1, 1, 1) and built.drifted == 1.0
    with pytest.raises(UserError, match=r"No pair is left of 3 prompts: 2 with candidates closer than min_gap 9, 1 with too few"):
        pair_up(found, tmp_path / "q.jsonl", Pairing(min_gap=9.0), 0.05, {})


def test_a_capped_candidate_is_never_chosen_and_may_be_rejected(tmp_path: Path) -> None:
    found = [candidates(3.0, 1.0, 0.0, distances=(0.9, 0.1, 0.9)), candidates(5.0, 4.0, distances=(0.9, 0.9), prompt="q")]
    built = pair_up(found, tmp_path / "p.jsonl", Pairing(min_gap=0.0, max_distance=0.5), 0.5, {})
    (row,) = read_rewrites(tmp_path / "p.jsonl")
    assert (row.chosen, row.rejected) == ("p1", "p2") and built.too_few == 1


def test_judges_count_alike_whatever_their_scales() -> None:
    small, large = [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]], [[300.0, 100.0, 200.0], [100.0, 300.0, 200.0]]
    both = standardised({"small": small, "large": large})
    np.testing.assert_allclose(both[0], [0.0, -0.5, 0.5], atol=1e-12)
    assert np.std(np.concatenate(standardised({"one": small}))) == pytest.approx(np.sqrt(4 / 6))
    np.testing.assert_allclose(standardised({"mute": [[2.0, 2.0]]})[0], [0.0, 0.0])


def test_settings_that_cannot_be_are_refused(scorer: RewriteScorer, embedding: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="A pair takes two candidates at least; got 1"):
        Proposing(count=1)
    with pytest.raises(UserError, match="2 candidates cannot be shared out among 3 ways"):
        Proposing(count=2, decodings=tuple(Decoding(how) for how in ("sample", "beam", "diverse-beam")))
    with pytest.raises(UserError, match=r"ends in .txt; pairs are written as .jsonl or .parquet"):
        made(scorer, embedding, tmp_path / "pairs.txt")
    with pytest.raises(UserError, match="There are no prompts to rewrite"):
        made(scorer, embedding, tmp_path / "pairs.jsonl", prompts=[])
