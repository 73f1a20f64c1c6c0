"""Prompts from every format, the lists that come along, and what is said about files that are wrong."""

from __future__ import annotations

import argparse
import json
import warnings

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.errors import UserError
from pipelines.commands import generate
from pipelines.prompts import NAMES, SETS, STYLES, LoggedPromptsWarning, Prompt, as_prompts, read_prompts


def write(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.mark.parametrize(("name", "count", "categories"), [("parti", 1632, 12), ("geneval", 553, 6), ("imagereward", 100, 0)])
def test_lists_that_come_along_are_whole(name, count, categories):
    prompts = read_prompts(name)
    assert len(prompts) == count
    assert len({p.category for p in prompts} - {None}) == categories
    assert all(p.text and p.text == p.text.strip() for p in prompts)
    assert set(SETS) == {"parti", "geneval", "imagereward"}


def test_other_columns_come_along_as_metadata(tmp_path):
    first, last = (read_prompts("geneval")[i] for i in (0, -1))
    assert first.metadata == {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    assert set(last.metadata) == {"tag", "include"}
    assert any("exclude" in p.metadata for p in read_prompts("geneval"))
    assert set(read_prompts("parti")[0].metadata) == {"Category", "Challenge", "Note"}
    assert {p.metadata.get("tag") for p in read_prompts("geneval")} == {p.category for p in read_prompts("geneval")}
    plain = read_prompts(write(tmp_path, "p.txt", "one\n"))[0]
    assert plain.metadata == {}
    # it makes a prompt no other, and a set can hold it though a list cannot be hashed
    assert Prompt("one", None, "p.txt:1", {"tag": [1]}) == plain
    assert len({first, Prompt(first.text, first.category, first.origin)}) == 1


def test_parti_keeps_quotation_marks_and_accents():
    texts = {p.text for p in read_prompts("parti")}
    assert "Salvador Dalí" in texts
    assert any('"' in text for text in texts)


def test_text_file_has_a_prompt_in_each_line(tmp_path):
    path = write(tmp_path, "p.txt", "\ufeffa red circle\r\n\r\n  a blue star, with a comma\u2028inside \n")
    assert read_prompts(path) == [
        Prompt("a red circle", None, "p.txt:1"),
        Prompt("a blue star, with a comma\u2028inside", None, "p.txt:3"),
    ]


def test_all_formats_give_the_same_prompts(tmp_path):
    rows = [{"prompt": "a red circle, large", "category": "shape"}, {"prompt": 'a "blue" star', "category": None}]
    files = [
        write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n"),
        write(tmp_path, "p.json", json.dumps(rows)),
        write(tmp_path, "p.csv", 'category,prompt\nshape,"a red circle, large"\n,"a ""blue"" star"\n'),
        write(tmp_path, "p.tsv", 'Prompt\tCategory\na red circle, large\tshape\na "blue" star\t\n'),
    ]
    for file in files:
        assert [(p.text, p.category) for p in read_prompts(file)] == [("a red circle, large", "shape"), ('a "blue" star', None)]


def test_quotation_marks_in_a_tsv_are_read_as_in_pairs(tmp_path):
    path = write(tmp_path, "p.tsv", 'prompt\tcategory\n"a ""blue"" star"\tx\n\n"Hello" on a sign\ty\n"open\t\n')
    found = [(p.text, p.category, p.origin) for p in read_prompts(path)]
    assert found == [
        ('a "blue" star', "x", "p.tsv:2"),
        ('"Hello" on a sign', "y", "p.tsv:4"),
        ('"open', None, "p.tsv:5"),
    ]


def test_json_may_hold_bare_strings(tmp_path):
    assert [p.text for p in read_prompts(write(tmp_path, "p.json", '["one", "two"]'))] == ["one", "two"]
    assert [p.text for p in read_prompts(write(tmp_path, "p.jsonl", '"one"\n"two"\n'))] == ["one", "two"]


def test_column_can_be_named(tmp_path):
    path = write(tmp_path, "p.csv", "prompt,rewritten\nplain,fancy\n")
    assert read_prompts(path)[0].text == "plain"
    assert read_prompts(path, column="rewritten")[0].text == "fancy"
    with pytest.raises(UserError, match="no column 'better'; it has 'prompt', 'rewritten'"):
        read_prompts(path, column="better")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n  \n", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", "title,words\na,b\n", "no column for prompts .*'title', 'words'"),
        ("p.csv", "prompt\na red circle, large\n", "line 2: 2 fields under a header of 1"),
        ("p.csv", "prompt,category\nfine,x\n  ,x\n", "line 3, column 'prompt': the prompt is empty"),
        ("p.csv", 'prompt\n"never closed\n', "not valid CSV"),
        ("p.tsv", "category\tprompt\nx\n", "line 2, column 'prompt': found null"),
        ("p.jsonl", '{"prompt": "fine"}\n{"prompt": oops}\n', "line 2, column 12: this is not valid JSON"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1, column 'prompt': found a number"),
        ("p.json", '{"prompt": "one"}', "holds an object; it should hold a list"),
        ("p.json", '["one", 2]', "item 2: found a number"),
        ("p.md", "one", r"ends in '.md'"),
    ],
)
def test_wrong_files_are_named_with_the_place(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(write(tmp_path, name, text))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"prompt": "one"}\n{"prompt": " "}\n{"prompt": null}\n'),
        ("p.json", '[{"prompt": "one"}, {"prompt": ""}, {"prompt": null}]'),
        ("p.csv", 'prompt,n\none,1\n"",2\n ,3\n'),
    ],
)
def test_empty_prompts_stay_for_whoever_names_them(tmp_path, name, text):
    path = write(tmp_path, name, text)
    assert [prompt.text for prompt in read_prompts(path, strict=False)] == ["one", "", ""]
    with pytest.raises(UserError, match="the prompt is empty"):
        read_prompts(path)


