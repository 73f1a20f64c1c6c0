"""The tiny world's grammar: what is drawn is what the caption says, the same for the same seed, and split for ever."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest

from pipelines.tiny import scenes
from reward_models import oracle


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    rng = np.random.default_rng(11)
    return [scenes.draw_scene(rng) for _ in range(2000)]


def every_caption() -> list[str]:
    """All plain captions of one object, and of two objects of one kind of relation."""
    sizes, grounds = ("", "small ", "large "), ("", *(f" on a {b} background" for b in oracle.BACKGROUNDS))
    kinds = [f"{c} {s}" for c in oracle.COLOURS for s in oracle.SHAPES]
    single = [f"a {z}{k}{g}" for z, k, g in itertools.product(sizes, kinds, grounds)]
    double = [f"a {a} above a {b}{g}" for a, b, g in itertools.product(kinds, kinds, grounds) if a != b]
    return single + double


# ------------------------------------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_scenes_captions_and_pixels() -> None:
    a, b = (list(itertools.islice(scenes.stream(5), 20)) for _ in range(2))
    assert a == b
    assert all(scenes.render(x).tobytes() == scenes.render(y).tobytes() for (x, _), (y, _) in zip(a, b, strict=True))
    assert a != list(itertools.islice(scenes.stream(6), 20))


def test_a_given_style_changes_how_a_scene_is_drawn_and_nothing_that_is_in_it() -> None:
    calm, wild = (scenes.Style(*[level] * 5) for level in (0.0, 1.0))
    first, second = (scenes.draw_scene(np.random.default_rng(1), style) for style in (calm, wild))
    bare = [[replace(o, centre=(0, 0)) for o in s.objects] for s in (first, second)]
    assert bare[0] == bare[1] and (first.relation, first.background) == (second.relation, second.background)
    assert scenes.render(first).tobytes() != scenes.render(second).tobytes()


def test_captions_are_reproducible_different_plain_and_of_their_split() -> None:
    for split in scenes.SPLITS:
        found = scenes.captions(60, seed=3, split=split)
        assert found == scenes.captions(60, seed=3, split=split)
        assert len(set(found)) == 60 and not any("," in c for c in found)
        assert {scenes.split_of(c) for c in found} == {split}


# ------------------------------------------------------------------------------------------------------------------ splits


def test_splits_are_disjoint_and_cover_every_bucket() -> None:
    buckets = [b for part in scenes.SPLITS.values() for b in part]
    assert sorted(buckets) == list(range(20))


def test_every_caption_has_one_split_in_the_stated_shares() -> None:
    found = [scenes.split_of(c) for c in every_caption()]
    assert len(found) == 3840
    shares = {name: found.count(name) / len(found) for name in scenes.SPLITS}
    assert sum(shares.values()) == pytest.approx(1.0)
    for name, part in scenes.SPLITS.items():
        assert shares[name] == pytest.approx(len(part) / 20, abs=0.02)


def test_style_words_case_and_spaces_do_not_move_a_caption_to_another_split() -> None:
    for caption in scenes.captions(40, seed=9, split="test"):
        assert scenes.split_of(f"{caption}, vivid, clean") == "test"
        assert scenes.split_of("  " + caption.upper().replace(" ", "  ")) == "test"


def test_the_training_stream_never_shows_a_held_out_caption() -> None:
    plain = {c.split(",")[0] for _, c in itertools.islice(scenes.stream(0, "train"), 1500)}
    held_out = {*scenes.captions(300, 0, "test"), *scenes.captions(100, 0, "validation")}
    assert len(plain) > 1000 and not plain & held_out


# ---------------------------------------------------------------------------------------------------------------- geometry


def test_nothing_is_cut_off(many) -> None:
    """Every object lies wholly inside the picture; its outline, too, but for a pixel in one of a hundred."""
    beyond = []
    for item, outline in [(o, s.style.outline) for s in many for o in s.objects]:
        points = oracle.SHAPES[item.shape] * item.radius + np.array(item.centre)
        assert points.min() >= 0 and points.max() <= scenes.SIZE, item
        border = outline * oracle.OUTLINE_PIXELS
        beyond.append(max(border - points.min(), points.max() + border - scenes.SIZE))
    assert np.mean(np.array(beyond) > 0) < 0.01 and max(beyond) < 1.5


def test_objects_do_not_overlap(many) -> None:
    """Neither the objects nor the outline of one and the inside of the other share a pixel."""
    two = [s for s in many if len(s.objects) == 2][:300]
    for scene in two:
        ink = scene.style.outline * oracle.OUTLINE_PIXELS
        bare, inked = ([scenes._coverage(o, grow)[..., 0] for o in scene.objects] for grow in (0.0, ink))
        assert not ((bare[0] > 0) & (bare[1] > 0)).any(), scene
        assert not ((bare[0] > 0.5) & (inked[1] > 0.5)).any() and not ((inked[0] > 0.5) & (bare[1] > 0.5)).any(), scene


def test_the_relation_that_is_stated_is_the_one_that_is_drawn(many) -> None:
    stated = [s for s in many if s.relation]
    assert len(stated) > 1200 and {s.relation for s in stated} == set(oracle.RELATIONS)
    for scene in stated:
        (ax, ay), (bx, by) = (o.centre for o in scene.objects)
        truth = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        assert truth[scene.relation]
        sideways = abs(bx - ax) > abs(by - ay)
        assert sideways == (scene.relation in ("left of", "right of"))


def test_the_group_moves_away_from_the_middle_with_the_offset() -> None:
    def distance(offset: float) -> float:
        style = scenes.Style(0.5, 0.5, 0.5, 0.5, offset)
        drawn = [scenes.draw_scene(np.random.default_rng(i), style) for i in range(60)]
        return float(np.mean([np.hypot(*(np.mean([o.centre for o in s.objects], axis=0) - 32)) for s in drawn]))

    near, middle, far = (distance(v) for v in (0.0, 0.5, 1.0))
    assert near < 3.0 and near + 1.0 < middle and middle + 1.0 < far


def test_the_grammar_uses_everything_about_equally(many) -> None:
    assert np.mean([len(s.objects) == 2 for s in many]) == pytest.approx(2 / 3, abs=0.04)
    for key, words in (("colour", oracle.COLOURS), ("shape", oracle.SHAPES), ("size", oracle.SIZES)):
        used = [getattr(o, key) for s in many for o in s.objects]
        assert all(used.count(w) / len(used) == pytest.approx(1 / len(words), abs=0.03) for w in words)
    assert all(len({(o.colour, o.shape) for o in s.objects}) == len(s.objects) for s in many)


# ---------------------------------------------------------------------------------------------------------------- captions


def test_a_plain_caption_says_what_is_in_the_scene_and_nothing_of_its_style(many) -> None:
    rng, words = np.random.default_rng(0), {w for pair in scenes.STYLE_WORDS.values() for w in pair}
    for scene in many[:300]:
        caption = scenes.plain_caption(scene, rng)
        claims = oracle.read_caption(caption)
        assert [(o.colour, o.shape) for o in claims.objects] == [(o.colour, o.shape) for o in scene.objects]
        assert claims.relation == scene.relation
        assert claims.background in (None, scene.background)
        assert all(c.size in (None, o.size) for c, o in zip(claims.objects, scene.objects, strict=True))
        assert not words & set(caption.replace(",", " ").split())


def test_style_words_are_true(many) -> None:
    trait_of = {word: (name, high) for name, pair in scenes.STYLE_WORDS.items() for high, word in enumerate(pair)}
    rng, said = np.random.default_rng(0), 0
    for scene in many[:500]:
        words = scenes.style_words(scene.style, rng)
        assert len(words) <= 3 and len({trait_of[w][0] for w in words}) == len(words)
        for word in words:
            name, high = trait_of[word]
            value = asdict(scene.style)[name]
            assert value > 2 / 3 if high else value < 1 / 3, (word, value)
            said += 1
    assert said > 500


def test_the_share_of_styled_captions_is_the_one_asked_for() -> None:
    for styled, low, high in ((0.0, 0.0, 0.0), (0.35, 0.27, 0.43), (1.0, 0.97, 1.0)):
        found = [c for _, c in itertools.islice(scenes.stream(1, styled=styled), 400)]
        assert low <= np.mean(["," in c for c in found]) <= high


# ----------------------------------------------------------------------------------------------------------------- drawing


def test_pictures_are_64_pixels_rgb_and_show_the_background_and_the_colour() -> None:
    style = scenes.Style(saturation=1.0, outline=0.0, shading=0.0, clutter=0.0, offset=0.0)
    for background, level in oracle.BACKGROUNDS.items():
        for colour, rgb in oracle.COLOURS.items():
            item = scenes.SceneObject(colour, "square", "large", 12.0, (32.0, 32.0))
            picture = np.asarray(scenes.render(scenes.Scene((item,), None, background, style, 0)))
            assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
            assert np.abs(picture[2, 2] / 255 - level).max() < 0.01
            assert np.abs(picture[32, 32] / 255 - np.array(rgb)).max() < 0.01


def test_taste_of_a_style_is_the_oracles_formula() -> None:
    assert scenes.Style(1.0, 1.0, 1.0, 0.0, 0.0).taste == pytest.approx(1.0)
    assert scenes.Style(0.0, 0.0, 0.0, 1.0, 1.0).taste == pytest.approx(0.0)
    assert scenes.Style(0.5, 0.5, 0.5, 0.5, 0.5).taste == pytest.approx(0.5)
