"""Data sets of single pictures: never taken for pairs, read from every form of storage, encoded once, worded as what they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_data_cache import CENTRAL, SIDE, SmallEncoder, png
from test_data_readers import run_check

from diffalign.data import layouts
from diffalign.data.cache import PairCache, build_cache
from diffalign.data.cache_values import FillOptions
from diffalign.data.loader import LoaderSettings, PairLoader
from diffalign.data.open import _modules, open_pairs
from diffalign.data.pairs import RowProblem
from diffalign.data.table import PairTable
from diffalign.data.transform import Transform
from diffalign.data.validate import check, contact_sheet
from diffalign.errors import UserError

N = 5


def parquet(path: Path, n: int = N, **more: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"caption": [f"prompt {i}" for i in range(n)], "image": [png(i) for i in range(n)]}
    pq.write_table(pa.table(columns | more), path)
    return path


def folder(root: Path, names: list[str], captions: bool = True) -> Path:
    """Picture i in the file i; its caption beside it."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))
        if captions:
            (root / name).with_suffix(".txt").write_text(f" prompt {i}\n")
    return root


# ------------------------------------------------------------------------------------------------------------------- storage


def as_parquet(root: Path) -> Path:
    return parquet(root / "p.parquet")


def as_saved_with_image_features(root: Path) -> Path:
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    cells = [{"text": f"prompt {i}", "image": {"bytes": png(i), "path": None}} for i in range(N)]
    datasets.Dataset.from_list(cells, features=features).save_to_disk(root / "saved")
    return root / "saved"


def as_csv(root: Path) -> Path:
    folder(root, [f"img/{i}.png" for i in range(N)], captions=False)
    with (root / "list.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["path", "prompt"], *([f"img/{i}.png", f"prompt {i}"] for i in range(N))])
    return root / "list.csv"


def as_captions_beside(root: Path) -> Path:
    (root / "notes.md").write_text("x")
    return folder(root, [f"{i}{suffix}" for i, suffix in enumerate((".png", ".PNG", ".jpg", ".webp", ".jpeg"))])


def as_metadata_jsonl(root: Path) -> Path:
    folder(root, [f"{i}.png" for i in range(N)], captions=False)
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"prompt {i}"}) for i in range(N)]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def as_metadata_csv_in_splits(root: Path) -> Path:
    for split, n in (("train", N), ("test", 2)):
        folder(root / split, [f"{i}.png" for i in range(n)], captions=False)
        lines = ["file_name,text", *(f"{i}.png,prompt {i}" for i in range(n))]
        (root / split / "metadata.csv").write_text("\n".join(lines))
    return root


FORMS = [as_parquet, as_saved_with_image_features, as_csv, as_captions_beside, as_metadata_jsonl, as_metadata_csv_in_splits]


@pytest.mark.parametrize("write", FORMS, ids=lambda f: f.__name__)
def test_every_form_gives_the_same_pictures_in_any_order(write, tmp_path: Path) -> None:
    place = write(tmp_path)
    table = open_pairs(place)
    assert (table.kind, len(table)) == ("pictures", N)
    for i in (3, 0, 4, 1, 2):
        found = table[i]
        assert (found.prompt, found.label, found.weight, found.scores) == (f"prompt {i}", 1.0, 1.0, None)
        assert found.winner.read_bytes() == png(i) and found.loser is found.winner
        assert found.single and found.sides == ("picture",) and not found.tie
    assert table.description.endswith(f": prompt, image, {N} pictures")
    assert len({table.origin(i) for i in range(N)}) == N


@pytest.mark.parametrize("write", [as_csv, as_captions_beside, as_metadata_jsonl], ids=lambda f: f.__name__)
def test_the_fingerprint_changes_with_pictures_and_captions(write, tmp_path: Path) -> None:
    place = write(tmp_path)
    before = open_pairs(place).fingerprint
    assert open_pairs(place).fingerprint == before
    picture = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() == ".png")[0]
    picture.write_bytes(png(77))
    after = open_pairs(place).fingerprint
    caption = next(p for p in tmp_path.rglob("*") if p.suffix in (".txt", ".jsonl", ".csv"))
    caption.write_text(caption.read_text().replace("prompt ", "another "))
    assert len({before, after, open_pairs(place).fingerprint}) == 3


