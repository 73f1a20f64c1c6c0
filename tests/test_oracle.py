"""The oracle against the truth: scenes whose content and style we know because we drew them."""

from __future__ import annotations

import io
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from pipelines.tiny import scenes
from reward_models import oracle

LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PLAIN = scenes.Style(saturation=0.6, outline=0.4, shading=0.4, clutter=0.3, offset=0.3)


def drawn(n: int, seed: int) -> list[tuple[scenes.Scene, Image.Image]]:
    rng = np.random.default_rng(seed)
    return [(scene, scenes.render(scene)) for scene in (scenes.draw_scene(rng) for _ in range(n))]


@pytest.fixture(scope="module")
def fresh() -> list[tuple[scenes.Scene, Image.Image]]:
    return drawn(300, seed=2024)


@pytest.fixture(scope="module")
def read(fresh) -> list[tuple[scenes.Scene, oracle.Reading]]:
    return [(scene, oracle.read_image(image)) for scene, image in fresh]


def full_caption(scene: scenes.Scene) -> str:
    parts = [f"a {o.colour} {o.shape}" for o in scene.objects]
    return f" {scene.relation} ".join(parts) if scene.relation else parts[0]


def agreement(read: list[tuple[scenes.Scene, oracle.Reading]], key=lambda o: (o.colour, o.shape)) -> float:
    """Share of the true objects that the oracle reads, in any order; a read object counts once."""
    hits = total = 0
    for scene, reading in read:
        seen = [key(o) for o in reading.objects]
        for item in scene.objects:
            total += 1
            if key(item) in seen:
                seen.remove(key(item))
                hits += 1
    return hits / total


# -------------------------------------------------------------------------------------------------- objects and relations


def test_objects_and_colours_of_fresh_scenes_are_read_in_98_percent(read) -> None:
    assert agreement(read) >= 0.98
    assert agreement(read, key=lambda o: o.colour) >= 0.98
    assert agreement(read, key=lambda o: o.shape) >= 0.98


def test_no_object_is_invented_and_the_background_is_read(read) -> None:
    assert np.mean([len(r.objects) == len(s.objects) for s, r in read]) >= 0.98
    assert np.mean([r.background == s.background for s, r in read]) >= 0.98


def test_centres_are_read_to_within_a_pixel(read) -> None:
    errors = []
    for scene, reading in read:
        for o in scene.objects:
            found = [f.centre for f in reading.objects if (f.colour, f.shape) == (o.colour, o.shape)]
            mass = np.array(o.centre) + o.radius * oracle.SHAPES[o.shape].mean(axis=0)  # of a triangle: below its centre
            errors += [np.hypot(*(mass - 0.5 - f)) for f in found]
    assert len(errors) > 400 and np.quantile(errors, 0.98) < 1.0


def test_a_true_caption_gets_full_faithfulness_and_its_relation(fresh) -> None:
    verdicts = [oracle.judge(image, full_caption(scene)) for scene, image in fresh]
    relations = [v.relation_kept for v in verdicts if v.relation_kept is not None]
    assert np.mean([v.faithfulness == 1.0 for v in verdicts]) >= 0.97
    assert len(relations) > 150 and np.mean(relations) >= 0.98


@pytest.mark.parametrize("wrong", ["left of", "right of", "above", "below"])
def test_every_wrong_relation_is_refused(fresh, wrong: str) -> None:
    others = [(s, i) for s, i in fresh if s.relation not in (None, wrong)][:60]
    kept = [oracle.judge(i, full_caption(replace(s, relation=wrong))).relation_kept for s, i in others]
    assert len(kept) == 60 and np.mean(kept) <= 0.02


def test_a_picture_of_another_scene_gets_a_lower_verdict(fresh) -> None:
    own = [oracle.judge(i, full_caption(s)) for s, i in fresh]
    other = [oracle.judge(fresh[k - 1][1], full_caption(s)) for k, (s, _) in enumerate(fresh)]
    assert np.mean([v.faithfulness for v in other]) < np.mean([v.faithfulness for v in own]) - 0.4
    assert np.mean([v.objects_found for v in other]) < 0.2
    assert all(o.taste == fresh_taste for o, fresh_taste in zip(other[1:], [v.taste for v in own[:-1]], strict=True))


def test_one_wrong_word_costs_exactly_one_claim() -> None:
    scene, image = next((s, i) for s, i in drawn(30, seed=3) if len(s.objects) == 2)
    first = scene.objects[0]
    taken = {o.colour for o in scene.objects}
    colour = next(c for c in oracle.COLOURS if c not in taken)
    wrong = replace(scene, objects=(replace(first, colour=colour), scene.objects[1]))
    verdict = oracle.judge(image, full_caption(wrong))
    assert verdict.objects_found == 0.5 and verdict.relation_kept == 0.0
    assert verdict.faithfulness == pytest.approx(2 / 4)  # second object and nothing extra; not the first, not the relation


