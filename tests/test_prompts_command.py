"""``diffalign prompts``, as a newcomer types it: build, sft, train, rewrite, evaluate, each on what the one before left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_writer_material import CHATML, TURN_END, writer

from pipelines import cli, scoring
from pipelines.comparison import compare
from pipelines.rewrite_pairs import read_rewrites
from pipelines.writers import evaluation_report
from pipelines.writers.drift import Drift, read_drift
from pipelines.writers.rewrite_scorer import DrawingSettings, RewriteScorer
from pipelines.writers.sampling import Decoding, candidates
from pipelines.writers.writer import Writer

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
    sft = ["--model", "tiny", "--pairs", folder / "expansions.jsonl", "--output", folder / "sft"]
    fine(capsys, "sft", *sft, *plain)

    build = ["--prompts", folder / "prompts.txt", "--writer", folder / "sft", "--embedding", "tiny", "--candidates", "4"]
    said = fine(
        capsys, "build", *build, *DRAWN, "--max-rewrite-tokens", "40", "--min-gap", "0", "--out", folder / "pairs.parquet"
    )
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
    chosen_with, scores = [], RewriteScorer.scores
    monkeypatch.setattr(
        RewriteScorer, "scores", lambda self, *given: chosen_with.append(self.drawing.seed) or scores(self, *given)
    )
    warmth = ["--temperature", "0.7", "--top-p", "0.9", "--delta", "0.2"]
    said = fine(capsys, "evaluate", *evaluate, *DRAWN, *warmth, "--pictures", "2", "--out", folder / "evaluation")
    assert "sem, best of 2" in said and "Predicted and measured drift" in said
    values = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert [way["name"] for way in values["ways"]] == ["plain", "sft", "sft, best of 2", "sem", "sem, best of 2"]
    assert (values["temperature"], values["top_p"], values["drawn"]["seed"]) == (0.7, 0.9, 0)
    assert chosen_with == [1, 1]  # the best of several is chosen on pictures that are not measured
    predicted, distances = values["ways"][3]["predicted_drift"], read_drift(folder / "sem").distances
    assert predicted["beyond"] == pytest.approx(sum(d > 0.2 for d in distances) / len(distances))  # at this delta
    assert values["ways"][3]["truncated"] > 0 and values["ways"][0]["truncated"] == 0 and "truncated" in said
    assert values["left out"] == [] and values["max_distance"] is None
    typed = values["ways"][0]
    assert typed["distance"] == 0 and typed["unchanged"] == 1 and typed["beyond"] == 0
    assert {"oracle.taste", "oracle.faithfulness"} <= typed["parts"].keys()
    assert (folder / "evaluation" / "side_by_side.png").stat().st_size > 10_000


def test_a_mean_over_one_prompt_is_told_without_an_interval() -> None:
    assert evaluation_report._interval((1.25, float("nan"), float("nan"))) == "1.25 (-)"
    assert evaluation_report._interval((1.25, 1.0, 1.5)) == "1.25 (1 to 1.5)"


def test_an_evaluation_under_a_cap_leaves_out_what_cannot_be_rewritten(folder: Path, capsys: pytest.CaptureFixture) -> None:
    listed = folder / "odd.jsonl"
    listed.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a red star", "word " * 400, "", "a yellow star")))
    evaluate = ["--prompts", listed, "--writers", f"w={folder / 'start'}", "--embedding", "tiny", "--out", folder / "capped"]
    fine(capsys, "evaluate", *evaluate, *DRAWN, "--max-distance", "0")
    values = json.loads((folder / "capped" / "evaluation.json").read_text())
    assert values["prompts"] == 2 and values["left out"][0].startswith("odd.jsonl:2: the prompt takes")
    assert values["left out"][1] == "odd.jsonl:3: prompt is empty"
    assert values["ways"][1]["unchanged"] == 1 and values["ways"][1]["distance"] == 0
    report = (folder / "capped" / "report.md").read_text()
    assert "2 prompts that cannot be rewritten were left out:\n\n* odd.jsonl:2:" in report


def test_writers_are_compared_with_each_other_and_their_pictures_kept(folder: Path, capsys: pytest.CaptureFixture) -> None:
    listed, out = folder / "some.jsonl", folder / "kept"
    rows = [{"prompt": p, "category": "stars"} for p in ("a red star", "a yellow star", "a red star")]
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = ["evaluate", "--prompts", listed, "--embedding", "tiny", "--pictures", "2", "--way", "beam", *DRAWN, "--out", out]
    fine(capsys, *evaluate, "--writers", f"one={folder / 'start'},two/b=tiny,three=tiny", "--keep-pictures")
    fine(capsys, *evaluate, "--writers", f"one={folder / 'start'},two/b=tiny", "--keep-pictures", "--overwrite")
    values, report = json.loads((out / "evaluation.json").read_text()), (out / "report.md").read_text()
    assert [sorted(way["against"]) for way in values["ways"]] == [[], ["plain"], ["one", "plain"]]
    assert "two/b against one" in report
    match, systems = values["ways"][2]["against"]["one"], {"one": out / "pictures/one", "two": out / "pictures/two-b"}
    assert sorted(p.name for p in (out / "pictures").iterdir()) == ["one", "plain", "two-b"]  # nothing of the first evaluation

    kept = scoring.score_table(systems, judges=["oracle"])
    again = compare(kept).win_rates.iloc[0]
    assert match["wins"]["oracle"] == pytest.approx([again.win_rate, again.low, again.high])
    more = [again.difference, again.difference_low, again.difference_high]
    assert match["differences"]["oracle"] == pytest.approx(more, abs=0.01)
    prompts = ["a red star", "a yellow star"]
    assert kept[kept.system == "two"].seed.tolist() == [seed for p in prompts for seed in DrawingSettings(pictures=2).seeds(p)]
    written = candidates(Writer.load("tiny"), prompts, 1, Decoding("beam", max_rewrite_tokens=6))
    told = [json.loads(line)["rewrite"] for line in (systems["two"] / "metadata.jsonl").read_text().splitlines()]
    assert told[::2] == [rewrites[0] for rewrites in written] and set(kept.category) == {"stars"}

    assert values["notes"] == ["2 prompts; below 50 the intervals are rough.", "1 repeated prompt left out."]
    assert all(note in report for note in values["notes"]) and values["how"] == "beam"
    assert values["generator"]["name"] == "tiny" and values["generator"]["fingerprint"] in report
    plain, one, two = (way["writer"] for way in values["ways"])
    assert plain is None and one["name"] == str(folder / "start") and two["name"] == "tiny"
    assert len({one["fingerprint"], two["fingerprint"], values["generator"]["fingerprint"]}) == 3


def test_a_writer_remembers_the_turns_that_it_was_trained_with(folder: Path, capsys: pytest.CaptureFixture) -> None:
    writer("qwen2", chat=CHATML, end=TURN_END).save(folder / "chat")
    turns = ["--instruction", "Better: {prompt}", "--system", "You paint."]
    sizes = ["--steps", "1", "--batch-size", "2", "--validation-pairs", "1", "--max-left-out", "1", "--rank", "2"]
    given = ["--model", folder / "chat", "--pairs", folder / "expansions.jsonl", "--tracker", "none", "--quiet"]
    fine(capsys, "sft", *given, *sizes, *turns, "--output", folder / "turned")
    shown = "<|im_start|>system\nYou paint.<|im_end|>\n<|im_start|>user\nBetter: a cat<|im_end|>\n<|im_start|>assistant\n"
    assert Writer.load(folder / "turned").template.prompt_text("a cat") == shown
    assert Writer.load(folder / "chat").template.prompt_text("a cat") != shown
    how = ["--writer", folder / "turned", "--max-rewrite-tokens", "6"]
    written = [fine(capsys, "rewrite", "a cat", *how, *more) for more in ([], turns)]
    assert written[0] == written[1]
    code, _, wrong = ran(capsys, "rewrite", "a cat", "--writer", folder / "turned", "--instruction", "better")
    assert code == 2 and "should have one {prompt} in it" in wrong


def test_drift_in_another_embedding_is_not_compared(folder: Path, capsys: pytest.CaptureFixture) -> None:
    writer("gpt2", template="rephrase").save(folder / "other")
    Drift(5.0, "clip", "another", [0.1, 0.2]).write(folder / "other")
    evaluate = ["--prompts", folder / "prompts.txt", "--writers", f"w={folder / 'other'}", "--embedding", "tiny"]
    fine(capsys, "evaluate", *evaluate, *DRAWN, "--out", folder / "else")
    assert "- (trained by distances of clip)" in (folder / "else" / "report.md").read_text()


def test_two_processes_build_together(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    build = ["build", "--prompts", folder / "prompts.txt", "--writer", "tiny", "--embedding", "tiny", "--min-gap", "0"]
    words = [str(w) for w in (*build, "--candidates", "4", "--chunk", "1", *DRAWN, "--max-rewrite-tokens", "40")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "two.candidates.jsonl").write_text('{"purpose": "another"}\n')  # of another build: the first process drops it
    both = [*torchrun, "-m", "pipelines.cli", "prompts", *words, "--overwrite", "--out", str(tmp_path / "two.jsonl")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(both, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("pairs from 5 prompts") == 1
    fine(capsys, *words, "--out", tmp_path / "one.jsonl")
    one, two = (read_rewrites(tmp_path / f"{name}.jsonl").rows for name in ("one", "two"))
    assert [(r.prompt, r.chosen, r.rejected) for r in one] == [(r.prompt, r.chosen, r.rejected) for r in two]
    assert not list(tmp_path.glob("*.part-*"))


def test_a_dry_run_says_what_would_be_refused(folder: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pairs = folder / "dry.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": p, "chosen": f"{p}, vivid", "rejected": f"{p}, pale"}) + "\n" for p in PROMPTS)
    )
    train = [
        "train",
        "--model",
        folder / "start",
        "--pairs",
        pairs,
        "--output",
        folder / "dry",
        "--dry-run",
        "--embedding",
        "tiny",
    ]
    for more, message in (
        (["--embedding", "nobody/nothing"], "nobody/nothing"),
        (["--gold-weight", "1"], "there is no reference rewrite"),
        (["--loss", "madpo"], "needs a judge's scores of both rewrites"),
        (["--distances", "data"], "5 of 5 rows have no distance"),
        (["--token-guidance", "0.5", "--token-rewards", folder / "no-writer"], "no-writer"),
    ):
        code, _, wrong = ran(capsys, *train, *more)
        assert code == 2 and message in " ".join(wrong.split()), (more, wrong)
    assert "Try --length mean" in fine(capsys, *train, "--loss", "orpo", "--beta", "1")
    assert "Try --length mean" not in fine(capsys, *train, "--loss", "orpo", "--beta", "1", "--length", "mean")
    assert "Try --length" not in fine(capsys, *train, "--loss", "simpo", "--loss-options", "gamma=0")  # CPO


def test_a_dry_run_checks_and_trains_nothing(folder: Path, capsys: pytest.CaptureFixture) -> None:
    sft = ["--model", folder / "start", "--pairs", folder / "expansions.jsonl", "--output", folder / "dry"]
    code, _, told = ran(capsys, "sft", *sft, "--dry-run", "--resume")
    assert code == 2 and "There is no run to resume" in told
    said = fine(capsys, "sft", *sft, "--dry-run")
    assert "rows: 5" in said and "max_rewrite_tokens: 128" in said and not (folder / "dry").exists()
    said = fine(
        capsys, "sft", *sft, "--dry-run", "--validation-pairs", "1", "--steps", "6", "--batch-size", "2", "--accumulation", "1"
    )
    assert "On one device 6 steps of 2 are 3 epochs, passes over the 4 to train on" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rewrite", "--writer", "x"], "Give prompts on the command line, or a list with --prompts: one of the two"),
        (["rewrite", "a cat", "--writer", "x", "--generator", "tiny"], "give both, or neither"),
        (
            ["rewrite", "a cat", __file__[:-3] + ".txt", "--writer", "no-such-folder/x"],
            "There is no folder no-such-folder/x here",
        ),
        (["rewrite", "LIST", "--writer", "x"], "is a file; its prompts are rewritten by --prompts"),
        (["rewrite", "a cat", "--writer", "x", "--count", "3"], "--column and --count belong to a list"),
        (["rewrite", "a cat", "--writer", "no-such-folder/x", "--out", "x.txt"], "rewrites are written as .jsonl or .csv"),
        (["rewrite", "a cat", "--writer", "x", "--temprature", "2"], "unknown arguments: --temprature 2"),
        (["train", "--model", "x", "--output", "y", "--aplha", "2"], "--aplha: unknown option; did you mean --alpha?"),
        (["train", "--model", "x", "--output", "y"], "pairs: needed but not given"),
        (["sft", "--model", "x", "--output", "y", "--steps", "3", "5", "on"], "5 on: belong to no option"),
        (["evaluate", "--prompts", "parti", "--writers", "=x", *DRAWN, "--out", "z"], "expected NAME=WRITER, each name once"),
    ],
)
def test_mistakes_are_one_paragraph(words: list[str], message: str, capsys: pytest.CaptureFixture, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lists = tmp_path.parent / "prompts.txt"
    lists.write_text("a cat\n")
    code, _, said = ran(capsys, *[str(lists) if word == "LIST" else word for word in words])
    assert code == 2 and message in " ".join(said.split())
    assert not list(tmp_path.iterdir())


def test_help_of_each_command(capsys: pytest.CaptureFixture) -> None:
    for name in ("build", "sft", "train", "rewrite", "evaluate"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["prompts", name, "--help"])
        assert stopped.value.code == 0 and len(capsys.readouterr().out) > 500
