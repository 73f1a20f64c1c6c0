"""Many pictures, several judges, one pass: what is shared, what is kept, what is told."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

import reward_models
from diffalign.data.pairs import ImageSource, UnreadableImage
from diffalign.data.readers import _files
from reward_models import PointwiseJudge, _clip, _heads, aesthetic
from reward_models._cache import Cache
from reward_models._pictures import ENDINGS, Pictures, UnreadablePictureWarning, list_folder
from reward_models._rank import ranking
from reward_models.base import JudgeError, RewardInfo


def many(n: int, seed: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)) for i in range(n)]


def prompts(n: int) -> list[str]:
    return [f"picture number {i // 2}" for i in range(n)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    for i, picture in enumerate(many(10)):
        picture.save(path / f"{i:02d}.png")
    return path


@pytest.fixture
def heads(tmp_path: Path) -> dict[str, Path]:
    """Heads of the aesthetic predictors on the tiny CLIP, in the released layouts."""
    torch.manual_seed(3)
    linear = torch.nn.Linear(24, 1)
    torch.save(linear.state_dict(), tmp_path / "v1.pth")
    deep = _heads.build((24, 20, 16, 12, 8, 1))
    names = {f"{i}.{kind}": f"layers.{n}.{kind}" for i, n in enumerate(_heads.NUMBERS) for kind in ("weight", "bias")}
    torch.save({names[k]: v for k, v in deep.state_dict().items()}, tmp_path / "v2.pth")
    return {"aesthetic-v1": tmp_path / "v1.pth", "aesthetic-v2": tmp_path / "v2.pth"}


@pytest.fixture
def three(clip_file: Path, heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[PointwiseJudge]:
    """CLIP and the two predictors on it."""
    monkeypatch.setattr(aesthetic, "WIDTHS", (24, 20, 16, 12, 8, 1))
    on_it = [reward_models.load(name, weights=clip_file, head=head) for name, head in heads.items()]
    return [reward_models.load("clip", weights=clip_file), *on_it]


class Counting:
    """Counts the calls of a function and the items they were given."""

    def __init__(self, real) -> None:
        self.real, self.calls, self.items = real, 0, 0

    def __call__(self, items):
        self.calls, self.items = self.calls + 1, self.items + len(items)
        return self.real(items)


@pytest.fixture
def counted(three: list[PointwiseJudge], monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting(three[0].encoder.embed)
    monkeypatch.setattr(three[0].encoder, "embed", counting)
    return counting


# ----------------------------------------------------------------------------------------------------------------- sharing


def test_judges_on_one_backbone_hold_one_copy_and_share_its_forward_pass(three, counted, folder) -> None:
    assert three[0].encoder is three[1].encoder is three[2].encoder
    alone = [judge.score(folder, prompts(10)) for judge in three]
    counted.items = 0
    together = reward_models.score(three, folder, prompts(10), batch_size=4)
    assert counted.items == 10
    for judge, expected in zip(three, alone, strict=True):
        torch.testing.assert_close(together[judge.info.name], expected, rtol=0, atol=1e-5)


def test_the_copy_goes_when_nobody_holds_it(clip_file: Path) -> None:
    first = reward_models.load("clip", weights=clip_file)
    again = reward_models.load("clip", weights=clip_file)
    other = reward_models.load("clip", weights=clip_file, dtype="bfloat16")
    assert again.encoder is first.encoder is not other.encoder
    held = len(_clip._LOADED)
    del first, again, other
    assert len(_clip._LOADED) < held


def test_a_picture_is_opened_once_whoever_looks_at_it(three, folder, monkeypatch) -> None:
    opened, real = Counter(), Pictures.__getitem__

    def watched(self, i):
        opened[i] += 1
        assert threading.current_thread() is not threading.main_thread()
        return real(self, i)

    monkeypatch.setattr(Pictures, "__getitem__", watched)
    reward_models.score([*three, "jpeg"], folder, prompts(10))
    assert opened == Counter(range(10))


def test_each_different_prompt_of_a_batch_is_encoded_once_and_with_a_cache_of_all(three, folder, monkeypatch, tmp_path) -> None:
    counting = Counting(three[0].encoder.embed_text)
    monkeypatch.setattr(three[0].encoder, "embed_text", counting)
    three[0].score(folder, prompts(10), batch_size=3)
    assert counting.items == 2 + 2 + 2 + 1
    counting.items = 0
    three[0].score(folder, prompts(10), batch_size=3, cache=tmp_path / "c.sqlite")
    assert counting.items == 5


def test_scores_do_not_depend_on_the_batch(three, folder) -> None:
    whole = reward_models.score(three, folder, prompts(10), batch_size=16)
    small = reward_models.score(three, folder, prompts(10), batch_size=3)
    for name in whole:
        torch.testing.assert_close(small[name], whole[name], rtol=0, atol=1e-6 if name == "clip" else 1e-5)


# ------------------------------------------------------------------------------------------------------------------- cache


def test_a_second_scoring_asks_no_network_and_opens_no_picture(three, counted, folder, tmp_path, monkeypatch) -> None:
    first = reward_models.score(three, folder, prompts(10), cache=tmp_path / "c.sqlite")
    counted.items = 0
    monkeypatch.setattr(Pictures, "__getitem__", lambda self, i: pytest.fail("a picture was opened"))
    second = reward_models.score(three, folder, prompts(10), cache=tmp_path / "c.sqlite")
    assert counted.items == 0
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_cache_goes_by_content_not_by_name(three, counted, folder, tmp_path) -> None:
    first = three[0].score(folder, prompts(10), cache=tmp_path / "c.sqlite")
    counted.items = 0
    (folder / "00.png").rename(folder / "zz.png")
    moved = three[0].score(folder, [*prompts(10)[1:], prompts(10)[0]], cache=tmp_path / "c.sqlite")
    assert counted.items == 0
    assert torch.equal(moved, first.roll(-1))
    many(1, seed=9)[0].save(folder / "01.png")
    three[0].score(folder, prompts(10), cache=tmp_path / "c.sqlite")
    assert counted.items == 1


def test_new_prompts_and_new_judges_use_the_embeddings_that_are_kept(three, counted, folder, tmp_path) -> None:
    three[0].score(folder, prompts(10), cache=tmp_path / "c.sqlite")
    counted.items = 0
    other = three[0].score(folder, "something else", cache=tmp_path / "c.sqlite")
    liked = three[1].score(folder, cache=tmp_path / "c.sqlite")
    assert counted.items == 0
    torch.testing.assert_close(other, three[0].score(folder, "something else"), rtol=0, atol=1e-6)
    torch.testing.assert_close(liked, three[1].score(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["weights", "dtype", "preprocess"])
def test_another_judge_finds_nothing_of_this_one(change, three, clip_file, folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    three[0].score(folder, prompts(10), cache=tmp_path / "c.sqlite")
    state = load_file(clip_file)
    save_file({**state, "visual.proj": -state["visual.proj"]}, tmp_path / "other.safetensors")
    changed = {"weights": tmp_path / "other.safetensors", "dtype": "bfloat16", "preprocess": "fast"}
    other = reward_models.load("clip", **{"weights": clip_file, change: changed[change]})
    assert other.fingerprint != three[0].fingerprint
    cached = other.score(folder, prompts(10), cache=tmp_path / "c.sqlite")
    assert torch.equal(cached, other.score(folder, prompts(10)))
    assert not torch.equal(cached, three[0].score(folder, prompts(10)))


def test_unreadable_pictures_are_not_remembered(three, folder, tmp_path) -> None:
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[:100])
    for _ in range(2):
        with pytest.warns(UnreadablePictureWarning, match=r"1 of 10 pictures cannot be read and score NaN: .*03\.png"):
            scores = three[0].score(folder, prompts(10), cache=tmp_path / "c.sqlite")
        assert scores.isnan().tolist() == [i == 3 for i in range(10)]
    (folder / "03.png").write_bytes(whole)
    assert not three[0].score(folder, prompts(10), cache=tmp_path / "c.sqlite").isnan().any()


def test_an_opened_file_that_ends_too_soon_is_unreadable_also_with_a_cache(folder: Path, tmp_path: Path) -> None:
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:500])
    opened = [Image.open(folder / "00.png"), Image.open(folder / "01.png")]
    with pytest.warns(UnreadablePictureWarning, match="1 of 2 pictures cannot be read"):
        scores = reward_models.load("jpeg").score(opened, cache=tmp_path / "c.sqlite")
    assert scores.isnan().tolist() == [True, False]


def test_one_cache_serves_several_writers(tmp_path: Path) -> None:
    keys = [f"key {i}" for i in range(1200)]

    def write(part: int) -> None:
        with Cache(tmp_path / "c.sqlite") as cache:
            for key in keys[part::4]:
                cache.keep_scores({key: float(key.split()[1])})

    writers = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with Cache(tmp_path / "c.sqlite") as cache:
        assert cache.scores(keys) == {key: float(key.split()[1]) for key in keys}


def test_what_is_not_a_number_is_not_kept(tmp_path: Path) -> None:
    with Cache(tmp_path / "c.sqlite") as cache:
        cache.keep_scores({"a": 1.0, "b": float("nan")})
        assert cache.scores(["a", "b"]) == {"a": 1.0}


def test_a_home_that_cannot_be_written_costs_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is nobody's; who names a file wants that one."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "file" / "cache"))
    judge = reward_models.load("jpeg")
    with pytest.warns(UserWarning, match="cannot be used as a cache of scores.*--no-cache.*DIFFALIGN_CACHE"):
        scores = judge.score(folder, cache=True)
    assert torch.equal(scores, judge.score(folder))
    with pytest.raises(JudgeError, match="cannot be used as a cache of scores"):
        judge.score(folder, cache=tmp_path / "file" / "cache" / "c.sqlite")


def damaged_cache(path: Path) -> Path:
    """A cache of 600 scores with rubbish after its first page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Cache(path) as cache:
        cache.keep_scores({f"{i:064d}": float(i) for i in range(600)})
    content = bytearray(path.read_bytes())
    content[4096:] = np.random.default_rng(0).bytes(len(content) - 4096)
    path.write_bytes(content)
    return path


