"""Samples are draws from the model's own distribution, whatever stands beside them; beams are Transformers' and the paper's."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from test_writer_material import CHATML, PROMPTS, writer
from torch import Tensor, nn

from diffalign.errors import UserError
from pipelines.writers.sampling import Decoding, GumbelNoise, Hamming, candidates
from pipelines.writers.writer import Writer

HOWS = ("sample", "beam", "diverse-beam")
KINDS = ("gpt2", "llama", "qwen2")


def biased(written: Writer, **bias: float) -> Writer:
    """With a bias on some outputs, by ``t`` and their id: what this model would say becomes what a test needs."""
    old = written.model.get_output_embeddings()
    head = nn.Linear(old.in_features, old.out_features)
    head.weight.data, head.bias.data = old.weight.data.clone(), torch.zeros(old.out_features)
    for name, value in bias.items():
        head.bias.data[int(name[1:])] = value
    written.model.set_output_embeddings(head)
    written.model.config.tie_word_embeddings = False
    return written


@torch.no_grad()
def next_log_probs(written: Writer, ids: list[int]) -> Tensor:
    """[V] float64, by a call without cache or padding."""
    return written.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(dim=0)


def kept(log_p: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [V] after temperature, then the ``top_k`` likeliest, then the fewest that make up ``top_p``."""
    p = (log_p / temperature).softmax(dim=0)
    order = p.argsort(descending=True)[: top_k or None]
    share = p[order] / p[order].sum()
    order = order[(share.cumsum(0) - share) < top_p]
    out = torch.zeros_like(p)
    out[order] = p[order] / p[order].sum()
    return out


def surprise(drawn: Counter[str], expected: Counter[str]) -> float:
    """p-value of a chi-square test; what is expected fewer than five times is put together."""
    assert set(drawn) <= set(expected)
    total = sum(drawn.values())
    common = [text for text in expected if expected[text] * total >= 5]
    pairs = [(drawn[text], expected[text] * total) for text in common]
    pairs.append((total - sum(a for a, _ in pairs), total - sum(b for _, b in pairs)))
    observed, wanted = zip(*[pair for pair in pairs if pair[1] > 1e-6], strict=True)
    assert len(observed) >= 4
    return chisquare(observed, wanted).pvalue


# ------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (3.0, 0, 1.0), (1.0, 6, 1.0), (3.0, 0, 0.6), (2.0, 40, 0.8)], ids=str
)
def test_first_tokens_are_drawn_from_the_warped_distribution(temperature: float, top_k: int, top_p: float) -> None:
    made, n = writer("qwen2"), 3000
    encoding = made.encoding()
    p = kept(next_log_probs(made, encoding.prompt("a cat")), temperature, top_k, top_p)
    expected: Counter[str] = Counter()
    for token in p.nonzero()[:, 0].tolist():
        expected[encoding.text([token]) or "a cat"] += float(p[token])
    warp = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawn = Counter(candidates(made, ["a cat"], n, Decoding(**warp, max_rewrite_tokens=1), seed=3, batch_size=1000)[0])
    assert surprise(drawn, expected) > 0.01


def test_second_tokens_follow_from_the_first_and_from_noise_of_their_own() -> None:
    made, n = writer("gpt2"), 3000
    encoding = made.encoding()
    prompt = encoding.prompt("a cat")
    first = kept(next_log_probs(made, prompt), 2.0, 6, 1.0)
    expected: Counter[str] = Counter()
    for token in first.nonzero()[:, 0].tolist():
        second = kept(next_log_probs(made, [*prompt, token]), 2.0, 6, 1.0)
        for other in second.nonzero()[:, 0].tolist():
            expected[encoding.text([token, other]) or "a cat"] += float(first[token] * second[other])
    assert len(expected) > 10
    drawn = candidates(made, ["a cat"], n, Decoding(max_rewrite_tokens=2, temperature=2.0, top_k=6), seed=4, batch_size=1000)[0]
    assert surprise(Counter(drawn), expected) > 0.01