def test_a_picture_without_a_caption_is_a_problem_of_its_row(tmp_path: Path) -> None:
    place = folder(tmp_path / "pics", ["a.png", "b.png", "c.png"])
    (place / "b.txt").unlink()
    (place / "c.txt").write_bytes(b"\xff\xfe\xfa")
    table = open_pairs(place)
    assert len(table) == 3 and table[0].prompt == "prompt 0"
    with pytest.raises(RowProblem, match=r"^pics/b\.png: no caption b\.txt beside b\.png$"):
        table[1]
    with pytest.raises(RowProblem, match=r"^pics/c\.png: cannot read"):
        table[2]


def test_splits_of_folders_are_chosen_by_name(tmp_path: Path) -> None:
    place = as_metadata_csv_in_splits(tmp_path)
    assert len(open_pairs(place, split="test")) == 2
    with pytest.raises(UserError, match="has no split 'validation'; it has: test, train"):
        open_pairs(place, split="validation")


def test_folders_of_pairs_and_of_nothing_stay_what_they_are(tmp_path: Path) -> None:
    """Captions at the top belong to the two folders below; a picture lying about beside them changes nothing."""
    pairs = folder(tmp_path / "pairs", ["w/0.png", "l/0.png"], captions=False)
    (pairs / "0.txt").write_text("x")
    (pairs / "0.png").write_bytes(png(9))
    assert open_pairs(pairs).kind == "pairs"
    by_folder = folder(tmp_path / "by folder", ["p0/win.png", "p0/lose.png"], captions=False)
    (by_folder / "p0/prompt.txt").write_text("x")
    assert open_pairs(by_folder).kind == "pairs"
    with pytest.raises(UserError, match="none of the known forms.*a folder of pictures with captions in NAME.txt"):
        open_pairs(folder(tmp_path / "silent", ["a.png"], captions=False))


# -------------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("prompt", "chosen", "rejected"), "pairs"),
        (("prompt", "chosen", "rejected", "image", "path"), "pairs"),
        (("caption", "jpg_0", "jpg_1", "label_0", "image"), "pairs"),
        (("text", "winner", "loser", "file_name", "score"), "pairs"),
        (("prompt", "image"), "pictures"),
        (("caption", "jpg", "label", "score", "weight"), "pictures"),
        (("text", "image", "w", "h"), "pictures"),
    ],
)
def test_a_table_with_both_sides_is_a_table_of_pairs(tmp_path: Path, columns: tuple[str, ...], kind: str) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps(dict.fromkeys(columns, "1")))
    assert open_pairs(tmp_path / "list.jsonl").kind == kind


def test_half_of_a_pair_beside_a_picture_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"prompt": "x", "image": "a.png", "chosen": "b.png", "bad": "c.png"}))
    with pytest.raises(UserError, match="has columns prompt, image, as a data set of single pictures has, and chosen, as one of"):
        open_pairs(tmp_path / "list.jsonl")
    single = open_pairs(tmp_path / "list.jsonl", columns={"image": "image"})
    assert (single.kind, single[0].winner.path.name) == ("pictures", "a.png")
    pairs = open_pairs(tmp_path / "list.jsonl", columns={"rejected": "bad"})
    assert (pairs.kind, pairs[0].loser.path.name) == ("pairs", "c.png")


def test_the_winners_of_pairs_can_be_read_by_themselves(tmp_path: Path) -> None:
    row = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    winners = open_pairs(tmp_path / "list.jsonl", columns={"image": "chosen"})
    assert (winners.kind, winners[0].winner.path.name) == ("pictures", "a.png")


def test_a_label_is_the_chance_that_the_picture_is_wanted(tmp_path: Path) -> None:
    labels = [1.0, 0.0, 0.5, 0.25, None]
    place = parquet(
        tmp_path / "p.parquet", label=labels, score=[1.0, 2.0, None, 4.0, float("nan")], weight=[1.0, 2.0, 1.0, 1.0, 0.0]
    )
    for ties in ("keep", "drop"):
        table = open_pairs(place, ties=ties)
        assert [p.label for p in table] == [1.0, 0.0, 0.5, 0.25, 1.0], "ties are of pairs"
        assert [p.winner.read_bytes() for p in table] == [png(i) for i in range(N)]
        assert [p.scores for p in table] == [(1.0, 1.0), (2.0, 2.0), None, (4.0, 4.0), None]
        assert [p.weight for p in table] == [1.0, 2.0, 1.0, 1.0, 0.0]
        assert table.left_out == {"ties": 0, "unlabelled": 0}
    assert open_pairs(place, ties="drop").fingerprint == open_pairs(place).fingerprint