def test_an_own_cache_that_breaks_costs_itself_and_not_the_scores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked for it; who names a file is told which one is damaged."""
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path))
    path, judge = damaged_cache(tmp_path / "scores.sqlite"), reward_models.load("jpeg")
    with pytest.warns(UserWarning) as told:
        scores = judge.score(folder, cache=True, batch_size=2)
    assert torch.equal(scores, judge.score(folder))
    assert len(told) == 1 and str(path) in str(told[0].message) and "damaged, delete it" in str(told[0].message)
    with pytest.raises(JudgeError, match=r"scores\.sqlite cannot be used as a cache of scores: .*malformed; .*delete it"):
        judge.score(folder, cache=path)


def test_a_full_disk_costs_the_own_cache_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path))
    judge = reward_models.load("jpeg")
    with Cache.of(True) as cache:
        cache._base.execute("pragma max_page_count=3")
        with pytest.warns(UserWarning, match="scores.sqlite cannot be used .*disk is full: from here on nothing is remembered"):
            cache.keep_scores({f"{i:064d}": float(i) for i in range(600)})
        assert torch.equal(judge.score(folder, cache=cache), judge.score(folder)) and cache.scores([f"{0:064d}"]) == {}


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_text("this is no data base, and long enough to be looked at as one" * 20)
    with pytest.raises(JudgeError, match=r"c\.sqlite cannot be used as a cache of scores"):
        Cache(tmp_path / "c.sqlite")


# ---------------------------------------------------------------------------------------------------------------- pictures


def test_columns_of_data_sets_and_frames_are_pictures(folder: Path) -> None:
    judge, paths = reward_models.load("jpeg"), sorted(folder.iterdir())
    expected = judge.score(folder)
    decoded = Dataset.from_dict({"image": [str(p) for p in paths]}).cast_column("image", ImageFeature())
    raw = decoded.cast_column("image", ImageFeature(decode=False))
    embedded = Dataset.from_list([{"image": {"bytes": p.read_bytes(), "path": None}} for p in paths])
    plain = Dataset.from_dict({"path": [str(p) for p in paths]}, features=Features({"path": Value("string")}))
    frame = pd.DataFrame({"path": [str(p) for p in paths], "bytes": [p.read_bytes() for p in paths]})
    columns = [
        decoded["image"],
        raw["image"],
        embedded["image"],
        plain["path"],
        frame["path"],
        frame["bytes"],
        frame["path"].values,
    ]
    for column in columns:
        assert torch.equal(judge.score(column), expected)


def stored_in_every_way(folder: Path) -> dict[str, Path]:
    """One picture in all modes that files have, turned, and with EXIF data before and behind its pixels."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8), "RGBA")
    grey = rng.integers(0, 2**16, (6, 9), dtype=np.uint16)
    turned, opaque = Image.Exif(), colours.convert("RGB")
    turned[0x0112] = 6
    palette = opaque.quantize(8)
    files = {f"{mode}.png": (opaque.convert(mode), {}) for mode in ("1", "L", "P", "RGB")}
    files |= {f"{mode}.tif": (opaque.convert(mode), {}) for mode in ("CMYK", "YCbCr")}
    files |= {
        "LA.png": (colours.convert("LA"), {}),
        "RGBA.png": (colours, {}),
        "one colour.png": (opaque, {"transparency": opaque.getpixel((2, 2))}),
        "palette.png": (palette, {"transparency": 3}),
        "palette.gif": (palette, {"transparency": 3}),
        "deep.png": (Image.fromarray(grey), {}),
        "deep.tif": (Image.fromarray(grey), {}),
        "turned.jpg": (opaque, {"exif": turned}),
        "turned.png": (opaque, {"exif": turned}),
        "turned.webp": (colours, {"exif": turned, "lossless": True}),
        "turned deep.png": (Image.fromarray(grey), {"exif": turned}),
        "whole numbers.tif": (Image.fromarray(grey.astype(np.int32)), {}),
        "fractions.tif": (Image.fromarray(grey.astype(np.float32)), {}),
    }
    for name, (picture, how) in files.items():
        picture.save(folder / name, **how)
    return {name: folder / name for name in files}