def test_candidates_follow_from_seed_prompt_and_number() -> None:
    made = writer(template="rephrase")
    decoding = Decoding(max_rewrite_tokens=10)
    drawn = candidates(made, PROMPTS, 4, decoding, seed=1)
    assert candidates(made, PROMPTS, 4, decoding, seed=1) == drawn
    assert candidates(made, PROMPTS[1:2], 2, decoding, seed=1) == [drawn[1][:2]]
    assert candidates(made, PROMPTS, 4, decoding, seed=2) != drawn
    assert len(set(drawn[0])) == 4
    torch.manual_seed(99)  # nobody's global state matters, and it is not touched
    assert candidates(made, PROMPTS, 4, decoding, seed=1) == drawn
    after = torch.rand(1)
    torch.manual_seed(99)
    assert torch.rand(1) == after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOWS)
def test_company_changes_nothing(kind: str, how: str) -> None:
    """Whatever stands beside a prompt in a batch, and however long it is."""
    made = writer(kind, begin=kind == "llama", chat=CHATML if kind == "qwen2" else None, context=256)
    settings = {"n": 3, "decoding": Decoding(how, max_rewrite_tokens=12)}
    together = candidates(made, PROMPTS, batch_size=64, **settings)
    assert together == [candidates(made, [prompt], batch_size=1, **settings)[0] for prompt in PROMPTS]
    assert together[::-1] == candidates(made, PROMPTS[::-1], batch_size=5, **settings)
    assert len({text for texts in together for text in texts}) > 3


# --------------------------------------------------------------------------------------------------------------- beams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length_penalty", [1.0, -1.0])
def test_beams_are_those_of_transformers(kind: str, length_penalty: float) -> None:
    made = biased(writer(kind, begin=True), t1=4.0)  # rewrites end at different lengths
    encoding = made.encoding()
    ours = candidates(made, PROMPTS, 3, Decoding("beam", beams=5, length_penalty=length_penalty, max_rewrite_tokens=8))
    assert ours != candidates(made, PROMPTS, 3, Decoding("beam", beams=5, length_penalty=-length_penalty, max_rewrite_tokens=8))
    for prompt, texts in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([encoding.prompt(prompt)])
        theirs = made.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=5,
            num_return_sequences=3,
            length_penalty=length_penalty,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )
        assert texts == [encoding.text(row) or prompt for row in theirs[:, ids.shape[1] :].tolist()]


def test_one_group_without_diversity_is_beam_search() -> None:
    made = writer("llama")
    beam = candidates(made, PROMPTS, 4, Decoding("beam", max_rewrite_tokens=8))
    assert candidates(made, PROMPTS, 4, Decoding("diverse-beam", groups=1, diversity_penalty=0.0, max_rewrite_tokens=8)) == beam


def diverse_greedy(made: Writer, prompt: str, groups: int, diversity: float, steps: int) -> list[list[int]]:
    """The paper's algorithm 1 with one beam per group, in step, without cache: [groups][steps]."""
    start = made.encoding().prompt(prompt)
    beams: list[list[int]] = [[] for _ in range(groups)]
    for step in range(steps):
        for g in range(groups):
            scores = next_log_probs(made, start + beams[g])
            for earlier in beams[:g]:
                scores[earlier[step]] -= diversity
            beams[g].append(int(scores.argmax()))
    return beams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("diversity", [0.5, 2.0])
def test_diverse_beams_are_the_papers(kind: str, diversity: float) -> None:
    """By an end mark that is never likely, so that all run as long."""
    made = biased(writer(kind), t1=-1e4)
    encoding = made.encoding()
    ours = candidates(made, PROMPTS, 4, Decoding("diverse-beam", diversity_penalty=diversity, max_rewrite_tokens=7))
    for prompt, texts in zip(PROMPTS, ours, strict=True):
        theirs = diverse_greedy(made, prompt, 4, diversity, 7)
        assert texts == [encoding.text(beam) or prompt for beam in theirs]


def test_groups_of_several_beams_put_the_best_of_each_first() -> None:
    made = writer("qwen2")
    decoding = Decoding("diverse-beam", beams=6, groups=3, max_rewrite_tokens=8)
    six = candidates(made, PROMPTS, 6, decoding)
    first_group = candidates(made, PROMPTS, 2, Decoding("beam", max_rewrite_tokens=8))
    assert [[texts[0], texts[3]] for texts in six] == first_group
    assert candidates(made, PROMPTS, 4, decoding) == [texts[:4] for texts in six]


