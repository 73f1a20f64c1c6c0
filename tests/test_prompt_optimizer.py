"""A writer at work: different rewrites, the cap on drift, judges that choose, in front of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_writer_material import writer
from test_writer_sampling import biased

import reward_models
from diffalign.errors import UserError
from pipelines import families
from pipelines.semantics import distance, load_embedding
from pipelines.writers.optimizer import PromptOptimizer
from pipelines.writers.rewrite_scorer import DrawingSettings, RewriteScorer, lost_by
from pipelines.writers.rewriting import rewrite_file, to_text
from pipelines.writers.writer import Writer

SHORT = {"max_rewrite_tokens": 6}


@pytest.fixture(scope="module")
def optimizer() -> PromptOptimizer:
    return PromptOptimizer(writer("gpt2", template="rephrase", context=400), load_embedding("tiny"))


def test_one_prompt_gives_a_list_and_several_a_list_of_lists(optimizer: PromptOptimizer) -> None:
    alone = optimizer("a cat", n=3, **SHORT)
    among = optimizer(["a red circle", "a cat"], n=3, **SHORT)
    assert 1 <= len(alone) <= 3 and [r.text for r in among[1]] == [r.text for r in alone]
    assert len({r.text for r in alone}) == len(alone)
    measured = distance(optimizer.embedding, ["a cat"] * len(alone), [r.text for r in alone])
    assert [r.distance for r in alone] == pytest.approx(measured.tolist(), abs=1e-6)


def test_the_same_seed_gives_the_same_rewrites(optimizer: PromptOptimizer) -> None:
    once, again, other = (optimizer("a cat", n=4, seed=s, **SHORT) for s in (1, 1, 2))
    assert once == again and [r.text for r in once] != [r.text for r in other]


def test_nothing_goes_beyond_the_cap(optimizer: PromptOptimizer) -> None:
    free = optimizer("a red circle", n=8, **SHORT)
    cap = sorted(r.distance for r in free)[3]
    capped = optimizer("a red circle", n=8, draw=8, max_distance=cap, **SHORT)
    assert [r.text for r in capped] == [r.text for r in free if r.distance <= cap] and len(capped) < len(free)
    nothing_left = optimizer("a red circle", n=2, max_distance=0.0, **SHORT)
    assert [(r.text, r.distance, r.unchanged) for r in nothing_left] == [("a red circle", 0.0, True)]


def test_a_truncated_rewrite_says_so(optimizer: PromptOptimizer) -> None:
    (short,) = optimizer("a cat", **SHORT)
    assert short.truncated and type(short.text) is str
    assert "truncated" in to_text([[short]]) and "truncated" not in to_text([[replace(short, truncated=False)]])
    assert not PromptOptimizer(ends_at_once())("a cat", **SHORT)[0].truncated


def ends_at_once() -> Writer:
    """It leaves every prompt as it is."""
    made = writer("gpt2", template="rephrase", context=1000)
    return biased(made, **{f"t{made.tokenizer.eos_token_id}": 50.0})


def test_what_the_generator_does_not_read_is_told() -> None:
    pipe = families.load_pipeline("tiny")
    long = "a red circle on a white background, " + ", ".join(["vivid"] * 60)
    (lost,) = lost_by(pipe, [long])
    assert lost.endswith("vivid") and lost_by(pipe, ["a red circle", long]) == ["", lost] and lost_by(object(), [long]) == [""]
    scorer = RewriteScorer(pipe, {"oracle": reward_models.load("oracle")}, DrawingSettings(steps=1, guidance_scale=1.0))
    chosen = PromptOptimizer(ends_at_once(), None, scorer)
    assert chosen(long, draw=1, **SHORT)[0].lost == lost  # no embedding is needed to know
    assert PromptOptimizer(chosen.writer).before(lambda prompt: prompt.upper())("a cat") == "A CAT"
    with pytest.warns(UserWarning, match="does not read the end"):
        PromptOptimizer(chosen.writer).before(_Deaf(pipe.tokenizer))(long)


class _Deaf:
    """A pipeline that only says what it was asked to draw."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, prompt: str) -> str:
        return prompt