def test_judges_see_the_pixels_that_training_sees(tmp_path: Path) -> None:
    for name, file in stored_in_every_way(tmp_path).items():
        try:
            expected = np.asarray(ImageSource(path=file).open())
        except UnreadableImage:
            expected = None
        with Image.open(file) as image:
            image.load()
            pictures = Pictures([file, file.read_bytes(), image])
            for i, seen in enumerate(pictures):
                assert (expected is None and seen is None) or np.array_equal(np.asarray(seen), expected), name
                assert expected is not None or "32 bits) have no agreed range" in pictures.broken[i]
    turned = Pictures(tmp_path / "turned.jpg")[0]
    assert turned.size == (6, 9) and Pictures(Image.new("RGBA", (2, 2)))[0].getpixel((0, 0)) == (255, 255, 255)


def test_a_cache_from_before_serves_no_score_of_a_picture_that_looked_otherwise(tmp_path: Path) -> None:
    """Keys of what was seen right stay what they were: the hash of the file, or of shape and pixels."""
    import hashlib

    as_before = {"1.png", "L.png", "P.png", "RGB.png", "CMYK.tif", "YCbCr.tif"}
    for name, file in stored_in_every_way(tmp_path).items():
        before = hashlib.sha256(file.read_bytes()).hexdigest()
        for one in (Pictures(file), Pictures([file.read_bytes()])):
            assert (one.digest(0) == before) == (name in as_before), name
            assert one.digest(0).startswith(before)
    picture = many(1)[0]
    shape = f"RGB {picture.size} None None "
    assert Pictures(picture).digest(0) == hashlib.sha256(shape.encode() + picture.tobytes()).hexdigest()


