"""Preferences between rewrites: every form of storage gives the same rows, what is left out is counted, messages help."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.readers.parquet import ParquetRows
from diffalign.errors import UserError
from pipelines.rewrite_pairs import Expansion, RewritePair, read_expansions, read_rewrites, write_rewrites

ROWS = [
    {"prompt": "a red circle", "chosen": "a red circle, vivid", "rejected": "a blue circle"},
    {"prompt": "ein Käse", "chosen": "ein Käse, “alt”", "rejected": "Brot,\nfrisch"},
    {"prompt": "a cat", "chosen": "a cat, oil painting", "rejected": "a cat"},
]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(table) -> list[dict[str, str]]:
    return [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in table]


def stored(form: str, folder: Path) -> Path:
    path = folder / f"pairs.{form}"
    if form == "jsonl":
        return jsonl(path, ROWS)
    if form == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")
    elif form in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter={"csv": ",", "tsv": "\t"}[form])
            writer.writeheader()
            writer.writerows(ROWS)
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet", "saved"])
def test_every_form_gives_the_same_rows(form: str, tmp_path: Path) -> None:
    table = read_rewrites(stored(form, tmp_path))
    assert texts(table) == ROWS
    assert table.fingerprint == read_rewrites(stored("jsonl", tmp_path)).fingerprint
    assert table[2] == RewritePair("a cat", "a cat, oil painting", "a cat")
    assert {**table.left_out} == {"ties": 0, "identical": 0, "repeated": 0, "unwanted": 0, "unusable": 0}
    assert table.description.endswith(": 3 pairs")
    if form == "json":
        assert table[1].origin == "pairs.json:item 2"


def test_json_lines_in_a_file_called_json(tmp_path: Path) -> None:
    table = read_rewrites(jsonl(tmp_path / "pairs.json", ROWS))
    assert texts(table) == ROWS and table[1].origin == "pairs.json:line 2"


def test_a_split_is_chosen(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "test")):
        pq.write_table(pa.Table.from_pylist(ROWS[i : i + 1]), tmp_path / f"{split}-0.parquet")
    assert [texts(read_rewrites(tmp_path, split=s))[0] for s in ("train", "test")] == ROWS[:2]
    with pytest.raises(UserError, match="has no split 'validation'.*test, train"):
        read_rewrites(tmp_path, split="validation")


def test_the_optional_columns(tmp_path: Path) -> None:
    row = ROWS[0] | {"label": 0.75, "weight": "2", "distance": 2 + 4e-6, "score_chosen": 21.5, "score_rejected": None}
    row |= {"reference": " gold ", "seed": 7, "writer": "gpt2"}
    (pair,) = read_rewrites(jsonl(tmp_path / "a.jsonl", [row]))
    wanted = RewritePair("a red circle", "a red circle, vivid", "a blue circle", 0.75, 2.0, 2.0, 21.5, None, "gold")
    assert pair == wanted and not pair.tie
    assert pair.provenance == {"seed": 7, "writer": "gpt2"} and pair.origin == "a.jsonl:line 1"


def test_columns_by_other_names(tmp_path: Path) -> None:
    row = {"q": "a cat", "chosen": "the file's own", "best": "a cat, vivid", "worst": "a dog", "prompt": "not this"}
    file = jsonl(tmp_path / "a.jsonl", [row])
    names = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    (pair,) = read_rewrites(file, columns=names)
    assert texts([pair]) == [{"prompt": "a cat", "chosen": "a cat, vivid", "rejected": "a dog"}]
    assert pair.provenance == {}  # what is called like a role would be taken for it when it is read again
    (pair,) = read_rewrites(file, columns={**names, "chosen": "q", "prompt": "chosen"})  # a column has the one role it was given
    assert (pair.prompt, pair.chosen, pair.gold) == ("the file's own", "a cat", None)
    lists = {"prompt": "a cat", "chosen": "a gold cat", "winner": "a cat, vivid", "loser": "a dog"}
    (pair,) = read_rewrites(jsonl(tmp_path / "b.jsonl", [lists]), columns={"gold": "chosen"})
    assert (pair.chosen, pair.gold) == ("a cat, vivid", "a gold cat")
    with pytest.raises(UserError, match="'winner' is not a role of a column; the roles are chosen, chosen_score, distance, gold"):
        read_rewrites(file, columns={"winner": "best"})
    with pytest.raises(UserError, match=r"chosen=bset, but .*a\.jsonl has no column 'bset'. It has: q, chosen, best, worst"):
        read_rewrites(file, columns={"chosen": "bset"})


def test_a_data_set_without_chosen(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "sft.jsonl", [{"prompt": "a cat", "completion": "a cat, vivid"}])
    said = (
        r"sft\.jsonl does not have the columns that preferences between rewrites need: chosen and rejected are missing\. "
        r"It has: prompt, completion\. Needed: prompt or plain or plain_prompt, chosen or winner or preferred, rejected or .*; "
        r"optional label, weight, distance, .*\(columns: role=name\), as in "
        r"--columns prompt=PROMPT,chosen=CHOSEN,rejected=REJECTED\. One rewrite for each prompt can be imitated"
    )
    with pytest.raises(UserError, match=said):
        read_rewrites(file)
    with pytest.raises(UserError, match=r"rejected is missing\. It has: prompt, chosen\."):
        read_rewrites(jsonl(tmp_path / "half.jsonl", [{"prompt": "a", "chosen": "b"}]))
    with pytest.raises(UserError, match=r"chosen is missing\. It has: prompt, rejected\.") as raised:
        read_rewrites(jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "rejected": "b"}]))
    assert "imitated" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------------ left out


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    same = {"prompt": "a dog", "chosen": "a dog,  vivid", "rejected": " a dog, vivid "}
    again = [ROWS[0], ROWS[0] | {"prompt": "a red circle "}, ROWS[0] | {"weight": 2.0}, ROWS[0] | {"seed": 3}]
    tie = ROWS[2] | {"label": 0.5}
    file = jsonl(tmp_path / "a.jsonl", [*again, same, tie, "", "{broken", ROWS[1] | {"chosen": " "}, ROWS[1]])
    table = read_rewrites(file)
    assert [(r.prompt, r.weight) for r in table] == [("a red circle", 1), ("a red circle", 2), ("a cat", 1), ("ein Käse", 1)]
    assert {**table.left_out} == {"ties": 0, "identical": 1, "repeated": 2, "unwanted": 0, "unusable": 2}
    assert [str(p) for p in table.problems] == [
        "a.jsonl:line 8: not valid JSON: Expecting property name enclosed in double quotes at character 1",
        "a.jsonl:line 9: chosen is empty",
    ]
    assert (
        "4 pairs, 1 identical left out, 2 repeated left out, 2 unusable left out (the first: a.jsonl:line 8" in table.description
    )
    assert table[2].tie
    dropped = read_rewrites(file, ties="drop")
    assert dropped.left_out["ties"] == 1 and [r.prompt for r in dropped] == ["a red circle"] * 2 + ["ein Käse"]
    with pytest.raises(UserError, match="ties is 'maybe'; it must be one of keep, drop"):
        read_rewrites(file, ties="maybe")


def test_a_label_below_one_half_turns_the_pair_round(tmp_path: Path) -> None:
    row = ROWS[0] | {"label": 0.2, "distance": 0.3, "chosen_score": 1.0, "rejected_score": 2.0}
    (pair,) = read_rewrites(jsonl(tmp_path / "a.jsonl", [row]))
    assert (pair.chosen, pair.rejected, pair.label) == ("a blue circle", "a red circle, vivid", 0.8)
    assert (pair.chosen_score, pair.rejected_score) == (2.0, 1.0)
    assert pair.distance is None  # it was that of the rewrite which is now the rejected one


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt": None}, "prompt is empty"),
        ({"rejected": 3}, "rejected is int, not text"),
        ({"chosen": {"bytes": "...", "path": None}}, "chosen is a picture, not text: these are preferences between pictures"),
        ({"chosen": "a \ud83d"}, "chosen holds half of a surrogate pair, which is no character"),
        ({"label": 1.5}, "label is 1.5; it must be in [0, 1]"),
        ({"weight": -1}, "weight is -1; it must be finite and at least 0"),
        ({"distance": 2.5}, "distance is 2.5; it must be in"),
        ({"chosen_score": "good"}, "chosen_score is 'good', not a number"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "the conversation in chosen has no turn of the assistant"),
    ],
)
def test_rows_that_cannot_be_used(change: dict, reason: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [ROWS[0], ROWS[1] | change])
    (problem,) = read_rewrites(file).problems
    assert problem.origin == "a.jsonl:line 2" and problem.reason.startswith(reason)


def test_no_row_at_all(tmp_path: Path) -> None:
    same = ROWS[0] | {"chosen": "a", "rejected": "a"}
    with pytest.raises(
        UserError, match=r"no preferences between rewrites to use in .*: 1 identical, 1 unusable\. The first .*empty"
    ):
        read_rewrites(jsonl(tmp_path / "a.jsonl", [same, ROWS[0] | {"chosen": ""}]))
    with pytest.raises(UserError, match=r"There is no file or folder .*gone\.jsonl .*Rewrites can be: a \.jsonl, \.json"):
        read_rewrites(tmp_path / "gone.jsonl")
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.xlsx exists, but is in none of the known forms"):
        read_rewrites(tmp_path / "a.xlsx")
    for text, said in [("{", "not valid JSON"), ('{"rows": []}', "holds one dict; it should be a list of objects")]:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read_rewrites(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(["text", ROWS[0]]))
    assert str(read_rewrites(tmp_path / "a.json").problems[0]) == "a.json:item 1: expected a JSON object, found str"


def test_a_hub_id_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="as the id of a data set on the Hugging Face hub it could not be loaded"):
        read_rewrites("nobody/no-such-pairs")


# -------------------------------------------------------------------------------------------------------------- conversations


def said(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


TALK = {
    "prompt": [said("system", "be brief"), said("user", "a dog"), said("assistant", "a dog, vivid"), said("user", "a cat")],
    "chosen": [said("assistant", "a cat, vivid")],
    "rejected": [said("assistant", [{"type": "text", "text": "a big "}, {"type": "text", "text": "cat"}])],
}
PLAIN = {"prompt": "a cat", "chosen": "a cat, vivid", "rejected": "a big cat"}


def test_conversations_with_a_prompt_of_their_own(tmp_path: Path) -> None:
    assert texts(read_rewrites(jsonl(tmp_path / "a.jsonl", [TALK]))) == [PLAIN]
    mixed = {**TALK, "prompt": "a cat", "chosen": [said("user", "something else"), *TALK["chosen"]]}
    assert texts(read_rewrites(jsonl(tmp_path / "b.jsonl", [mixed]))) == [PLAIN]
    flat = {**TALK, "rejected": [said("assistant", "a big cat")]}
    pq.write_table(pa.Table.from_pylist([flat]), tmp_path / "c.parquet")
    assert texts(read_rewrites(tmp_path / "c.parquet")) == [PLAIN]
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([list(TALK), [json.dumps(cell) for cell in TALK.values()]])
    assert texts(read_rewrites(tmp_path / "d.csv")) == [PLAIN]


def test_turns_that_are_not_read_are_said(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "a cat"}]
    longer = [{"role": "system", "content": "be brief"}, *asked]
    answers = {side: [{"role": "assistant", "content": f"a {side} cat"}] for side in ("chosen", "rejected")}
    table = read_rewrites(jsonl(tmp_path / "a.jsonl", [{"prompt": asked, **answers}]))
    assert table.multi_turn == 0 and "conversations" not in table.description and "--system" not in table.description
    rows = [{"prompt": longer, **answers}, {"prompt": [{"role": "user", "content": "a dog"}], **answers}]
    table = read_rewrites(jsonl(tmp_path / "b.jsonl", rows))
    assert table.multi_turn == 1 and "of 1 conversations only the last turns are read" in table.description
    assert table.system_turns == 1 and "(1 have a system turn: the writer's own is given with --system TEXT)" in table.description
    whole = {side: [*asked, *answer] for side, answer in answers.items()}
    assert read_rewrites(jsonl(tmp_path / "c.jsonl", [whole])).multi_turn == 0
    more = {side: [*asked, *answers["chosen"], *talk] for side, talk in whole.items()}
    assert read_rewrites(jsonl(tmp_path / "d.jsonl", [more])).multi_turn == 1
    assert read_rewrites(tmp_path / "d.jsonl").system_turns == 0


def test_conversations_that_begin_with_the_prompt(tmp_path: Path) -> None:
    """TRL's implicit prompt."""
    whole = {side: [said("user", "a cat"), *TALK[side]] for side in ("chosen", "rejected")}
    torn = {**whole, "rejected": [said("user", "a dog"), *TALK["rejected"]]}
    answer = {**whole, "rejected": TALK["rejected"], "weight": 2}
    bare = {**whole, "chosen": "a cat, vivid"}
    table = read_rewrites(jsonl(tmp_path / "a.jsonl", [whole, torn, answer, bare]))
    assert texts(table) == [PLAIN, PLAIN]
    assert [p.reason for p in table.problems] == [
        "chosen and rejected answer different prompts",
        "there is no prompt: chosen is not a conversation as it is in other rows",
    ]
    with pytest.raises(UserError, match="prompt is missing"):
        read_rewrites(jsonl(tmp_path / "b.jsonl", [{"chosen": "a cat, vivid", "rejected": "a cat"}]))


