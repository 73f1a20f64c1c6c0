"""Many calls in one process, as in a notebook: what one leaves to the next, how a run is stopped, and arguments that were meant
otherwise. Mistakes are told before anything that is there goes."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from family_runs import Saved, assert_equal, brightness, run, weights
from PIL import Image

import reward_models
from diffalign import random_state
from diffalign.data.open import open_pairs
from diffalign.data.validate import check, contact_sheet
from diffalign.errors import UserError
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from pipelines import cli, config, training
from pipelines.comparison import compare
from pipelines.families import load_pipeline
from pipelines.generation import generate
from pipelines.prompts import Prompt, as_prompts
from pipelines.training import align
from pipelines.writers.optimizer import PromptOptimizer
from pipelines.writers.training import train_writer
from reward_models import JudgeError, PointwiseJudge, RewardInfo

PICTURE = Image.new("RGB", (64, 64))


def a_judge() -> PointwiseJudge:
    return reward_models.load("tiny-pickscore")


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_stop_is_a_keyboard_interrupt_and_the_run_goes_on(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    def stops_it(pictures: torch.Tensor, prompts: list[str]) -> list[float]:
        signal.raise_signal(signal.SIGINT)
        return brightness(pictures, prompts)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 1; a checkpoint was written.*resume=True"):
        run(saved, pairs, "d3po", tmp_path / "cut", steps=3, judge=named(stops_it))
    assert signal.getsignal(signal.SIGINT) is before
    run(saved, pairs, "d3po", tmp_path / "cut", steps=3, judge=named(brightness), resume=True)
    run(saved, pairs, "d3po", tmp_path / "whole", steps=3, judge=named(brightness))
    assert_equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def named(judge: Any) -> Any:
    """Of one name, or it would be another run's."""

    def rewarding(pictures: torch.Tensor, prompts: list[str]) -> list[float]:
        return judge(pictures, prompts)

    return rewarding