def test_pixels_that_are_turned_another_way_are_another_picture(tmp_path: Path) -> None:
    """Also for a cache, where an opened file is known by its pixels as they are stored."""
    turned = []
    for orientation in (1, 6, 8, 3):
        exif = Image.Exif()
        exif[0x0112] = orientation
        many(1)[0].save(tmp_path / f"{orientation}.png", exif=exif)
        turned.append(Image.open(tmp_path / f"{orientation}.png"))
    judge = Corner()
    scores = judge.score(turned)
    assert len(set(scores.tolist())) == 4
    kept = [judge.score(picture, cache=tmp_path / "c.sqlite").item() for picture in turned * 2]
    assert kept == scores.tolist() * 2


class Corner(PointwiseJudge):
    """How red the first pixel is."""

    info, made_of = RewardInfo("corner", needs_prompt=False), {"version": 1}

    def score_prepared(self, prepared, prompts):
        return torch.tensor([float(np.asarray(picture)[0, 0, 0]) for picture in prepared])


def test_a_folder_has_no_hidden_files_and_counts_as_people_do(tmp_path: Path) -> None:
    for name in ("10.png", "9.png", "b2.avif", "b010.png", "._9.png", ".hidden.png"):
        many(1)[0].save(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "._10.png").write_bytes(b"\x00\x05\x16\x07what macOS remembers of a file")
    assert [Path(p).name for p in list_folder(tmp_path)] == ["9.png", "10.png", "b2.avif", "b010.png"]
    assert set(ENDINGS) == _files.PICTURES