def test_scores_of_a_judge_of_single_pictures(tmp_path: Path) -> None:
    scores = [float(i) for i in range(N)]
    place = parquet(tmp_path / "p.parquet", score=scores, clip_score=scores[::-1], jpeg_score=scores)
    assert [p.scores for p in open_pairs(place, scores="clip")][:2] == [(4.0, 4.0), (3.0, 3.0)]
    with pytest.raises(UserError, match=r"no scores by 'hps' \(it lacks hps_score\); there are those of clip, jpeg\."):
        open_pairs(place, scores="hps")


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"label": 3}, r"label is 3; it must be in \[0, 1\]"),
        ({"image": None}, r"\(picture\): there is no picture"),
        ({"score": "much"}, "score is 'much', not a number"),
        ({"prompt": 7}, "prompt is int, not text"),
    ],
)
def test_a_row_that_makes_no_sense_is_named(tmp_path: Path, cells: dict, reason: str) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"prompt": "x", "image": "a.png"} | cells))
    with pytest.raises(RowProblem, match=rf"list\.jsonl:line 1:? ?{reason}"):
        open_pairs(tmp_path / "list.jsonl")[0]


def test_every_layout_says_what_its_rows_are() -> None:
    found = {layout.__name__.rpartition(".")[2]: layout.KIND for layout in _modules(layouts)}
    assert found == {"chosen_rejected": "pairs", "pick_a_pic": "pairs", "one_picture": "pictures"}


def test_what_is_shown_does_not_depend_on_labels(tmp_path: Path) -> None:
    columns = {"jpg_0": [png(0), png(2)], "jpg_1": [png(1), None], "caption": ["a", " b"], "has_label": [False, True]}
    pq.write_table(pa.table(columns | {"label_0": [1.0, 7.0]}), tmp_path / "p.parquet")
    pairs = open_pairs(tmp_path / "p.parquet")
    assert len(pairs) == 1 and len(pairs.rows) == 2
    first = list(pairs.shown(0))
    assert [(s.prompt, s.column, s.origin) for s in first] == [("a", f"jpg_{k}", "p.parquet:row 0") for k in (0, 1)]
    whole, missing = pairs.shown(1)
    assert whole.prompt == "b" and whole.image.data == png(2)
    assert isinstance(missing, RowProblem) and str(missing) == "p.parquet:row 1 (jpg_1): there is no picture"
    (only,) = open_pairs(parquet(tmp_path / "single.parquet")).shown(2)
    assert (only.prompt, only.image.data, only.column) == ("prompt 2", png(2), "image")


# --------------------------------------------------------------------------------------------------------- cache and loader


def test_a_picture_is_encoded_once_and_stands_on_both_sides(tmp_path: Path) -> None:
    place = parquet(tmp_path / "p.parquet", label=[1.0, 0.0, 0.25, 1.0, 1.0], score=[3.0, 1.0, None, 0.0, 2.0])
    encoder = SmallEncoder()
    cache = build_cache(
        open_pairs(place), encoder, tmp_path / "c", Transform(SIDE, "random", flip=True), FillOptions(batch_size=3)
    )
    assert encoder.images == 2 * N and cache.stats()["unique_images"] == N
    assert cache.kind == PairCache.open(tmp_path / "c").kind == "pictures"
    assert cache.labels.tolist() == [1.0, 0.0, 0.25, 1.0, 1.0]
    assert cache.scores[:, 0].nan_to_num(-1).tolist() == cache.scores[:, 1].nan_to_num(-1).tolist() == [3.0, 1.0, -1.0, 0.0, 2.0]
    (batch,) = next(PairLoader(cache, range(N), LoaderSettings(batch_size=N, latent_mode=True, flip=True)).steps(0, 1))
    assert torch.equal(batch.winner, batch.loser) and batch.winner.std() > 0.01
    assert batch.label.tolist() == cache.labels[batch.index].tolist()


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, views = [], Transform.views
    monkeypatch.setattr(Transform, "views", lambda self, *args: seen.append(args) or views(self, *args))
    build_cache(open_pairs(parquet(tmp_path / "p.parquet")), SmallEncoder(), tmp_path / "c", CENTRAL, FillOptions(workers=0))
    assert len(seen) == N


def test_a_cache_of_pairs_is_of_pairs(tmp_path: Path) -> None:
    row = {"prompt": ["x"], "chosen": [png(0)], "rejected": [png(1)]}
    pq.write_table(pa.table(row), tmp_path / "p.parquet")
    assert build_cache(open_pairs(tmp_path / "p.parquet"), SmallEncoder(), tmp_path / "c", CENTRAL).kind == "pairs"


