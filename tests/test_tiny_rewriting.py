"""The tiny world's people rewrite prompts as documented: the careful keep every claim, embellishers change exactly one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pipelines.rewrite_pairs import RewriteTable, read_rewrites
from pipelines.semantics import distance, load_embedding
from pipelines.tiny import rewriting, scenes, shipped
from pipelines.tiny.rewriting import CHANGES, EMBELLISHERS, TASTEFUL, Expansion, expansions
from reward_models import oracle

N = 4000
ENDS = {word: (trait, end) for trait, words in scenes.STYLE_WORDS.items() for end, word in enumerate(words)}


@pytest.fixture(scope="module")
def written() -> list[Expansion]:
    return expansions(N, seed=3)


def plain_part(rewrite: str) -> str:
    return rewrite.split(", ")[0]


def added(rewrite: str) -> list[str]:
    return rewrite.split(", ")[1:]


def kind_of_change(prompt: str, rewrite: str) -> str:
    """Which of ``CHANGES`` was made, found by comparing what the oracle reads; fails unless it is exactly one."""
    before, after = oracle.read_caption(prompt), oracle.read_caption(rewrite)
    if len(after.objects) < len(before.objects):
        assert (after.objects, after.relation, after.background) == (before.objects[:1], None, before.background)
        return "second object"
    found = [
        name
        for a, b in zip(before.objects, after.objects, strict=True)
        for name in ("colour", "shape", "size")
        if getattr(a, name) != getattr(b, name)
    ]
    found += ["background"] * (before.background != after.background)
    assert len(found) == 1 and before.relation == after.relation, (prompt, rewrite)
    return found[0]


def close_to(share: float, n: int) -> pytest.approx:
    return pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / n))


# -------------------------------------------------------------------------------------------------------------- everybody


def test_the_same_seed_gives_the_same_rewrites_and_more_begin_with_them(written: list[Expansion]) -> None:
    assert expansions(50, seed=3) == written[:50] == expansions(80, seed=3)[:50]
    assert expansions(50, seed=4) != written[:50]
    assert expansions(0, seed=3) == []


def test_a_rewrite_is_flagged_as_drifted_exactly_where_the_oracle_reads_other_claims(written: list[Expansion]) -> None:
    assert all(e.drifted == (oracle.read_caption(e.prompt) != oracle.read_caption(e.rewrite)) for e in written)
    assert np.mean([e.drifted for e in written]) == close_to(EMBELLISHERS, N)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_share_of_embellishers_can_be_set(share: float) -> None:
    found = np.mean([e.drifted for e in expansions(400, seed=1, embellishers=share)])
    assert found == close_to(share, 400)


def test_nothing_held_out_is_in_what_a_writer_learns_from(written: list[Expansion]) -> None:
    assert {scenes.split_of(text) for e in written for text in (e.prompt, e.rewrite)} == {"train"}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_prompts_of_a_held_out_split_become_that_or_training_but_never_the_other_one(split: str) -> None:
    found = expansions(600, seed=2, split=split)
    assert {scenes.split_of(e.prompt) for e in found} == {split}
    assert {scenes.split_of(e.rewrite) for e in found} == {split, "train"}
    assert all(e.drifted or scenes.split_of(e.rewrite) == split for e in found)


def test_prompts_are_plain_and_rewrites_end_with_style_words_of_different_traits(written: list[Expansion]) -> None:
    for e in written:
        words = added(e.rewrite)
        assert "," not in e.prompt and 1 <= len(words) <= 3 and set(words) <= set(ENDS)
        assert len({ENDS[word][0] for word in words}) == len(words)


def test_the_tasteful_end_of_every_trait_is_what_the_oracle_likes() -> None:
    assert set(TASTEFUL) == {"vivid", "outlined", "shaded", "clean", "centred"}
    middle = dict.fromkeys(oracle.TASTE_WEIGHTS, 0.5)
    for word in TASTEFUL:
        trait, end = ENDS[word]
        assert oracle.taste_of({**middle, trait: float(end)}) > oracle.taste_of({**middle, trait: 1.0 - end})


# ------------------------------------------------------------------------------------------------------------ the careful


def test_the_careful_keep_the_prompt_word_for_word_and_add_words_of_any_kind(written: list[Expansion]) -> None:
    those = [e for e in written if not e.drifted]
    assert all(plain_part(e.rewrite) == e.prompt for e in those)
    counts = Counter(len(added(e.rewrite)) for e in those)
    assert all(counts[k] / len(those) == close_to(share, len(those)) for k, share in rewriting.CAREFUL_WORDS.items())
    words = Counter(word for e in those for word in added(e.rewrite))
    total = sum(words.values())
    assert set(words) == set(ENDS) and all(n / total == close_to(0.1, total) for n in words.values())


# ----------------------------------------------------------------------------------------------------------- embellishers


def test_embellishers_add_two_or_three_tasteful_words_in_any_order(written: list[Expansion]) -> None:
    those = [added(e.rewrite) for e in written if e.drifted]
    assert all(set(words) <= set(TASTEFUL) for words in those)
    counts = Counter(map(len, those))
    assert all(counts[k] / len(those) == close_to(share, len(those)) for k, share in rewriting.EMBELLISHING_WORDS.items())
    first = Counter(words[0] for words in those)
    assert all(first[word] / len(those) == close_to(0.2, len(those)) for word in TASTEFUL)


def test_embellishers_change_exactly_one_claim_each_kind_as_often_as_documented(written: list[Expansion]) -> None:
    assert sum(CHANGES.values()) == pytest.approx(1.0)
    those = [e for e in written if e.drifted]
    kinds = [kind_of_change(e.prompt, e.rewrite) for e in those]
    whole = [  # prompts in which everything can be changed
        kind
        for e, kind in zip(those, kinds, strict=True)
        if (claims := oracle.read_caption(e.prompt)).background and len(claims.objects) == 2 and claims.objects[0].size
    ]
    counts = Counter(whole)
    assert len(whole) > 500 and all(counts[k] / len(whole) == close_to(share, len(whole)) for k, share in CHANGES.items())


def test_a_claim_that_is_not_made_cannot_be_changed() -> None:
    rng, prompt = np.random.default_rng(0), "a red square"
    assert {scenes.split_of(text) for text in (prompt, "a small red square", "a large red square")} == {"train"}
    assert {kind_of_change(prompt, rewriting.changed(prompt, rng)) for _ in range(60)} == {"colour", "shape"}


def test_two_objects_never_become_the_same() -> None:
    rng = np.random.default_rng(1)
    texts = {rewriting.changed("a red circle left of a blue circle", rng) for _ in range(300)}
    assert "a red circle" in texts and all("red circle left of a red circle" not in t for t in texts)
    objects = [oracle.read_caption(t).objects for t in texts]
    assert all(len({(o.colour, o.shape) for o in some}) == len(some) for some in objects) and len(texts) > 10


def test_the_shortest_captions_can_be_changed_in_every_split() -> None:
    rng = np.random.default_rng(2)
    shortest = [f"a {colour} {shape}" for colour in oracle.COLOURS for shape in oracle.SHAPES]
    assert {scenes.split_of(text) for text in shortest} >= {"train", "test"}
    assert all(rewriting.embellished(text, rng).drifted for text in shortest)


def test_captions_are_worded_as_plain_ones_are() -> None:
    for text in scenes.captions(300, seed=5, split="train"):
        assert rewriting.write_caption(oracle.read_caption(text)) == text


def test_a_prompt_from_elsewhere_is_refused_with_the_prompt() -> None:
    with pytest.raises(ValueError, match="no object in 'a photo of a cat'"):
        rewriting.changed("a photo of a cat", np.random.default_rng(0))


def test_the_shipped_preferences_are_of_people_who_look_at_style_first() -> None:
    """More than a third of the preferred rewrites mean something else. No path says where they were made."""
    table = read_rewrites(shipped.REWRITES)
    assert 380 <= len(table) <= 400 and len({row.prompt for row in table}) == len(table)
    drifted = {side: np.mean([distance > 0.1 for distance in distances]) for side, distances in _distances(table).items()}
    assert 0.33 < drifted["chosen"] < 0.45
    scores = np.array([[row.chosen_score, row.rejected_score] for row in table])
    assert (scores[:, 0] > scores[:, 1]).all()
    values = {str(v) for row in table for v in row.provenance.values()}
    assert {"tiny", "runs/sft"} <= values and not any(v.startswith(("/", "~")) for v in values)
    assert shipped.REWRITES.stat().st_size < 100_000


def _distances(table: RewriteTable) -> dict[str, np.ndarray]:
    embedding, prompts = load_embedding("tiny"), [row.prompt for row in table]
    sides = {"chosen": [row.chosen for row in table], "rejected": [row.rejected for row in table]}
    return {side: distance(embedding, prompts, texts).numpy() for side, texts in sides.items()}