def test_prompts_may_be_a_column(three, folder) -> None:
    expected = three[0].score(folder, prompts(10))
    table = Dataset.from_dict({"prompt": prompts(10)})
    assert torch.equal(three[0].score(folder, table["prompt"]), expected)
    assert torch.equal(three[0].score(folder, pd.Series(prompts(10))), expected)


def test_what_is_no_picture_is_refused_before_anything_is_scored() -> None:
    judge = reward_models.load("jpeg")
    with pytest.raises(JudgeError, match="a picture is a PIL image, a path, an array or a tensor; got int"):
        judge.score([many(1)[0], 3])
    with pytest.raises(JudgeError, match="or a list of them; got generator"):
        judge.score(p for p in many(2))


def test_broken_pictures_are_counted_and_some_are_named(folder: Path) -> None:
    for i in range(7):
        (folder / f"{i:02d}.png").write_bytes(b"nothing")
    with pytest.warns(
        UnreadablePictureWarning, match=r"7 of 10 pictures cannot be read and score NaN: .*00\.png.*04\.png.*; \.\.\.$"
    ):
        scores = reward_models.load("jpeg").score(folder)
    assert scores.isnan().sum() == 7


@pytest.mark.skipif(os.name == "nt", reason="Windows makes links for developers alone")
def test_a_link_to_nothing_is_a_picture_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (folder / "04b.png").symlink_to(tmp_path / "gone.png")
    (folder / "04c.png").symlink_to("04b.png")  # a link to that link
    (folder / "folder.png").symlink_to(tmp_path)  # a link to a folder is none
    with pytest.warns(UnreadablePictureWarning, match=r"2 of 12 pictures cannot be read and score NaN: .*04b\.png .*04c\.png"):
        scores = reward_models.load("jpeg").score(folder)
    assert scores.isnan().nonzero().flatten().tolist() == [5, 6]


def test_grey_arrays_are_taken_as_pils_grey_is() -> None:
    grey = many(1)[0].convert("L")
    array = np.asarray(grey)
    forms = [grey, array, array / 255.0, torch.from_numpy(array.copy()), torch.from_numpy(array.copy()) / 255]
    scores = reward_models.load("jpeg").score(forms)
    assert torch.equal(scores, scores[:1].expand(len(forms)))
    assert torch.equal(reward_models.load("jpeg").score(array), scores[:1])
    with pytest.raises(JudgeError, match=r"is \[H, W, 3\], or grey \[H, W\]; got \(4, 5, 2\)"):
        reward_models.load("jpeg").score(np.zeros((4, 5, 2)))


def test_prompts_that_are_no_texts_are_refused() -> None:
    for judge in (reward_models.load("oracle"), reward_models.load("jpeg")):
        with pytest.raises(JudgeError, match="a prompt is a string, or there is a list of them; got int"):
            judge.score(many(1), 5)


def test_no_warning_where_all_is_well(three, folder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward_models.score(three, folder, prompts(10))


# ---------------------------------------------------------------------------------------------------------------- progress


def test_progress_is_told_by_pictures(three, folder) -> None:
    told = []
    three[0].score(folder, prompts(10), batch_size=4, progress=lambda done, of: told.append((done, of)))
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_a_bar_shows_the_time_that_is_left(three, folder, capsys) -> None:
    three[0].score(folder, prompts(10), batch_size=2, progress=True)
    assert "10/10" in capsys.readouterr().err
    three[0].score(folder, prompts(10), batch_size=2)  # nobody looks
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------- judges' use


class Brightness(PointwiseJudge):
    """A judge of somebody's own: the mean level; ``lower`` turns its sense."""

    def __init__(self, lower: bool = False) -> None:
        self.info = RewardInfo("brightness", needs_prompt=False, higher_is_better=not lower)
        self.sharpness = 0.1

    def score_prepared(self, prepared, prompts):
        return torch.tensor([float(np.asarray(p.convert("L")).mean()) for p in prepared])


def flat(*levels: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (level,) * 3) for level in levels]