def test_half_a_character_is_named_with_its_place(tmp_path):
    path = write(tmp_path, "p.jsonl", '{"prompt": "one"}\n{"prompt": "half \\ud83d"}\n')
    for strict in (True, False):
        with pytest.raises(UserError, match="p.jsonl, line 2, column 'prompt': the prompt holds half of a surrogate pair"):
            read_prompts(path, strict=strict)
    with pytest.raises(UserError, match="Prompt 2 of 2 holds half of a surrogate pair"):
        as_prompts(["one", "half \ud83d"])


def test_missing_file_and_misspelt_list(tmp_path):
    with pytest.raises(UserError, match=r"'partis'. Did you mean 'parti'\?.*parti, geneval, imagereward"):
        read_prompts("partis")
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(tmp_path)


def test_file_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"fine\nSalvador Dal\xed\n")
    with pytest.raises(UserError, match="line 2: byte 0xed is not UTF-8"):
        read_prompts(path)


# --------------------------------------------------------------------------------------------------- lists that are fetched


def write_styles(folder, styles=STYLES) -> None:
    folder.mkdir(parents=True)
    for style in styles:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(3)]))


def cached(cache, repo: str):
    """The folder in which the hub's library keeps the files of a data set."""
    place = cache / f"datasets--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    return place / "snapshots" / ("0" * 40)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub's library, without a connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("place", ["copy", "copy/benchmark", "hub"])
def test_hpsv2_has_four_styles(tmp_path, hub, place):
    if place == "hub":
        write_styles(cached(hub, "ymhao/HPDv2") / "benchmark")
    else:
        write_styles(tmp_path / place)
    prompts = read_prompts("hpsv2" if place == "hub" else f"hpsv2:{tmp_path / 'copy'}")
    assert [(p.text, p.category) for p in prompts] == [(f"{style} {i}", style) for style in STYLES for i in range(3)]
    assert prompts[4].origin == "concept-art.json:item 2"