def test_judges_put_the_best_first() -> None:
    drawing = DrawingSettings(steps=2, guidance_scale=2.0)
    scorer = RewriteScorer(families.load_pipeline("tiny"), {"oracle": reward_models.load("oracle")}, drawing)
    chosen = PromptOptimizer(writer("gpt2", template="rephrase"), None, scorer)
    found = chosen(["a red circle", "a blue square"], n=4, draw=4, **SHORT)
    for rewrites in found:
        scores = [r.scores["oracle"] for r in rewrites]
        assert scores == sorted(scores, reverse=True) and len(scores) > 1
        expected = scorer.scores([r.prompt for r in rewrites], [r.text for r in rewrites])["oracle"]
        assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    best = chosen("a red circle", n=1, draw=4, **SHORT)
    assert best[0].text == found[0][0].text


def test_a_long_list_comes_as_a_stream(optimizer: PromptOptimizer) -> None:
    prompts = [f"a cat {k}" for k in range(7)]
    streamed = optimizer.stream(iter(prompts), chunk=3, n=2, **SHORT)
    first = next(streamed)
    assert texts([first]) == texts([optimizer(prompts[0], n=2, **SHORT)])
    assert texts([first, *streamed]) == texts(optimizer(prompts, n=2, **SHORT))


def test_a_stream_counts_its_prompts(optimizer: PromptOptimizer) -> None:
    told: list[tuple[str, int, int]] = []
    prompts = [f"a cat {k}" for k in range(5)]
    assert len(list(optimizer.stream(prompts, 2, lambda *said: told.append(said), **SHORT))) == 5
    assert told == [("rewriting", 2, 5), ("rewriting", 4, 5), ("rewriting", 5, 5)]


def test_a_prompt_that_cannot_be_rewritten_stays_where_it_is(optimizer: PromptOptimizer) -> None:
    found = optimizer(["a cat", "word " * 400, "a red star", " "], strict=False, n=2, **SHORT)
    alone = optimizer(["a cat", "a red star"], n=2, **SHORT)
    assert texts([found[0], found[2]]) == texts(alone)
    (long,), (empty,) = found[1], found[3]
    assert long.unchanged and "takes" in long.problem and long.text == ("word " * 400).strip()
    assert empty.problem == "prompt is empty" and empty.text == ""
    assert "cannot be rewritten: prompt is empty" in to_text(found)
    assert optimizer([" "], strict=False)[0][0].problem