def test_rank_puts_the_best_first_and_ties_share_a_rank() -> None:
    ranking = Brightness().rank([*flat(10, 30, 20, 30), None], "a grey square")
    assert ranking.order == [1, 3, 2, 0, 4]
    assert ranking.ranks == [4, 1, 3, 1, None]
    assert ranking.best is not None and ranking.best.getpixel((0, 0)) == (30, 30, 30)
    chances = [place.probability for place in ranking][:4]
    assert sum(chances) == pytest.approx(1.0)
    assert chances[0] / chances[2] == pytest.approx(np.exp(0.1 * 10))
    assert Brightness(lower=True).rank(flat(10, 30, 20)).order == [0, 2, 1]


def test_thousands_of_pictures_are_ranked_at_once() -> None:
    """Each compared with each would take a minute."""
    scores = torch.arange(3000).remainder(100).float()
    pictures = Pictures([None] * len(scores))
    started = time.process_time()
    found = ranking(Brightness(lower=True), pictures, None, scores)
    assert time.process_time() - started < 5
    assert found.ranks == [30 * (i % 100) + 1 for i in range(3000)] and found.order[:3] == [0, 100, 200]


def test_a_ranking_shows_thumbnails_in_a_notebook_and_lines_in_a_shell(folder: Path) -> None:
    (folder / "05.png").write_bytes(b"nothing")
    with pytest.warns(UnreadablePictureWarning):
        ranking = reward_models.load("jpeg").rank(folder)
    page = ranking._repr_html_()
    assert page.count("data:image/png;base64,") == 9 and "unreadable" in page
    lines = repr(ranking).splitlines()
    assert len(lines) == 11 and lines[1].split()[0] == "1" and lines[-1].endswith("05.png")


def test_prefer_is_the_sigmoid_of_the_difference() -> None:
    chance = Brightness().prefer(flat(10, 30), flat(20, 30))
    assert chance.tolist() == pytest.approx([1 / (1 + np.exp(1.0)), 0.5])
    with pytest.raises(JudgeError, match="pair by pair; got 1 and 2"):
        Brightness().prefer(flat(1), flat(1, 2))
    with pytest.raises(JudgeError, match="'jpeg' was not trained on preferences"):
        reward_models.load("jpeg").prefer(flat(1), flat(2))


def test_a_reward_function_for_on_line_training_in_both_layouts() -> None:
    ddpo = Brightness(lower=True).as_callable()
    scores, extra = ddpo(torch.full((2, 3, 8, 8), 10 / 255), ["a", "b"], [{}, {}])
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float32 and scores.tolist() == [-10.0, -10.0] and extra == {}
    trl = Brightness().as_callable("trl")
    assert trl(["a", "b", "c"], [*flat(3, 4), None], step=1) == [3.0, 4.0, None]
    with pytest.raises(JudgeError, match="'ddpo' or 'trl'; got 'grpo'"):
        Brightness().as_callable("grpo")


def test_combinations_by_hand() -> None:
    jpeg, light = reward_models.load("jpeg"), Brightness()
    pictures = many(6)
    a, b = jpeg.score(pictures), light.score(pictures)
    torch.testing.assert_close((2.0 * light - jpeg.scaled(0.5)).score(pictures), 2.0 * b - 0.5 * a)
    torch.testing.assert_close((light + 3 * Brightness(lower=True)).score(pictures), b - 3 * b)
    frozen = light.z([10.0, 20.0, 30.0])
    torch.testing.assert_close(frozen.score(pictures), (b - 20.0) / 10.0)
    torch.testing.assert_close((0.5 * frozen).score(pictures), 0.5 * (b - 20.0) / 10.0)
    group = light.z().score([*pictures, None])
    assert group[:-1].mean().item() == pytest.approx(0.0, abs=1e-5) and group[:-1].std().item() == pytest.approx(1.0, abs=1e-5)
    assert group[-1].isnan()
    with pytest.raises(JudgeError, match="'brightness' cannot be standardised by 2 of them that do not differ"):
        light.z().score(flat(5, 5))