def test_the_penalty_makes_more_different_candidates() -> None:
    made = writer("gpt2")

    def different(diversity: float) -> int:
        found = candidates(made, PROMPTS, 6, Decoding("diverse-beam", diversity_penalty=diversity, max_rewrite_tokens=3))
        return sum(len(set(texts)) for texts in found)

    assert different(0.0) == len(PROMPTS)  # every group finds the same
    assert different(0.0) < different(0.1) < different(3.0)


def test_the_penalty_counts_beams_at_the_same_place_only() -> None:
    earlier = [[[5, 6], [5, 7]], [[8]]]
    penalty = Hamming(earlier, width=2, penalty=0.5, begin=3)
    scores = torch.zeros(4, 10)
    first = penalty(torch.zeros(4, 3, dtype=torch.int64), scores)
    assert first[0].tolist() == first[1].tolist() == [0, 0, 0, 0, 0, -1.0, 0, 0, 0, 0]
    assert first[2].tolist() == first[3].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, -0.5, 0]
    second = penalty(torch.zeros(4, 4, dtype=torch.int64), scores)
    assert second[0].tolist() == [0, 0, 0, 0, 0, 0, -0.5, -0.5, 0, 0]
    assert not second[2:].any()
    assert not penalty(torch.zeros(4, 5, dtype=torch.int64), scores).any()


# -------------------------------------------------------------------------------------------------- what comes with it


def test_noise_is_gumbels() -> None:
    """Mean Euler's constant, variance pi squared over six; and none where a row has ended."""
    noise = GumbelNoise(0, [("a", 0), ("b", 0)], ends=[1])
    scores = torch.zeros(2, 200_000)
    first = noise(torch.tensor([[7], [1]]), scores)  # an end mark in a prompt ends nothing
    assert abs(first.mean() - 0.57722) < 0.01 and abs(first.var() - 1.64493) < 0.02
    assert not torch.equal(first[0], first[1])
    second = noise(torch.tensor([[7, 5], [1, 1]]), scores)
    assert second[0].std() > 1 and not torch.equal(first[0], second[0])
    assert not second[1].any()


@pytest.mark.parametrize("how", HOWS)
def test_the_models_own_generation_settings_stay_out_of_it(how: str) -> None:
    made, other = writer("llama"), writer("llama")
    settings = other.model.generation_config
    settings.repetition_penalty, settings.temperature, settings.min_new_tokens, settings.do_sample = 9.0, 0.1, 7, True
    settings.forced_eos_token_id = 5
    found = [candidates(one, PROMPTS, 3, Decoding(how, max_rewrite_tokens=8)) for one in (made, other)]
    assert found[0] == found[1]
    assert other.model.generation_config is settings


@pytest.mark.parametrize("how", HOWS)
def test_an_empty_rewrite_is_the_prompt(how: str) -> None:
    made = biased(writer("llama"), t1=1e4)
    assert candidates(made, [" a  cat", "a dog"], 1, Decoding(how)) == [["a cat"], ["a dog"]]


def test_writing_stops_at_either_mark() -> None:
    """In a chat the turn's mark and the tokenizer's are both an end."""
    made = writer("qwen2", chat=CHATML, context=256)
    long = Decoding(max_rewrite_tokens=30)
    free = candidates(biased(writer("qwen2", chat=CHATML, context=256), t1=-1e4, t3=-1e4), ["a cat"], 8, long)[0]
    for mark in ("t1", "t3"):
        stopped = candidates(biased(made, **{"t1": -1e4, "t3": -1e4, mark: 6.0}), ["a cat"], 8, long)[0]
        assert sum(map(len, stopped)) < sum(map(len, free)) / 2


@pytest.mark.parametrize("mark", ["t1", "t3"])
@pytest.mark.parametrize("how", HOWS)
def test_nothing_is_computed_after_the_end(how: str, mark: str) -> None:
    made = biased(writer("qwen2", chat=CHATML, context=256), **{mark: 1e4})
    calls: list[int] = []
    made.model.register_forward_pre_hook(lambda *_: calls.append(1))
    candidates(made, ["a cat"], 2, Decoding(how, groups=1 if how == "diverse-beam" else None, max_rewrite_tokens=30))
    assert len(calls) < 5


