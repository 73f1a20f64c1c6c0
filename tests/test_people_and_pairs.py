"""The synthetic people choose as documented, and the pairs they leave behind look like Pick-a-Pic v2."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, JpegImagePlugin

from diffalign.data.open import open_pairs
from diffalign.errors import UserError
from pipelines import sampling
from pipelines.tiny import model, pairs, scenes
from pipelines.tiny.people import People
from reward_models import oracle
from reward_models.oracle import Verdict

PICK_A_PIC_COLUMNS = {
    *("jpg_0", "jpg_1", "label_0", "label_1", "caption", "best_image_uid", "image_0_uid", "image_1_uid", "image_0_url"),
    *("image_1_url", "model_0", "model_1", "ranking_id", "user_id", "created_at", "are_different", "has_label"),
    "num_example_per_prompt",
}


def verdict(utility: float) -> Verdict:
    """A verdict of that utility (taste and faithfulness in equal parts)."""
    return Verdict(faithfulness=utility, taste=utility, objects_found=1.0, relation_kept=None)


def answers(people: People, first: Verdict, second: Verdict, n: int = 6000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([people.choose(first, second, rng) for _ in range(n)])


# ------------------------------------------------------------------------------------------------------------------ people


@pytest.mark.parametrize("gap", [-0.1, -0.02, 0.0, 0.05, 0.15])
def test_choices_follow_bradley_terry(gap: float) -> None:
    people = People(sharpness=20.0, flip_rate=0.0, tie_share=0.0)
    expected = 1.0 / (1.0 + np.exp(-20.0 * gap))
    found = answers(people, verdict(0.5 + gap), verdict(0.5), seed=1)
    assert set(found) <= {0.0, 1.0}
    assert found.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / len(found)))
    assert people.preference(verdict(0.5 + gap), verdict(0.5)) == pytest.approx(expected)


def test_swapping_the_pictures_swaps_the_preference() -> None:
    people = People()
    a, b = verdict(0.62), verdict(0.55)
    assert people.preference(a, b) > 0.5
    assert people.preference(a, b) + people.preference(b, a) == pytest.approx(1.0)


def test_utility_weighs_taste_and_faithfulness_as_told() -> None:
    pretty = Verdict(faithfulness=0.25, taste=0.9, objects_found=0.0, relation_kept=None)
    faithful = Verdict(faithfulness=1.0, taste=0.4, objects_found=1.0, relation_kept=None)
    assert People().utility(pretty) == pytest.approx(pretty.utility)
    assert People(taste_weight=1.0, faithfulness_weight=0.0).preference(pretty, faithful) > 0.99
    assert People(taste_weight=0.0, faithfulness_weight=1.0).preference(pretty, faithful) < 0.01


def test_careless_answers_come_at_the_flip_rate() -> None:
    found = answers(People(sharpness=1000.0, flip_rate=0.08, tie_share=0.0), verdict(0.9), verdict(0.1), seed=2)
    assert (found == 0.0).mean() == pytest.approx(0.08, abs=0.015)


def test_ties_come_within_the_band_and_only_there() -> None:
    people = People(tie_band=0.04, tie_share=0.6)
    assert (answers(people, verdict(0.53), verdict(0.5)) == 0.5).mean() == pytest.approx(0.6, abs=0.03)
    assert not (answers(people, verdict(0.55), verdict(0.5)) == 0.5).any()


def test_even_people_who_never_err_can_be_undecided_but_never_wrong() -> None:
    found = answers(People(sharpness=1e6, flip_rate=0.0, tie_band=0.04, tie_share=0.5), verdict(0.51), verdict(0.5))
    assert set(found) == {0.5, 1.0}


def test_defaults_agree_with_the_oracle_in_about_four_of_five_and_tie_like_pick_a_pic() -> None:
    people, rng = People(), np.random.default_rng(3)
    right, ties, n = [], 0, 4000
    for question in range(n):
        two = [
            Verdict(float(rng.choice([1.0, 0.75, 0.5], p=[0.88, 0.08, 0.04])), scenes.draw_style(rng).taste, 1.0, None)
            for _ in range(2)
        ]
        label = people.choose(*two, people.generator(question))
        ties += label == 0.5
        if label != 0.5:
            right.append((two[0].utility > two[1].utility) == (label == 1.0))
    assert 0.80 <= np.mean(right) <= 0.85
    assert 0.08 <= ties / n <= 0.16


def test_an_answer_depends_on_the_seed_and_the_question_not_on_the_order() -> None:
    people, a, b = People(seed=4), verdict(0.52), verdict(0.5)

    def ask(order: range) -> dict[int, float]:
        return {q: people.choose(a, b, people.generator(q)) for q in order}

    forwards, backwards = ask(range(50)), ask(range(49, -1, -1))
    assert forwards == backwards and len(set(forwards.values())) > 1
    assert forwards != {q: People(seed=5).choose(a, b, People(seed=5).generator(q)) for q in range(50)}


@pytest.mark.parametrize(
    ("field", "value"), [("flip_rate", 1.5), ("tie_share", -0.1), ("sharpness", float("nan")), ("tie_band", -1.0), ("crowd", 0)]
)
def test_impossible_people_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        People(**{field: value})


# ------------------------------------------------------------------------------------------------------------------ records


def record(label: float, seed: int = 0, caption: str | None = None) -> pairs.PairRecord:
    rng = np.random.default_rng(seed)
    _, plain = scenes.draw_captioned(rng, styled=0.0)
    jpgs = [pairs.encode_jpeg(scenes.render(scenes.draw_scene(rng))) for _ in range(2)]
    return pairs.PairRecord(caption or plain, *jpgs, label_0=label, user_id=7, model_0="tiny", model_1="other")


def test_jpeg_keeps_colour_at_full_resolution_and_the_oracles_opinion() -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        picture = scenes.render(scenes.draw_scene(rng))
        stored = Image.open(io.BytesIO(pairs.encode_jpeg(picture)))
        assert stored.format == "JPEG" and JpegImagePlugin.get_sampling(stored) == 0
        assert np.abs(np.asarray(stored).astype(int) - np.asarray(picture)).mean() < 2.5
        kinds = [[(o.colour, o.shape) for o in oracle.read_image(i).objects] for i in (picture, stored)]
        assert sorted(kinds[0]) == sorted(kinds[1])


def test_a_uid_names_the_content() -> None:
    one, other = pairs.image_uid(b"one"), pairs.image_uid(b"other")
    assert one == pairs.image_uid(b"one") != other
    assert [len(part) for part in one.split("-")] == [8, 4, 4, 4, 12]


def test_a_label_that_is_none_of_three_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.7"):
        record(0.7)


def test_the_file_has_pick_a_pics_columns_types_and_meaning(tmp_path: Path) -> None:
    records = [
        record(1.0, 1),
        record(0.0, 2),
        record(0.5, 3),
        record(1.0, 4, caption="a red circle"),
        record(1.0, 5, caption="a red circle"),
    ]
    pairs.write_pairs(records, tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    assert set(table.column_names) == PICK_A_PIC_COLUMNS
    types = {"jpg_0": "binary", "label_0": "double", "created_at": "timestamp[ns]", "user_id": "int64"}
    assert {name: str(table.schema.field(name).type) for name in types} == types
    rows = table.to_pylist()
    assert [r["label_0"] for r in rows] == [1.0, 0.0, 0.5, 1.0, 1.0]
    assert all(r["label_0"] + r["label_1"] == 1.0 and r["has_label"] and r["are_different"] for r in rows)
    assert [r["best_image_uid"] for r in rows[:3]] == [rows[0]["image_0_uid"], rows[1]["image_1_uid"], "tie"]
    assert [r["num_example_per_prompt"] for r in rows] == [1, 1, 1, 2, 2]
    assert [r["ranking_id"] for r in rows] == list(range(5)) and {r["user_id"] for r in rows} == {7}
    assert [(r["jpg_0"], r["jpg_1"], r["caption"]) for r in rows] == [(x.jpg_0, x.jpg_1, x.caption) for x in records]
    assert {(r["model_0"], r["model_1"]) for r in rows} == {("tiny", "other")}


def test_the_datasets_library_reads_the_file(tmp_path: Path) -> None:
    from datasets import Dataset

    pairs.write_pairs([record(1.0, 1), record(0.5, 2)], tmp_path / "p.parquet")
    data = Dataset.from_parquet(str(tmp_path / "p.parquet"), cache_dir=str(tmp_path / "cache"))
    assert set(data.column_names) == PICK_A_PIC_COLUMNS
    assert Image.open(io.BytesIO(data[1]["jpg_1"])).size == (64, 64)


def test_the_reader_for_pick_a_pic_gets_winners_losers_and_ties_right(tmp_path: Path) -> None:
    records = [record(1.0, 1), record(0.0, 2), record(0.5, 3)]
    pairs.write_pairs(records, tmp_path / "p.parquet")
    first, second, tie = open_pairs(tmp_path / "p.parquet")
    assert (first.winner.read_bytes(), first.loser.read_bytes()) == (records[0].jpg_0, records[0].jpg_1)
    assert (second.winner.read_bytes(), second.loser.read_bytes()) == (records[1].jpg_1, records[1].jpg_0)
    assert [p.label for p in (first, second, tie)] == [1.0, 1.0, 0.5] and first.prompt == records[0].caption
    assert len(open_pairs(tmp_path / "p.parquet", ties="drop")) == 2


def test_equal_pictures_are_said_to_be_equal(tmp_path: Path) -> None:
    one = record(0.5)
    twin = pairs.PairRecord(one.caption, one.jpg_0, one.jpg_0, 0.5, 1, "tiny", "tiny")
    pairs.write_pairs([twin], tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist()[0]["are_different"] is False


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pairs.write_pairs([record(1.0, 1), record(0.0, 2)], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_litter(tmp_path: Path) -> None:
    blocked = tmp_path / "here.parquet"
    blocked.mkdir()
    (blocked / "kept.txt").write_text("kept")
    with pytest.raises(UserError, match=r"here\.parquet"):
        pairs.write_pairs([record(1.0)], blocked)
    assert [p.name for p in tmp_path.iterdir()] == ["here.parquet"] and (blocked / "kept.txt").read_text() == "kept"


def test_describe_counts_ties_and_agreement() -> None:
    scene, caption = scenes.draw_captioned(np.random.default_rng(2), styled=0.0)
    right = pairs.encode_jpeg(scenes.render(scene))
    wrong = pairs.encode_jpeg(Image.new("RGB", (64, 64), "grey"))
    labels = (1.0, 1.0, 1.0, 0.0, 0.5)
    found = pairs.describe([pairs.PairRecord(caption, right, wrong, label, 0, "tiny", "tiny") for label in labels])
    assert (found.pairs, found.captions, found.ties, found.agreement) == (5, 1, 0.2, 0.75)
    assert pairs.describe([pairs.PairRecord(caption, right, wrong, 0.5, 0, "tiny", "tiny")]).agreement is None


# ---------------------------------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer()
    return model.assemble(tokenizer, model.build_text_encoder(tokenizer), model.build_vae(), model.build_unet())


def test_sampled_pairs_are_reproducible_and_of_the_train_split(untrained) -> None:
    def draw(seed: int) -> list[pairs.PairRecord]:
        return pairs.sample_pairs(untrained, 2, seed, steps=1, batch=4)

    first = draw(1)
    assert first == draw(1) != draw(2)
    assert len(first) == 2 and all(scenes.split_of(r.caption) == "train" for r in first)
    assert all(r.jpg_0 != r.jpg_1 for r in first)
    assert len({r.jpg_0 for r in first}) == 2


def test_more_pairs_begin_with_the_same_pairs(untrained) -> None:
    few, more = (pairs.sample_pairs(untrained, n, 3, steps=1, batch=2) for n in (1, 2))
    assert more[:1] == few


def test_of_several_candidates_the_two_furthest_apart_are_judged(untrained) -> None:
    (record,) = pairs.sample_pairs(untrained, 1, 5, candidates=4, steps=1, people=People(seed=5, tie_share=0.0))
    seeds = sampling.picture_seeds(1, 4, 5)
    drawn = [pairs.encode_jpeg(p) for p in sampling.sample(untrained, [record.caption] * 4, seeds=seeds, steps=1)]
    utility = {jpg: oracle.judge(Image.open(io.BytesIO(jpg)), record.caption).utility for jpg in drawn}
    assert len(set(utility.values())) > 2
    assert {record.jpg_0, record.jpg_1} == {min(drawn, key=utility.get), max(drawn, key=utility.get)}


def test_the_share_of_styled_captions_is_the_callers(untrained) -> None:
    captions = [r.caption for r in pairs.sample_pairs(untrained, 2, 0, styled=1.0, steps=1)]
    assert all("," in c for c in captions)


def test_a_model_of_another_size_is_refused_before_it_samples(untrained) -> None:
    side = untrained.unet.config.sample_size
    untrained.unet.register_to_config(sample_size=64)
    try:
        with pytest.raises(UserError, match="256 x 256"):
            pairs.sample_pairs(untrained, 1, 0, steps=1)
    finally:
        untrained.unet.register_to_config(sample_size=side)