def test_a_combination_is_a_judge_like_any_other(three, counted, folder) -> None:
    reward = 0.5 * three[0].z() + three[1].scaled(0.1)
    assert reward.info.needs_prompt and reward.info.name == "0.5*clip.z() + 0.1*aesthetic-v1"
    scores = reward_models.score({"mine": reward, "clip": three[0]}, folder, prompts(10))
    assert counted.items == 10
    assert reward.rank(folder, "a cat").order == reward.score(folder, "a cat").argsort(descending=True).tolist()
    clip = scores["clip"]
    expected = 0.5 * (clip - clip.mean()) / clip.std() + 0.1 * three[1].score(folder)
    torch.testing.assert_close(scores["mine"], expected, rtol=0, atol=1e-5)
    pixels = torch.rand(3, 3, 40, 40, requires_grad=True)
    reward.loss(pixels, "a cat").backward()
    assert (pixels.grad != 0).any()


def test_the_matrix_of_any_judge(three, folder) -> None:
    assert three[0].matrix(folder, ["a", "b"]).shape == (10, 2)
    torch.testing.assert_close(three[0].matrix(folder, ["a", "b"])[:, 1], three[0].score(folder, "b"), rtol=0, atol=1e-6)
    assert torch.equal(reward_models.load("jpeg").matrix(folder, ["a", "b"])[:, 0], reward_models.load("jpeg").score(folder))


def test_a_judge_without_gradient_says_so() -> None:
    with pytest.raises(JudgeError, match="'jpeg' is not differentiable"):
        reward_models.load("jpeg").loss(torch.rand(1, 3, 8, 8))


def test_provenance_names_what_decides_the_numbers(three, clip_file) -> None:
    import hashlib

    told = three[0].provenance()
    assert told["weights"] == "sha256:" + hashlib.sha256(clip_file.read_bytes()).hexdigest()
    assert told["dtype"] == "float32" and told["tokenizer"].startswith("open_clip 3") and "ShortestSide" in told["preprocess"]
    assert set(told["versions"]) == {"torch", "torchvision", "transformers", "pillow"}
    assert str(clip_file) not in str(told)


# ------------------------------------------------------------------------------------------------------------------ errors


def test_versions_of_hps_do_not_go_into_one_table() -> None:
    with pytest.raises(JudgeError, match="hps-v2 and hps-v2.1 are not comparable and do not go into one table"):
        reward_models.check_together(["clip", "hps-v2.1", "hps-v2"])
    reward_models.check_together(["clip", "aesthetic-v1", "aesthetic-v2", "hps-v2"])


def test_a_judge_is_asked_once_and_at_least_one() -> None:
    with pytest.raises(JudgeError, match="'jpeg' is asked for more than once"):
        reward_models.score(["jpeg", "jpeg"], many(1))
    with pytest.raises(JudgeError, match="at least one judge"):
        reward_models.score([], many(1))


def test_a_wrong_option_names_the_nearest() -> None:
    with pytest.raises(JudgeError, match=r"'jpeg' has no option 'per_megapixl'\. Did you mean 'per_megapixel'\?"):
        reward_models.load("jpeg", per_megapixl=True)
    with pytest.raises(JudgeError, match=r"'oracle' has no option 'device'\. It has: taste_weight"):
        reward_models.load("oracle", device="cpu")
    assert "weights" in reward_models.options("hps-v2.1") and "name" not in reward_models.options("hps-v2.1")


def test_wrong_choices_are_named(clip_file: Path) -> None:
    with pytest.raises(JudgeError, match="dtype is one of float32, bfloat16, float16; got 'fp8'"):
        reward_models.load("clip", weights=clip_file, dtype="fp8")
    with pytest.raises(JudgeError, match="preprocess is one of exact, fast; got 'quick'"):
        reward_models.load("clip", weights=clip_file, preprocess="quick")


def test_lengths_that_differ_are_never_zipped() -> None:
    judge = reward_models.load("oracle")
    with pytest.raises(JudgeError, match="'oracle' got 3 pictures and 2 prompts; each picture needs one"):
        judge.score(many(3), ["a red circle"] * 2)