# ----------------------------------------------------------------------------------------------------------------- expansions


@pytest.mark.parametrize("name", ["rewrite", "completion", "chosen", "expanded_prompt"])
def test_one_rewrite_for_each_prompt(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", name: "a cat, vivid", "by": "me"}, {"prompt": "a cat", name: "a cat, vivid"}]
    table = read_expansions(jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "a dog", name: None}]))
    assert table.rows == (Expansion("a cat", "a cat, vivid"),)
    assert table[0].provenance == {"by": "me"} and table.left_out["repeated"] == 1
    assert [str(p) for p in table.problems] == [f"a.jsonl:line 3: {name} is empty"]
    assert ": 1 rewrites, 1 repeated left out" in table.description


def test_expansions_of_conversations(tmp_path: Path) -> None:
    talk = [said("system", "be brief"), said("user", "a cat"), said("assistant", "a cat, vivid")]
    apart = {"prompt": talk[:2], "completion": talk[2:]}
    for name, row in {"messages": {"messages": talk}, "apart": apart}.items():
        assert read_expansions(jsonl(tmp_path / f"{name}.jsonl", [row])).rows == (Expansion("a cat", "a cat, vivid"),)


def test_what_nobody_wanted_is_not_imitated(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "x", "label": label} for i, label in enumerate(["True", False, "false", None])]
    table = read_expansions(jsonl(tmp_path / "a.jsonl", rows))
    assert [r.prompt for r in table] == ["p0", "p3"] and table.left_out["unwanted"] == 2
    (turned,) = read_expansions(jsonl(tmp_path / "b.jsonl", [ROWS[0] | {"label": 0.1}]))
    assert turned.rewrite == "a blue circle"