def test_hpsv2_says_what_is_missing_and_how_to_get_it(tmp_path, hub):
    command = r"`hf download ymhao/HPDv2 .*benchmark/photo.json --repo-type dataset`.* hpsv2:PATH"
    with pytest.raises(
        UserError, match=f"need benchmark/anime.json, .* of the data set ymhao/HPDv2, not on this machine.*{command}"
    ):
        read_prompts("hpsv2")
    write_styles(cached(hub, "ymhao/HPDv2") / "benchmark", STYLES[:3])
    with pytest.raises(UserError, match=f"need benchmark/photo.json of .*{command}"):
        read_prompts("hpsv2")
    write_styles(tmp_path / "copy", STYLES[1:3])
    with pytest.raises(UserError, match=f"copy lacks anime.json, photo.json .*{command}"):
        read_prompts(f"hpsv2:{tmp_path / 'copy'}")


CAPTIONS = ["two", "one", "two ", "", "three", None, "one"]


@pytest.mark.parametrize("form", ["parquet", "folder", "arrow", "saved", "jsonl", "hub"])
def test_pick_a_pic_has_each_caption_once_and_warns(tmp_path, hub, form):
    table, where = pa.table({"caption": CAPTIONS, "uid": range(7)}), tmp_path / "copy"
    where.mkdir()
    if form == "saved":
        datasets.DatasetDict({"test_unique": datasets.Dataset(table)}).save_to_disk(where)
    elif form == "jsonl":
        where = write(tmp_path, "p.jsonl", "".join(json.dumps({"caption": c}) + "\n" for c in CAPTIONS if c))
    elif form == "arrow":
        where = where / "x.arrow"
        with pa.OSFile(str(where), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    else:
        data = cached(hub, "yuvalkirstain/pickapic_v2_no_images") / "data" if form == "hub" else where
        data.mkdir(parents=True, exist_ok=True)
        for split, captions in {"test_unique": table, "validation_unique": pa.table({"caption": ["other"]})}.items():
            pq.write_table(captions, data / f"{split}-00000-of-00001-e852c19ead276a89.parquet")
        where = next(data.glob("test*")) if form == "parquet" else where
    with pytest.warns(LoggedPromptsWarning, match="sexual content.*Filter them.*safety checker on"):
        prompts = read_prompts("pick-a-pic" if form == "hub" else f"pick-a-pic:{where}")
    assert [(p.text, p.category) for p in prompts] == [("two", None), ("one", None), ("three", None)]


def test_pick_a_pic_says_what_is_missing_and_how_to_get_it(tmp_path, hub):
    command = r'`hf download yuvalkirstain/pickapic_v2_no_images --include "data/test_unique-\*.parquet" --repo-type dataset`'
    with pytest.raises(UserError, match=f"need data/test_unique-.*parquet of the data set .*{command}.*pick-a-pic:PATH"):
        read_prompts("pick-a-pic")
    with pytest.raises(UserError, match=f"There is no .*lost.parquet .*{command}"):
        read_prompts(f"pick-a-pic:{tmp_path / 'lost.parquet'}")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "x.parquet")
    with pytest.warns(LoggedPromptsWarning), pytest.raises(UserError, match="no column 'caption'; it has 'words'"):
        read_prompts(f"pick-a-pic:{tmp_path / 'x.parquet'}")
    with pytest.warns(LoggedPromptsWarning):
        assert [p.text for p in read_prompts(f"pick-a-pic:{tmp_path / 'x.parquet'}", "words")] == ["a"]


def test_other_lists_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in SETS:
            read_prompts(name)


def test_all_names_are_told(tmp_path):
    assert NAMES == ("parti", "geneval", "imagereward", "hpsv2", "pick-a-pic")
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    assert ", ".join(NAMES) in " ".join(parser.format_help().split())
    with pytest.raises(UserError, match=r"'pickapic'. Did you mean 'pick-a-pic'\?"):
        read_prompts("pickapic")
    with pytest.raises(UserError, match="no prompt file 'hpsv2:'"):
        read_prompts("hpsv2:")