def test_pictures_that_cannot_be_read_are_skipped_or_refused_as_pictures(tmp_path: Path) -> None:
    place = parquet(tmp_path / "p.parquet", image=[png(0), png(1)[:150], png(2), png(3), png(4)])
    with pytest.raises(UserError, match=r"1 of 5 pictures cannot be used.*p\.parquet:row 1: picture: .*decoded"):
        build_cache(open_pairs(place), SmallEncoder(), tmp_path / "c", CENTRAL)
    cache = build_cache(open_pairs(place), SmallEncoder(), tmp_path / "d", CENTRAL, FillOptions(max_unreadable=0.5))
    assert cache.rows().tolist() == [0, 2, 3, 4]
    bad = parquet(tmp_path / "bad.parquet", image=[b"x"] * N)
    with pytest.raises(UserError, match="None of the 5 pictures can be used"):
        build_cache(open_pairs(bad), SmallEncoder(), tmp_path / "e", CENTRAL, FillOptions(max_unreadable=1.0))


# ----------------------------------------------------------------------------------------------------------------- the report


def flawed(tmp_path: Path) -> PairTable:
    """0 good, 1 repeats it, 2 says the contrary, 3 undecided about it, 4 truncated, 5 no caption, 6 a label that is none."""
    cells = [
        ("a", png(0), 1.0),
        ("a", png(0), 0.75),
        ("a", png(0), 0.0),
        ("a", png(0), 0.5),
        ("b", png(1)[:150], 1.0),
        ("", png(2), 0.0),
        ("c", png(3), 3.0),
    ]
    columns = dict(zip(("prompt", "image", "label"), map(list, zip(*cells, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "flawed.parquet")
    return open_pairs(tmp_path / "flawed.parquet")


def test_the_report_speaks_of_pictures(tmp_path: Path) -> None:
    report = check(flawed(tmp_path))
    place = "flawed.parquet:row {}".format
    assert (report.kind, report.pairs, report.usable, report.ties) == ("pictures", 7, 5, 0)
    assert report.duplicate_pairs == ((place(1), place(0)), (place(3), place(0)))
    assert report.contradictions == ((place(2), place(0)),)
    assert report.identical_sides == () and report.empty_captions == (place(5),)
    assert [(p.origin, p.side) for p in report.unreadable] == [(place(4), "picture")]
    assert report.labels == {"0": 2, "0.5": 1, "0.75": 1, "1": 2}
    assert report.sizes == {"24 x 20": 5} and (report.unique_images, report.repeated_images) == (2, 1)
    text = report.to_text()
    assert "pictures     7 (5 usable)" in text and "Duplicate pictures (2)" in text
    assert "Contradictions (wanted in one place, unwanted in the other) (1)" in text
    assert "pairs" not in text and "ties" not in text and "Winner" not in text
    assert json.loads(json.dumps(report.to_dict()))["kind"] == "pictures"


def test_the_contact_sheet_shows_what_is_wanted(tmp_path: Path) -> None:
    assert frames(contact_sheet(flawed(tmp_path), n=20)) == {"wanted", "unwanted", "undecided"}
    all_wanted = contact_sheet(open_pairs(parquet(tmp_path / "p.parquet", n=12)), n=12)
    assert frames(all_wanted) == {"wanted"}
    assert all_wanted.width > 2 * all_wanted.height, "six beside each other, in two rows"


def frames(sheet: Image.Image) -> set[str]:
    """By colours that more pixels have than noise and letters account for."""
    names = {(46, 139, 87): "wanted", (200, 200, 200): "unwanted", (217, 154, 43): "undecided"}
    return {names[colour] for n, colour in sheet.getcolors(2**24) if n > 1000 and colour in names}


def test_the_command_speaks_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flawed(tmp_path)
    place = str(tmp_path / "flawed.parquet")
    assert run_check(place, "--sheet", str(tmp_path / "sheet.png")) == 1
    said = capsys.readouterr().out
    assert "2 of 7 pictures (28.57%) cannot be used" in said and Image.open(tmp_path / "sheet.png").width > 300
    scored = parquet(tmp_path / "s.parquet", clip_score=[1.0, 2.0, 3.0, 4.0, None])
    assert run_check(str(scored), "--scores", "clip", "--ties", "drop") == 0
    assert "scores       1 to 4, of 4 pictures" in capsys.readouterr().out
    with pytest.raises(UserError, match="there are those of clip"):
        run_check(str(scored), "--scores", "hps")