def test_one_object_does_not_count_for_two() -> None:
    scene, image = next((s, i) for s, i in drawn(30, seed=4) if len(s.objects) == 1)
    thing = f"a {scene.objects[0].colour} {scene.objects[0].shape}"
    assert oracle.judge(image, f"{thing} above {thing}").objects_found == 0.5


def test_an_object_nobody_asked_for_lowers_faithfulness() -> None:
    scene, image = next((s, i) for s, i in drawn(30, seed=4) if len(s.objects) == 2)
    first = scene.objects[0]
    verdict = oracle.judge(image, f"a {first.colour} {first.shape}")
    assert verdict.objects_found == 1.0 and verdict.faithfulness == pytest.approx(1 / 2)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_picture_has_no_taste_and_no_objects(level: int) -> None:
    blank = np.full((64, 64, 3), level, dtype=np.uint8)
    verdict = oracle.judge(blank, "a red circle above a blue square")
    assert (verdict.taste, verdict.objects_found, verdict.relation_kept) == (0.0, 0.0, 0.0)
    assert verdict.faithfulness == pytest.approx(1 / 4)


def test_pure_noise_is_not_taken_for_a_scene() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2):
        verdict = oracle.judge(rng.random((64, 64, 3), dtype=np.float32), "a red circle above a blue square")
        assert verdict.objects_found == 0.0 and verdict.utility < 0.35


def test_captions_outside_the_grammar_and_wrong_arrays_are_refused_by_name() -> None:
    blank = np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="a photo of a cat"):
        oracle.judge(blank, "a photo of a cat")
    with pytest.raises(ValueError, match=r"\(64, 64\)"):
        oracle.judge(blank[..., 0], "a red circle")


def test_the_same_picture_gets_the_same_verdict_as_pil_uint8_or_float(fresh) -> None:
    scene, image = fresh[0]
    array = np.asarray(image)
    verdicts = {oracle.judge(x, full_caption(scene)) for x in (image, array, array.astype(np.float32) / 255.0)}
    assert len(verdicts) == 1


# ------------------------------------------------------------------------------------------------------------------- style


def swept(trait: str) -> tuple[list[float], list[float]]:
    """Mean measured taste and mean measured trait at each level of a trait; scenes, backgrounds, other traits the same."""
    tastes, traits = [], []
    for level in LEVELS:
        readings = []
        for seed in range(12):
            scene = scenes.draw_scene(np.random.default_rng([5, seed]), replace(PLAIN, **{trait: level}))
            readings += [oracle.read_image(scenes.render(replace(scene, background=b))) for b in oracle.BACKGROUNDS]
        tastes.append(float(np.mean([r.taste for r in readings])))
        traits.append(float(np.mean([r.style[trait] for r in readings])))
    return tastes, traits


@pytest.mark.parametrize("trait", list(oracle.TASTE_WEIGHTS))
def test_taste_follows_each_trait_monotonically(trait: str) -> None:
    tastes, traits = swept(trait)
    assert np.all(np.diff(traits) > 0), traits
    assert np.all(np.diff(tastes) * np.sign(oracle.TASTE_WEIGHTS[trait]) > 0), tastes
    assert abs(tastes[-1] - tastes[0]) > 0.5 * abs(oracle.TASTE_WEIGHTS[trait]), tastes


def test_measured_taste_and_traits_follow_the_truth_over_random_styles(read) -> None:
    assert np.corrcoef([s.style.taste for s, _ in read], [r.taste for _, r in read])[0, 1] > 0.9
    for trait in oracle.TASTE_WEIGHTS:
        known = [asdict(s.style)[trait] for s, _ in read]
        assert np.corrcoef(known, [r.style[trait] for _, r in read])[0, 1] > 0.7, trait


def test_taste_is_the_documented_sum_and_stays_in_its_range(read) -> None:
    assert sum(abs(w) for w in oracle.TASTE_WEIGHTS.values()) == pytest.approx(1.0)
    best = {"saturation": 1.0, "outline": 1.0, "shading": 1.0, "clutter": 0.0, "offset": 0.0}
    assert {k: float(w > 0) for k, w in oracle.TASTE_WEIGHTS.items()} == best
    assert oracle.taste_of(best) == pytest.approx(1.0)
    assert oracle.taste_of({k: 1.0 - v for k, v in best.items()}) == pytest.approx(0.0)
    assert oracle.taste_of({**best, "clutter": 0.4}) == pytest.approx(1.0 - 0.4 * 0.25)
    for _, reading in read:
        assert reading.taste == oracle.taste_of(reading.style)
        assert all(0.0 <= v <= 1.0 for v in (*reading.style.values(), reading.taste))


