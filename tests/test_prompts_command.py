"""``diffalign prompts``, as a newcomer types it: build, sft, train, rewrite, evaluate, each on what the one before left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_writer_material import writer

from pipelines import cli
from pipelines.writers.studio import Studio

PROMPTS = ("a red circle on a blue background", "a small green square", "a red star", "a yellow star", "a cyan cross")
DRAWN = ["--generator", "tiny", "--judges", "oracle", "--steps", "2", "--guidance-scale", "2", "--max-rewrite-tokens", "6"]


def ran(capsys: pytest.CaptureFixture, *words: str | Path) -> tuple[int, str, str]:
    code = cli.main(["prompts", *map(str, words)])
    return code, *capsys.readouterr()


def fine(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    """What it said, having done what it was asked."""
    code, said, wrong = ran(capsys, *words)
    assert code == 0, wrong
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    writer("gpt2", template="rephrase").save(folder / "start")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "expansions.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "rewrite": f"{p}, vivid, clean"}) + "\n" for p in PROMPTS)
    )
    return folder


def test_the_five_commands_one_after_the_other(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ["--tracker", "none", "--quiet", "--adapter", "full", "--validation-pairs", "1", "--steps", "2", "--batch-size", "2"]
    sft = ["--model", folder / "start", "--pairs", folder / "expansions.jsonl", "--output", folder / "sft"]
    fine(capsys, "sft", *sft, *plain)

    build = ["--prompts", folder / "prompts.txt", "--writer", folder / "sft", "--embedding", "tiny", "--candidates", "4"]
    said = fine(capsys, "build", *build, *DRAWN, "--min-gap", "0", "--out", folder / "pairs.parquet")
    assert "5 pairs from 5 prompts" in said and "further than 0.1" in said

    train = ["--model", folder / "sft", "--pairs", folder / "pairs.parquet", "--output", folder / "sem", "--embedding", "tiny"]
    fine(capsys, "train", *train, *plain, "--alpha", "5")
    assert json.loads((folder / "sem" / "summary.json").read_text())["weights"]["alpha"] == 5

    said = fine(capsys, "rewrite", "a red star", "-n", "2", "--writer", folder / "sem", "--embedding", "tiny")
    assert said.count("distance ") >= 1
    listed = ["--prompts", folder / "prompts.txt", "--writer", folder / "sem", "--out", folder / "rewrites.csv"]
    fine(capsys, "rewrite", *listed, *DRAWN)
    rows = (folder / "rewrites.csv").read_text().splitlines()
    assert rows[0].startswith("prompt,rewrite,rank,distance,score,oracle,unchanged") and len(rows) == 6

    both = f"sft={folder / 'sft'},sem={folder / 'sem'}"
    evaluate = ["--prompts", folder / "prompts.txt", "--writers", both, "--best-of", "2", "--embedding", "tiny"]
    chosen_with, scores = [], Studio.scores
    monkeypatch.setattr(Studio, "scores", lambda self, *given: chosen_with.append(self.how.seed) or scores(self, *given))
    warmth = ["--temperature", "0.7", "--top-p", "0.9"]
    said = fine(capsys, "evaluate", *evaluate, *DRAWN, *warmth, "--pictures", "2", "--out", folder / "evaluation")
    assert "sem, best of 2" in said and "What the weights promise" in said
    values = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert [way["name"] for way in values["ways"]] == ["plain", "sft", "sft, best of 2", "sem", "sem, best of 2"]
    assert (values["temperature"], values["top_p"], values["drawn"]["seed"]) == (0.7, 0.9, 0)
    assert chosen_with == [1, 1]  # the best of several is chosen on pictures that are not measured
    plain_way = values["ways"][0]
    assert plain_way["distance"] == 0 and plain_way["unchanged"] == 1 and plain_way["beyond"] == 0
    assert {"oracle.taste", "oracle.faithfulness"} <= plain_way["parts"].keys()
    assert (folder / "evaluation" / "side_by_side.png").stat().st_size > 10_000


def test_a_dry_run_checks_and_trains_nothing(folder: Path, capsys: pytest.CaptureFixture) -> None:
    sft = ["--model", folder / "start", "--pairs", folder / "expansions.jsonl", "--output", folder / "dry"]
    said = fine(capsys, "sft", *sft, "--dry-run")
    assert "rows: 5" in said and "max_rewrite_tokens: 128" in said and not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rewrite", "--writer", "x"], "Give prompts on the command line, or a list with --prompts: one of the two"),
        (["rewrite", "a cat", "--writer", "x", "--generator", "tiny"], "give both, or neither"),
        (["rewrite", "a cat", "--writer", "no-such-folder/x", "--out", "x.txt"], "rewrites are written as .jsonl or .csv"),
        (["rewrite", "a cat", "--writer", "x", "--temprature", "2"], "unknown arguments: --temprature 2"),
        (["train", "--model", "x", "--output", "y", "--aplha", "2"], "--aplha: unknown option; did you mean --alpha?"),
        (["train", "--model", "x", "--output", "y"], "pairs: needed but not given"),
        (["evaluate", "--prompts", "parti", "--writers", "=x", *DRAWN, "--out", "z"], "expected NAME=WRITER, each name once"),
    ],
)
def test_mistakes_are_one_paragraph(words: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, said = ran(capsys, *words)
    assert code == 2 and message in " ".join(said.split())
    assert not list(tmp_path.iterdir())


def test_help_of_each_command(capsys: pytest.CaptureFixture) -> None:
    for name in ("build", "sft", "train", "rewrite", "evaluate"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["prompts", name, "--help"])
        assert stopped.value.code == 0 and len(capsys.readouterr().out) > 500