def test_random_numbers_and_gradients_stay_the_callers(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    def state() -> tuple[Any, list[int], list[int]]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = state()
    with torch.no_grad():
        run(saved, pairs, "diffusion-dpo", tmp_path / "first", steps=1)
        assert not torch.is_grad_enabled()
    assert state() == before
    torch.rand(7), np.random.rand(3), random.random()
    with torch.inference_mode():
        run(saved, pairs, "diffusion-dpo", tmp_path / "second", steps=1)
        assert torch.is_inference_mode_enabled()
    assert_equal(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_random_numbers_are_looked_at_after_accelerate_has_begun(
    saved: Saved, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, every process of a machine would take hold of the first GPU, whose generator it would ask for its state."""
    order: list[str] = []
    for module, name in ((training, "start_accelerator"), (random_state, "get_random_state")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, own=own, name=name: order.append(name) or own(*given))
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=1)
    assert order[:2] == ["start_accelerator", "get_random_state"]


def test_it_runs_in_a_thread(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(saved, pairs, "diffusion-dpo", tmp_path / "run"), kwargs={"steps": 1})
    thread.start()
    thread.join()
    assert weights(tmp_path / "run")


def test_a_failed_run_leaves_no_thread(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    def fails(pictures: torch.Tensor, prompts: list[str]) -> list[float]:
        raise RuntimeError("no judgement")

    left = []
    for name in "ab":
        with pytest.raises(RuntimeError, match="no judgement"):
            run(saved, pairs, "d3po", tmp_path / name, steps=1, judge=fails, tracker="tensorboard")
        left.append(threading.active_count())
    assert left[0] == left[1]


def test_to_resume_and_to_overwrite_are_two_wishes(saved: Saved, pairs: Path, tmp_path: Path) -> None:
    run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=1)
    there = files(tmp_path / "run")
    with pytest.raises(UserError, match="ask for one of them"):
        run(saved, pairs, "diffusion-dpo", tmp_path / "run", steps=1, resume=True, overwrite=True)
    with pytest.raises(UserError, match="ask for one of them"):
        train_writer("prompt-sft", recipe="tiny", output=tmp_path / "run", resume=True, overwrite=True)
    assert files(tmp_path / "run") == there


def given(**options: Any) -> dict[str, Any]:
    return {"recipe": "tiny", "output": "never", "progress": False, **options}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("diffusion-dop", {}, "No objective is called 'diffusion-dop'. Did you mean 'diffusion-d"),
        ("diffusion-dpo", {"seed": -1}, "seed: should be from 0"),
        ("diffusion-dpo", {"tracker": "nonsense"}, "tracker is 'nonsense'; Accelerate knows"),
        ("diffusion-dpo", {"pairs": Dataset.from_dict({"prompt": ["a"]})}, "pairs was given a Dataset.*save data first"),
        ("d3po", {"judge": "oracle"}, "judge is a judge, or a function.*'oracle'"),
        ("d3po", {"judge": brightness, "reward": "oracle"}, "give one of them"),
    ],
    ids=["objective", "seed", "tracker", "data in memory", "no function", "two judges"],
)
def test_a_mistake_is_told_before_anything_is_made(
    name: str, options: dict, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        align(name, **given(**options))
    assert not list(tmp_path.iterdir())


def test_paths_may_be_paths_and_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    options = {"model": Path("tiny"), "pairs": Path("~/pairs.jsonl"), "output": "~/runs", "cache": "~/cache"}
    settings = config.resolve(config.placed(options, DiffusionDPO), DiffusionDPO)
    assert (settings.model, settings.pairs) == ("tiny", "/somewhere/pairs.jsonl")
    assert (settings.output, settings.data.cache) == (Path("/somewhere/runs"), Path("/somewhere/cache"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check("pairs.csv"), UserError, r"opened by open_pairs\(...\); got 'pairs.csv'"),
        (lambda: contact_sheet("pairs.csv"), UserError, r"opened by open_pairs\(...\); got 'pairs.csv'"),
        (lambda: compare("scores.csv", baseline="low"), UserError, r"as scoring.read_table\(FILE\) .* got 'scores.csv'"),
        (lambda: as_prompts(None), UserError, "Prompts are a string or a list of strings; got None"),
        (lambda: a_judge().score(PICTURE, PICTURE), JudgeError, r"a prompt is a string, .* got Image \(pictures come first\)"),
        (lambda: a_judge().score(PICTURE, 5), JudgeError, "a prompt is a string, or there is a list of them; got int"),
        (lambda: a_judge().differentiable_score(PICTURE, "x"), JudgeError, "are of a float tensor .* got Image"),
        (lambda: a_judge().score("nope.png", "x"), JudgeError, "there is no picture or folder nope.png"),
        (
            lambda: a_judge().score("https://x.y/z.png", "x"),
            JudgeError,
            "https://x.y/z.png is an address; pictures are read from",
        ),
        (lambda: a_judge().score([PICTURE, "https://x.y/z.png"], "x"), JudgeError, "is an address"),
    ],
)
def test_a_wrong_kind_of_thing_is_told_by_name(call: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_data_in_memory_are_no_place() -> None:
    with pytest.raises(UserError, match="got a Dataset. Save it first"):
        open_pairs(Dataset.from_dict({"prompt": ["a"]}))


# -------------------------------------------------------------------------------------------------------------- judges


def pictures(n: int = 4) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (20 * i, 0, 0)) for i in range(n)]


class Own(PointwiseJudge):
    info = RewardInfo("own", needs_prompt=False)

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def score_prepared(self, prepared: Any, prompts: Any) -> Any:
        return self.answer(len(prepared))


@pytest.mark.parametrize(
    "answer", [torch.ones, lambda n: torch.ones(n, 1), lambda n: [1.0] * n, np.ones], ids=["n", "n x 1", "list", "array"]
)
def test_scores_of_ones_own_judge_in_any_form(answer: Any) -> None:
    assert torch.equal(Own(answer).score(pictures()), torch.ones(4))


@pytest.mark.parametrize(
    "answer", [lambda n: torch.zeros(1), lambda n: torch.zeros(n, 2), lambda n: 0.5], ids=["1", "n x 2", "()"]
)
def test_another_number_of_scores_is_no_answer(answer: Any) -> None:
    with pytest.raises(JudgeError, match=r"the judge 'own' gave scores \[.*\] for 4 pictures; give one each"):
        Own(answer).score(pictures())


def test_of_a_judge_that_does_not_say_what_it_is_nothing_is_kept(tmp_path: Path) -> None:
    """Its code may be another in the next cell."""
    for value in (1.0, 2.0):
        judge = Own(lambda n, value=value: torch.full((n,), value))
        assert judge.score(pictures(), cache=tmp_path / "c.sqlite").tolist() == [value] * 4
    known = Own(torch.ones)
    known.made_of = {"version": 1}
    assert known.score(pictures(), cache=tmp_path / "c.sqlite").tolist() == [1.0] * 4
    known.answer = torch.zeros
    assert known.score(pictures(), cache=tmp_path / "c.sqlite").tolist() == [1.0] * 4
    assert reward_models.load("jpeg").says_what_it_is


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
        (torch.full((2, 3, 32, 32), 255.0), "go from 255.00 to 255.00"),
        (torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32), "go from -1.00 to 1.00"),
        (torch.zeros(3, 32, 32), r"got torch.float32 \[3, 32, 32\]"),
        (pictures(2), "got list"),
    ],
    ids=["bytes", "floats of bytes", "a decoder's", "one picture", "PIL"],
)
def test_gradients_reach_pixels_between_0_and_1_only(pixels: Any, told: str) -> None:
    judge = reward_models.load("tiny-pickscore")
    with pytest.raises(JudgeError, match=told):
        judge.differentiable_score(pixels, "a red star")
    slightly = torch.linspace(-0.1, 1.1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).requires_grad_()
    judge.differentiable_score(slightly, "a red star").sum().backward()
    assert slightly.grad.abs().sum() > 0


def test_one_prompt_is_one_prompt_and_a_batch_has_pictures() -> None:
    judge = reward_models.load("jpeg")
    assert judge.matrix(pictures(), "a red star").shape == (4, 1)
    for wrong in (0, -1):
        with pytest.raises(JudgeError, match="batch_size"):
            judge.score(pictures(), batch_size=wrong)
    with pytest.raises(JudgeError, match="there is no device 'gpu'"):
        reward_models.load("tiny-pickscore", device="gpu")


def test_prompts_are_strings() -> None:
    """An empty cell of a table is a NaN in pandas."""
    with pytest.raises(JudgeError, match="prompt 2 of 4 is no string: nan"):
        reward_models.load("tiny-pickscore").score(pictures(), ["a red star", float("nan"), "b", "c"])
    optimizer = PromptOptimizer.from_pretrained("tiny", embedding=None)
    with pytest.raises(UserError, match="Prompt 2 of 2 is no string: None"):
        optimizer(["a red star", None])
    with pytest.raises(UserError, match="Prompt 1 of 1 is no string: 3"):
        generate("tiny", [3], "nowhere", load=load_pipeline)
    of_prompts, of_strings = (optimizer([kind("a red star")], max_rewrite_tokens=8, seed=1) for kind in (Prompt, str))
    assert [r.text for r in of_prompts[0]] == [r.text for r in of_strings[0]]


# ---------------------------------------------------------------------------------------------------- pictures, rewrites


def test_pictures_that_are_there_stay_until_there_are_others(tmp_path: Path) -> None:
    folder, how = tmp_path / "pictures", {"load": load_pipeline, "steps": 2}
    assert len(generate("tiny", "a small red star", folder, images_per_prompt=2, **how)["pictures"]) == 2
    there = files(folder)
    for wrong in ({"nsteps": 2}, {"steps": 0}, {"batch_size": 0}, {"images_per_prompt": 0}, {"seed": -1}):
        with pytest.raises((UserError, TypeError)):
            generate("tiny", ["a red star"], folder, overwrite=True, **{**how, **wrong})
    with pytest.raises(UserError, match="no prompts"):
        generate("tiny", [], folder, overwrite=True, **how)
    assert files(folder) == there
    generate("tiny", ["a red star"], folder, overwrite=True, **how)
    assert there.keys() - files(folder).keys() == {"00001.png"}


def test_a_stream_of_one_prompt() -> None:
    optimizer = PromptOptimizer.from_pretrained("tiny", embedding=None)
    assert len(list(optimizer.stream("a red star", max_rewrite_tokens=8))) == 1
    with pytest.raises(UserError, match="chunk"):
        list(optimizer.stream(["a red star"], chunk=0))


# ------------------------------------------------------------------------------------------------------------ the shell


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["score", "pictures", "--judges", "jpeg", "--out", "t.csv", "--plot", "w.png"], "nothing to be compared with"),
        (["rank", "pictures", "--judges", "jpeg", "--sheet", "s.txt"], "--sheet is a picture, a .png"),
        (["generate", "--model", "tiny", "--prompt", "a", "--out", "new", "--device", "gpu"], "there is no device 'gpu'"),
    ],
    ids=["a plot of one", "a sheet of text", "no device"],
)
def test_a_command_refuses_in_a_paragraph(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    pictures(1)[0].save(tmp_path / "pictures" / "a.png")
    assert cli.main(words) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