def test_expansions_need_a_rewrite(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rewrites to imitate need: rewrite is missing\. It has: prompt\. Needed: prompt"):
        read_expansions(jsonl(tmp_path / "a.jsonl", [{"prompt": "a cat"}]))


# -------------------------------------------------------------------------------------------------------------------- writing

WRITTEN = [
    RewritePair(
        "ein Käse", "ein Käse,\nalt", "Brot", 0.75, 2.0, 0.25, 21.5, math.nan, "gold", provenance={"seed": 1, "why": "x"}
    ),
    RewritePair("a cat", "a cat, vivid", "a dog", provenance={"scores": {"a": math.inf}, "why": 3}),
]


def test_every_row_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And always with the same columns: readers of Parquet begin anew with others."""
    write_rewrites([replace(WRITTEN[0], chosen=f"a cat, {n}") for n in range(50)], tmp_path / "pairs.parquet")
    asked, row = [], ParquetRows.row
    monkeypatch.setattr(ParquetRows, "row", lambda rows, n, columns: asked.append((n, tuple(columns))) or row(rows, n, columns))
    assert len(read_rewrites(tmp_path / "pairs.parquet")) == 50
    assert [n for n, _ in asked] == [*range(50)] and len({columns for _, columns in asked}) == 1


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_is_written_is_read_again(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / f"pairs.{ending}"
    write_rewrites(WRITTEN, path)
    table = read_rewrites(path)
    assert table.rows == (replace(WRITTEN[0], rejected_score=None), WRITTEN[1])
    assert table[0].provenance["seed"] == 1 and table[1].provenance["seed"] is None
    assert table[1].provenance["scores"] == {"a": None}
    mixed = [r.provenance["why"] for r in table]
    assert mixed == (["x", 3] if ending == "jsonl" else ["x", "3"])  # a column of Parquet has one type
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    write_rewrites(table.rows, tmp_path / "again.jsonl")
    assert read_rewrites(tmp_path / "again.jsonl").rows == table.rows


def test_pairs_of_pictures_are_no_rewrites(tmp_path: Path) -> None:
    rows = [{"prompt": f"a cat {n}", "chosen": f"imgs/{n}a.png", "rejected": f"imgs/{n}b.JPG"} for n in range(3)]
    for read in (read_rewrites, read_expansions):
        with pytest.raises(UserError, match=r"holds names of pictures \('imgs/0a\.png'\), and a prompt writer learns from texts"):
            read(jsonl(tmp_path / "pictures.jsonl", rows))
    texts = [{**row, "chosen": "a large cat, file name cat.png" if n else "a cat"} for n, row in enumerate(rows[:2])]
    assert len(read_rewrites(jsonl(tmp_path / "texts.jsonl", texts))) == 2


def test_columns_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    write_rewrites([RewritePair(**ROWS[0])], tmp_path / "a.jsonl")
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [ROWS[0]]
    write_rewrites([Expansion("a cat", "a cat, vivid", provenance={"by": "me"})], tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet").to_pylist() == [{"prompt": "a cat", "rewrite": "a cat, vivid", "by": "me"}]
    assert read_expansions(tmp_path / "b.parquet").rows == (Expansion("a cat", "a cat, vivid"),)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.csv ends in \.csv; rewrites are written as \.jsonl, \.ndjson, \.parquet"):
        write_rewrites(WRITTEN, tmp_path / "a.csv")
    with pytest.raises(UserError, match="There are no rewrites to write"):
        write_rewrites([], tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="provenance has weight, which is a column of its own"):
        write_rewrites([RewritePair("a", "b", "c", provenance={"weight": 3})], tmp_path / "a.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        write_rewrites(WRITTEN, tmp_path / "file" / "a.jsonl")