def test_a_file_of_prompts(optimizer: PromptOptimizer, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na red star\n")
    expected = texts(optimizer(["a cat", "a red star"], n=2, **SHORT))
    assert texts(optimizer(file, n=2, **SHORT)) == expected
    listed = tmp_path / "prompts.jsonl"
    listed.write_text('{"prompt": "a cat"}\n{"prompt": ""}\n{"prompt": "a red star"}\n')
    found = optimizer(listed, n=2, strict=False, **SHORT)
    assert texts([found[0], found[2]]) == expected and found[1][0].problem == "prompt is empty"
    with pytest.raises(UserError, match="prompts.jsonl, line 2, column 'prompt': the prompt is empty"):
        optimizer(listed, n=2, **SHORT)
    with pytest.raises(UserError, match="is a file. Its prompts are rewritten by Path"):
        optimizer(str(file))


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_file_becomes_another_and_goes_on_after_a_break(optimizer: PromptOptimizer, tmp_path: Path, ending: str) -> None:
    file, whole, cut = tmp_path / "prompts.txt", tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
    file.write_text("".join(f"a cat {k}\n" for k in range(5)) + "word " * 400 + "\n")
    options = {"n": 2, "chunk": 2, **SHORT}
    came = rewrite_file(optimizer, file, whole, **options)
    assert (came.prompts, came.left, came.rewrites) == (6, 1, 11) and "1 prompts could not be rewritten" in came.to_text()
    told: list[tuple[int, int]] = []

    def dying(stage: str, done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite_file(optimizer, file, cut, progress=dying, **options)
    part = tmp_path / f"cut{ending}.part"
    part.write_bytes(part.read_bytes()[:-9])  # the last line was not written to its end
    assert not cut.exists()
    with pytest.raises(UserError, match="is what is left of rewriting other prompts, or by another writer or other settings"):
        rewrite_file(optimizer, file, cut, seed=3, **options)
    with pytest.raises(UserError, match="is what is left of rewriting"):  # other company, other last digits
        rewrite_file(optimizer, file, cut, **{**options, "chunk": 3})
    rewrite_file(optimizer, file, cut, progress=dying, **options)
    assert told == [(2, 6), (4, 6), (4, 6), (6, 6)]  # twice two prompts done, the second time lost
    assert cut.read_bytes() == whole.read_bytes() and not part.exists()
    with pytest.raises(UserError, match="is there already"):
        rewrite_file(optimizer, file, cut, **options)


def texts(found) -> list[list[str]]:
    return [[rewrite.text for rewrite in rewrites] for rewrites in found]


def test_in_front_of_a_pipeline(optimizer: PromptOptimizer) -> None:
    seen = []

    class Pipeline:
        def __call__(self, prompt, steps=1):
            seen.append((prompt, steps))
            return prompt

    pipe = optimizer.before(Pipeline(), seed=3, **SHORT)
    text = optimizer("a cat", seed=3, **SHORT)[0].text
    assert pipe("a cat", steps=4) == text and pipe(["a cat", "a cat"]) == [text, text]
    assert seen == [(text, 4), ([text, text], 1)]


def test_what_the_text_encoder_does_not_read_is_told(optimizer: PromptOptimizer) -> None:
    prompt = "a small red circle left of a large blue square on a white background, " + "very " * 30 + "vivid"
    (kept,) = optimizer(prompt, max_distance=0.0, **SHORT)
    assert kept.unchanged and kept.lost.endswith("vivid") and "circle" not in kept.lost


def test_from_a_folder(tmp_path: Path) -> None:
    made = writer("gpt2", template="rephrase")
    made.save(tmp_path / "w")
    loaded = PromptOptimizer.from_pretrained(tmp_path / "w", embedding=None)
    assert [r.text for r in loaded("a cat", n=3, **SHORT)] == [r.text for r in PromptOptimizer(made)("a cat", n=3, **SHORT)]
    with pytest.raises(UserError, match="give both, or neither"):
        PromptOptimizer.from_pretrained(tmp_path / "w", embedding=None, generator="tiny")


def test_mistakes_are_said(optimizer: PromptOptimizer) -> None:
    with pytest.raises(UserError, match="A cap on the distance needs an embedding"):
        PromptOptimizer(optimizer.writer)("a cat", max_distance=0.1)
    with pytest.raises(UserError, match="max_distance is a cosine distance, between 0 and 2; got 3"):
        optimizer("a cat", max_distance=3)
    with pytest.raises(UserError, match="Decoding has no option 'temprature'; its options are how, temperature, top_p"):
        optimizer("a cat", temprature=0.7)
    with pytest.raises(UserError, match="4 rewrites cannot be chosen from 2 candidates"):
        optimizer("a cat", n=4, draw=2)
    with pytest.raises(UserError, match="A prompt cannot be rewritten: prompt is empty"):
        optimizer("  ")
    with pytest.raises(UserError, match="Prompt 2 of 3 cannot be rewritten: prompt is empty. So it is with 2 of 3 prompts"):
        optimizer(["a cat", "  ", ""])
    with pytest.raises(UserError, match="strict=False, or --prompts FILE on the command line, leaves such prompts as they are"):
        optimizer(["a cat", "  "])
    with pytest.raises(UserError, match="Prompt 1 of 1 holds half of a surrogate pair"):
        optimizer("half \ud83d")
    with pytest.raises(UserError, match="takes .* tokens"):
        optimizer("word " * 400)