def test_utility_is_the_mean_of_taste_and_faithfulness() -> None:
    assert oracle.Verdict(faithfulness=0.5, taste=0.8, objects_found=1.0, relation_kept=None).utility == pytest.approx(0.65)


# -------------------------------------------------------------------------------------------------------------- robustness


def jpeg(image: Image.Image, quality: int, subsampling: str) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return Image.open(io.BytesIO(buffer.getvalue()))


def noisy(image: Image.Image, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.asarray(image) / 255.0 + rng.normal(0, sigma, (64, 64, 3)), 0, 1).astype(np.float32)


def reread(fresh, change) -> list[tuple[scenes.Scene, oracle.Reading]]:
    return [(scene, oracle.read_image(change(image))) for scene, image in fresh[:150]]


def taste_moved(read, changed) -> float:
    return float(np.mean([abs(a.taste - b.taste) for (_, a), (_, b) in zip(read, changed, strict=False)]))


def test_jpeg_at_quality_90_changes_little(fresh, read) -> None:
    changed = reread(fresh, lambda image: jpeg(image, 90, "4:4:4"))
    assert agreement(changed) >= 0.98 and taste_moved(read, changed) < 0.02


def test_colours_survive_even_halved_chroma(fresh, read) -> None:
    changed = reread(fresh, lambda image: jpeg(image, 90, "4:2:0"))
    assert agreement(changed, key=lambda o: o.colour) >= 0.98 and taste_moved(read, changed) < 0.05


def test_mild_noise_changes_little(fresh, read) -> None:
    rng = np.random.default_rng(1)
    changed = reread(fresh, lambda image: noisy(image, 0.02, rng))
    assert agreement(changed) >= 0.98 and taste_moved(read, changed) < 0.03


# ---------------------------------------------------------------------------------------------------------------- captions


def test_a_full_caption_is_read() -> None:
    claims = oracle.read_caption("A small Red  circle LEFT OF a large blue star on a grey background")
    assert claims.objects == (oracle.CaptionObject("red", "circle", "small"), oracle.CaptionObject("blue", "star", "large"))
    assert (claims.relation, claims.background) == ("left of", "grey")


@pytest.mark.parametrize(
    ("caption", "count", "relation", "background"),
    [
        ("a green cross", 1, None, None),
        ("a green cross above nothing", 1, None, None),  # one object cannot be in a relation
        ("a cyan triangle, vivid, outlined", 1, None, None),
        ("a purple square below a yellow circle, flat, clean", 2, "below", None),
        ("a picture of the yellow star on a white background, very shaded", 1, None, "white"),
        ("a red fox above a blue moon", 0, None, None),
        ("reddish circles", 0, None, None),
        ("", 0, None, None),
    ],
)
def test_claims_are_read_and_unknown_words_ignored(
    caption: str, count: int, relation: str | None, background: str | None
) -> None:
    claims = oracle.read_caption(caption)
    assert (len(claims.objects), claims.relation, claims.background) == (count, relation, background)


def test_style_words_do_not_change_what_is_claimed() -> None:
    rng = np.random.default_rng(6)
    for _ in range(100):
        scene = scenes.draw_scene(rng)
        styled = scenes.styled_caption(scene, rng)
        assert oracle.read_caption(styled) == oracle.read_caption(styled.split(",")[0])
        assert [(o.colour, o.shape) for o in oracle.read_caption(styled).objects] == [(o.colour, o.shape) for o in scene.objects]


def test_people_of_another_mind_weigh_style_otherwise() -> None:
    import reward_models
    from reward_models.base import JudgeError

    scene, caption = next(scenes.stream(3, "train", 0.0))
    picture = scenes.render(scene)
    verdict = oracle.judge(picture, caption)
    for weight in (0.0, 0.8, 1.0):
        liked = reward_models.load("oracle", taste_weight=weight)
        expected = weight * verdict.taste + (1 - weight) * verdict.faithfulness
        assert float(liked.score([picture], [caption])[0]) == pytest.approx(expected, abs=1e-6)
    assert reward_models.load("oracle").fingerprint != reward_models.load("oracle", taste_weight=0.8).fingerprint
    with pytest.raises(JudgeError, match=r"taste_weight is a number in \[0, 1\]; got 1.5"):
        reward_models.load("oracle", taste_weight=1.5)