@pytest.mark.parametrize("how", HOWS)
def test_outputs_without_a_token_are_never_written(how: str) -> None:
    """Qwen's models have 271 more outputs than their tokenizer has tokens."""
    made = writer("qwen2", extra=20)
    first = len(made.tokenizer)
    decoding = Decoding(how, max_rewrite_tokens=8)
    plain = candidates(made, PROMPTS, 3, decoding)
    tempted = candidates(biased(made, **{f"t{i}": 50.0 for i in range(first, first + 20)}), PROMPTS, 3, decoding)
    if how == "sample":
        assert tempted == plain  # what remains is as likely as before
    assert all(text != prompt for prompt, texts in zip(PROMPTS, tempted, strict=True) for text in texts)


def test_repeats_stay_and_order_is_kept() -> None:
    made = writer()
    asked = [PROMPTS[1], PROMPTS[0], PROMPTS[1], f"  {PROMPTS[0]} "]
    found = candidates(made, asked, 2, Decoding(max_rewrite_tokens=8))
    assert found[0] == found[2] and found[1] == found[3] and found[0] != found[1]
    assert found[0] is not found[2]
    (cold,) = candidates(made, ["a cat"], 3, Decoding(temperature=1e-4, max_rewrite_tokens=8))
    assert cold.count(found[1][0]) in (0, 3) and len(set(cold)) == 1
    assert candidates(made, [], 2) == []


def test_a_lora_in_training_writes_without_its_dropout_and_goes_on_training() -> None:
    made = writer("llama")
    made.attach_lora(rank=4, dropout=0.5)
    for parameter in made.trainable_parameters():
        nn.init.normal_(parameter, std=0.5)
    assert candidates(made, PROMPTS, 2, seed=1) == candidates(made, PROMPTS, 2, seed=1)
    assert made.model.training
    with made.adapter_off():
        before = candidates(made, PROMPTS, 2, seed=1)
    assert before == candidates(writer("llama"), PROMPTS, 2, seed=1) != candidates(made, PROMPTS, 2, seed=1)


@pytest.mark.parametrize("how, batch_size", list(product(HOWS, (1, 4, 64))))
def test_progress_counts_rewrites(how: str, batch_size: int) -> None:
    told: list[tuple[str, int, int]] = []
    decoding = Decoding(how, max_rewrite_tokens=3)
    candidates(writer(), PROMPTS, 3, decoding, batch_size=batch_size, progress=lambda *numbers: told.append(numbers))
    assert {(stage, total) for stage, _, total in told} == {("writing", 9)}
    done = [number for _, number, _ in told]
    assert done == sorted(set(done)) and done[-1] == 9


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"how": "greedy"}, "Rewrites are looked for by sample, beam, diverse-beam; got 'greedy'."),
        ({"n": 0}, "The number of candidates must be at least 1; got 0."),
        ({"temperature": 0.0}, "Sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0 (0 is all); got temperature 0.0"),
        ({"temperature": 0.0}, "top_k 0. Greedy decoding is a beam of one: --way beam -n 1."),
        ({"top_p": 1.5}, "got temperature 1.0, top_p 1.5"),
        ({"top_k": -1}, "top_k -1"),
        ({"how": "beam", "beams": 2}, "2 beams cannot give 3 candidates"),
        ({"how": "diverse-beam", "beams": 4, "groups": 3}, "4 beams cannot be split into 3 groups of equal size"),
        ({"diversity_penalty": -0.5}, "diversity_penalty must be at least 0; got -0.5"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"max_rewrite_tokens": 128}, "max_rewrite_tokens 128 leaves no room for a prompt"),
        ({"max_rewrite_tokens": 125}, "leaves 124 for a rewrite of up to 125: 'a cat'"),
        ({"max_prompt_tokens": 2}, "2 are allowed (max_prompt_tokens): 'a cat'"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    if "how" not in settings:
        Decoding().checked(3)
    with pytest.raises(UserError) as error:
        of_call = {name: value for name, value in settings.items() if name in ("n", "batch_size", "max_prompt_tokens")}
        decoding = Decoding(**{name: value for name, value in settings.items() if name not in of_call})
        candidates(writer(), ["a cat"], decoding=decoding, **({"n": 3} | of_call))
    assert message in str(error.value)
