"""Prompts from every format, the lists that come along, and what is said about files that are wrong."""

from __future__ import annotations

import json

import pytest

from diffalign.errors import UserError
from pipelines.prompts import SETS, Prompt, read_prompts


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
