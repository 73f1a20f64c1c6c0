"""Sem-DPO and SFT of prompt writers: against TRL's own numbers, and the identities that no released code can give."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_losses import Numbers, Tokens, cases, variants, wpo_weight
from torch import Tensor, nn

from diffalign.data.texts import EncodedRewrites, Ragged, TextLoader, collate, validation_batches
from diffalign.errors import UserError
from diffalign.learner import TextRunContext
from diffalign.likelihood import token_log_probs
from diffalign.losses.baselines import RunningMean
from diffalign.objectives._family import ScaledLoss
from diffalign.objectives._tokens import Counting, TokenLosses
from diffalign.objectives.prompt_sft import PromptSFT
from diffalign.objectives.sem_dpo import SemDPO, semantic_weights, tilted
from diffalign.references import Frozen
from diffalign.types import TextBatch, Texts
from diffalign.weights import TrainedWeights

VOCABULARY = 23


class Writer(nn.Module):
    """A causal language model small enough to look at: an embedding, a running mean of what came before, a head."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(VOCABULARY, 12), nn.Linear(12, VOCABULARY)
        self.to(dtype)
        self.calls: list[tuple[int, ...]] = []

    @property
    def network(self) -> nn.Module:
        return self

    def trainable_parameters(self):
        return self.parameters()

    def forward(self, tokens: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        self.calls.append((*tokens.shape, last))
        seen = self.embedding(tokens) * mask[:, :, None]
        means = seen.cumsum(dim=1) / mask.cumsum(dim=1)[:, :, None].clamp(min=1)
        logits = self.head(torch.tanh(means) * 3.0)
        return logits if last is None else logits[:, -last:]


def some_rewrites(n: int = 12, seed: int = 0, gold: bool = False) -> EncodedRewrites:
    g = torch.Generator().manual_seed(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=g))
        return torch.randint(1, VOCABULARY, (length,), generator=g).tolist()

    return EncodedRewrites(
        prompt=Ragged([ids(2, 5) for _ in range(n)]),
        winner=Ragged([ids(1, 7) for _ in range(n)]),
        loser=Ragged([ids(1, 7) for _ in range(n)]),
        label=torch.ones(n),
        weight=torch.ones(n),
        distance=torch.rand(n, generator=g) * 0.8,
        gold=Ragged([ids(2, 4) for _ in range(n)]) if gold else None,
    )


def everything(data: EncodedRewrites) -> TextBatch:
    return collate(data, range(len(data)), torch.ones(len(data)))


def learner(objective, data: EncodedRewrites, policy: Writer, batch_size: int = 4, accumulation: int = 1, **loader):
    loader = TextLoader(data, range(len(data)), batch_size, accumulation, seed=3, **loader)
    return objective.learner(TextRunContext(policy, TrainedWeights(policy), Frozen(Writer(1)), loader))


def step_loss(made, step: int = 0) -> Tensor:
    """What the loop minimises in one optimizer step."""
    batches = next(iter(made.source.steps(step, step + 1)))
    return sum((b.weight * made.losses(b).loss).sum() for b in batches) / sum(len(b) for b in batches)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return torch.autograd.grad(loss, list(model.parameters()))


# ------------------------------------------------------------------------------------------------------ TRL's own numbers


class Logits:
    """A language model that says what it was told to say."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, tokens: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        return self.logits if last is None else self.logits[:, -last:]


def batch_of(numbers: Numbers) -> TextBatch:
    columns = [numbers.input(name) for name in ("input_ids", "attention_mask", "completion_mask")]
    begins = int((columns[2].cumsum(dim=1) == 0).sum(dim=1).min())
    parts = 3 if numbers.path.parent.name == "trl_tpo" else 2
    sides = [
        Texts(tokens, mask.bool(), chosen.bool(), begins) for tokens, mask, chosen in zip(*(c.chunk(parts) for c in columns))
    ]
    texts = dict(zip(("winner", "loser", "gold"), sides, strict=False))
    n = len(sides[0])
    return TextBatch(**texts, label=torch.ones(n), weight=torch.ones(n), index=torch.arange(n))


def asked(kind: str, v: dict) -> tuple[SemDPO, float, float]:
    """Our settings for one of TRL's, with the label that its smoothing is, and how many of its losses ours is."""
    beta, noise = v.get("beta", 0.1), v.get("label_smoothing", 0.0)
    same = {"sigmoid": "dpo", "sigmoid_norm": "dpo", "nca_pair": "nca", "bco_pair": "bco", "exo_pair": "exo", "tpo-l": "simpo"}
    loss, tail = same.get(kind, kind.replace("_", "-")), v.get("ld_alpha")
    constants = {"simpo": {"gamma": v.get("simpo_gamma", v.get("tpo_l_gamma"))}, "exo": {"noise": noise}}.get(loss)
    length = "mean" if kind in ("sigmoid_norm", "ipo", "simpo", "tpo-l") else "sum"
    how = {"length": length, "loss": loss, "loss_options": constants, "tail_weight": 1.0 if tail is None else tail}
    return SemDPO(beta=beta, alpha=0.0, **how), 1.0 if loss == "exo" else 1.0 - noise, beta**2 if kind == "ipo" else 1.0


def told(kind: str, v: dict, batch: TextBatch, policy: Logits, reference: Logits) -> Tensor:
    """TRL's losses [B] from the objective's."""
    if kind == "sft":  # TRL averages over the tokens of a batch, we over a row's: long rows weigh more there
        total = PromptSFT(length="sum")(batch, Logits(policy.logits.chunk(2)[0])).loss
        return total.sum().expand(len(total)) / batch.winner.lengths.sum()
    objective, label, times = asked(kind, v)
    batch = replace(batch, label=torch.full_like(batch.label, label, dtype=torch.float64))
    if kind == "bco_pair":  # TRL's paired form measures against zero
        at_work = ScaledLoss(objective.chosen(), objective.beta, Still())
        return TokenLosses(policy, reference, at_work, Counting())(batch, reference).loss
    return objective(batch, policy, reference).loss / times


class Still(RunningMean):
    """A baseline that stays at zero."""

    def update(self, values: Tensor) -> None:
        pass


def agree(numbers: Numbers, loss: Tensor, logits: Tensor) -> None:
    loss.backward()
    torch.testing.assert_close(loss, numbers.expected("loss"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits.grad, numbers.expected("grad_policy_logits"), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("path", cases("trl_dpo", "logits*"), ids=lambda p: p.stem)
def test_the_objective_itself_gives_trls_losses_and_gradients(path: Path) -> None:
    compared = set()
    for v, numbers in variants(path, "f64"):
        logits, batch = numbers.input("policy_logits").requires_grad_(), batch_of(numbers)
        models = Logits(logits), Logits(numbers.input("ref_logits"))
        ids, mask = numbers.input("input_ids"), numbers.input("completion_mask")
        weight = wpo_weight(Tokens.of(logits, ids, mask)) if v["use_weighting"] else 1.0  # a pair's weight, outside the loss
        weights = v["loss_weights"] or [1.0]
        parts = [w * (weight * told(kind, v, batch, *models)).mean() for kind, w in zip(v["loss_type"], weights, strict=True)]
        agree(numbers, sum(parts), logits)
        compared |= set(v["loss_type"])
    assert compared >= {"sft", "sigmoid", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "apo_zero", "exo_pair"}, compared


@pytest.mark.parametrize("path", cases("trl_cpo_simpo"), ids=lambda p: p.stem)
def test_cpo_and_simpo_through_the_objective(path: Path) -> None:
    """A model that finds everything equally likely makes CPO of DPO; SimPO needs none."""
    compared = set()
    for v, numbers in variants(path, "f64"):
        if v.get("alpha", 0.0) or (v["loss_type"] == "simpo" and v.get("label_smoothing")):
            continue  # AlphaPO's reward is no setting of ours; TRL's smoothed SimPO keeps gamma's sign (golden_losses has both)
        logits, batch = numbers.input("policy_logits").requires_grad_(), batch_of(numbers)
        nothing = Logits(torch.zeros_like(logits))
        flat = told(v["loss_type"], {**v, "label_smoothing": v.get("label_smoothing", 0.0)}, batch, Logits(logits), nothing)
        if v["loss_type"] in ("ipo", "hinge", "sigmoid"):  # sums differ by lengths times log V, which is none of the policy's
            flat = unreferenced(v, batch, logits)
        nll = told("sft", v, batch, Logits(logits), nothing).mean()
        agree(numbers, flat.mean() + v.get("cpo_alpha", 1.0) * nll, logits)
        compared.add(v["loss_type"])
    assert compared == {"simpo", "sigmoid", "hinge", "ipo"}


def unreferenced(v: dict, batch: TextBatch, logits: Tensor) -> Tensor:
    """The loss of a pair against a reference to which all completions are certain: log-probabilities zero."""
    certain = torch.full_like(logits, -1e4)
    tokens = torch.cat([batch.winner.tokens, batch.loser.tokens])
    certain[:, :-1].scatter_(2, tokens[:, 1:, None], 1e4)
    return told(v["loss_type"], v, batch, Logits(logits), Logits(certain))


@pytest.mark.parametrize("path", cases("trl_tpo"), ids=lambda p: p.stem)
def test_triple_preference_optimisation_through_the_objective(path: Path) -> None:
    for v, numbers in variants(path, "f64"):
        logits, batch = numbers.input("policy_logits").requires_grad_(), batch_of(numbers)
        objective, label, times = asked(v["loss_type"], v)
        batch = replace(batch, label=torch.full_like(batch.label, label, dtype=torch.float64))
        pair, gold = logits.chunk(3)[:2], logits.chunk(3)[2]
        whole, policy = Logits(logits), Logits(torch.cat(pair))
        certain = torch.full_like(policy.logits, -1e4)
        certain[:, :-1].scatter_(2, torch.cat([batch.winner.tokens, batch.loser.tokens])[:, 1:, None], 1e4)
        reference = Logits(certain.detach())
        plain = objective(batch, policy, reference).loss
        added = replace(objective, gold_weight=v["tpo_alpha"])(batch, whole, reference).loss - plain
        # ours is the mean over a row's gold tokens, TRL's that over the batch's: rows weighted by their lengths
        lengths = batch.gold.lengths
        agree(numbers, (plain / times).mean() + (added * lengths).sum() / lengths.sum(), logits)
        assert gold.shape == pair[0].shape


@pytest.mark.parametrize("path", cases("trl_orpo"), ids=lambda p: p.stem)
def test_orpo_through_the_objective(path: Path) -> None:
    for v, numbers in variants(path, "f64"):
        logits, batch = numbers.input("policy_logits").requires_grad_(), batch_of(numbers)
        constants = {"weight": v["beta"], "rate": 1.0}
        objective = SemDPO(beta=1.0, alpha=0.0, length="mean", loss="orpo", loss_options=constants)
        model = Logits(logits)
        odds = objective(batch, model, model).loss - PromptSFT()(batch, Logits(logits.chunk(2)[0])).loss
        # TRL's likelihood term reads the prompt's tokens, too
        nll = Tokens.of(logits, numbers.input("input_ids"), numbers.input("attention_mask")).part(0, 2).nll()
        numbers.compare("per_pair_beta_logsigmoid_logodds", -odds)
        loss = nll + odds.mean()
        loss.backward()
        numbers.compare("loss", loss)  # within what the released float32 casts leave
        numbers.compare("grad_policy_logits", logits.grad)
        assert numbers.wrong == []


# ------------------------------------------------------------------------------------------------------------ identities


def test_at_the_start_the_loss_is_ln_2() -> None:
    writer, data = Writer(1), some_rewrites()
    outcome = SemDPO(alpha=0.0)(everything(data), writer, Frozen(copy.deepcopy(writer)))
    torch.testing.assert_close(outcome.loss, torch.full((len(data),), math.log(2.0), dtype=torch.float64))
    assert outcome.t is None and torch.equal(outcome.metrics["accuracy"], torch.full((len(data),), 0.5, dtype=torch.float64))


def test_exchanging_the_sides_turns_the_margin_round() -> None:
    data = some_rewrites()
    swapped = EncodedRewrites(data.prompt, data.loser, data.winner, data.label, data.weight, data.distance)
    margins = [SemDPO(alpha=0.0)(everything(d), Writer(0), Writer(1)).metrics["margin"] for d in (data, swapped)]
    torch.testing.assert_close(margins[0], -margins[1])
    assert margins[0].abs().min() > 1e-4


def test_alpha_zero_is_dpo_to_the_last_digit() -> None:
    data, policy = some_rewrites(), Writer(0)
    unmeasured = EncodedRewrites(data.prompt, data.winner, data.loser, data.label, data.weight)
    plain = learner(SemDPO(alpha=0.0), unmeasured, policy)
    sem = learner(SemDPO(alpha=0.0), data, policy)
    assert step_loss(plain).item() == step_loss(sem).item()
    for one, other in zip(gradients(step_loss(plain), policy), gradients(step_loss(sem), policy), strict=True):
        assert torch.equal(one, other)


def test_the_weight_stands_outside_the_loss() -> None:
    data, policy = some_rewrites(), Writer(0)
    batch = next(iter(learner(SemDPO(alpha=3.0), data, policy).source.steps(0, 1)))[0]
    torch.testing.assert_close(batch.weight, torch.exp(-3.0 * data.distance[batch.index].double()))
    unweighted = SemDPO(alpha=3.0)(batch, policy, Writer(1)).loss
    torch.testing.assert_close(unweighted, SemDPO(alpha=0.0)(batch, policy, Writer(1)).loss)


@pytest.mark.parametrize("normalise", ["step", "data"])
def test_scaled_weights_and_a_learning_rate_divided_accordingly_change_nothing_with_plain_sgd(normalise: str) -> None:
    """Unnormalised weights are the normalised ones times Z: with plain SGD the learning rate can make up for that."""
    data, rate = some_rewrites(), 0.05
    ended = []
    for which in ("none", normalise):
        policy = Writer(0)
        made = learner(SemDPO(alpha=4.0, normalise=which), data, policy, batch_size=12)
        z = 1.0 if which == "none" else float(semantic_weights(data.distance, 4.0).mean())
        for step in range(3):
            for p, g in zip(policy.parameters(), gradients(step_loss(made, step), policy), strict=True):
                p.data -= rate * z * g
        ended.append([p.detach() for p in policy.parameters()])
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert max((p - q).abs().max() for p, q in zip(ended[0], Writer(0).parameters(), strict=True)) > 1e-3


@pytest.mark.parametrize("normalise", ["none", "step", "data"])
def test_neither_micro_batches_nor_processes_change_a_step(normalise: str) -> None:
    data, policy, objective = some_rewrites(), Writer(0), SemDPO(alpha=4.0, normalise=normalise)
    whole = gradients(step_loss(learner(objective, data, policy, batch_size=12)), policy)
    cut = gradients(step_loss(learner(objective, data, policy, batch_size=3, accumulation=4)), policy)
    ranks = [gradients(step_loss(learner(objective, data, policy, 3, 2, rank=r, world=2)), policy) for r in (0, 1)]
    for a, b, *parts in zip(whole, cut, *ranks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(a, sum(parts) / 2, rtol=1e-10, atol=1e-13)


def test_padding_changes_nothing() -> None:
    data = some_rewrites()
    together = SemDPO(alpha=0.0)(everything(data), Writer(0), Writer(1)).loss
    alone = [SemDPO(alpha=0.0)(collate(data, [r], torch.ones(1)), Writer(0), Writer(1)).loss for r in range(len(data))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_prompt_tokens_are_read_and_not_counted() -> None:
    writer, texts = Writer(0), Texts.of([[5, 6, 7], [8]], [[1, 2], [3, 4, 9]])
    log_p = token_log_probs(writer, texts)
    by_hand = writer(texts.tokens, texts.mask).log_softmax(dim=-1)
    assert torch.equal(log_p != 0, texts.completion)
    for n, s in texts.completion.nonzero().tolist():
        torch.testing.assert_close(log_p[n, s], by_hand[n, s - 1, texts.tokens[n, s]])
    assert writer.calls[0] == (2, 5, 5)  # from the place before the first completion: the shorter prompt has one token


def test_one_call_of_each_model_and_logits_of_the_completions_alone() -> None:
    data, policy, reference = some_rewrites(), Writer(0), Writer(1)
    batch = everything(data)
    SemDPO(alpha=0.0)(batch, policy, reference)
    longest, shortest = batch.winner.tokens.shape[1], min(len(data.prompt[r]) for r in range(len(data)))
    assert policy.calls == reference.calls == [(2 * len(data), longest, longest - shortest + 1)]


COSTS = {
    "sem-dpo": SemDPO(),
    "without a reference": SemDPO(loss="simpo"),
    "kto": SemDPO(loss="kto"),
    "with gold": SemDPO(loss="simpo", gold_weight=1.0),
    "sft": PromptSFT(),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_of_a_pair_is_what_models_count(name: str) -> None:
    objective, data, policy, start = COSTS[name], some_rewrites(gold=True), Writer(0), Writer(1)
    loader = TextLoader(data, range(len(data)), batch_size=4)
    made = objective.learner(TextRunContext(policy, TrainedWeights(policy), Frozen(start), loader))
    looked = []

    def counting(self, tokens: Tensor, mask: Tensor, last: int | None = None, forward=Writer.forward) -> Tensor:
        looked.append((self is policy and torch.is_grad_enabled(), len(tokens)))
        return forward(self, tokens, mask, last)

    for model in (policy, start):
        model.forward = counting.__get__(model)
    step_loss(made)
    assert sum(n for learnt, n in looked if learnt) == 4 * objective.cost.with_gradient
    assert sum(n for learnt, n in looked if not learnt) == 4 * objective.cost.forward_only
    assert max(n for learnt, n in looked if learnt) == 4 * objective.cost.at_once


# --------------------------------------------------------------------------------------------------------------- relatives


def test_mean_length_makes_a_repeated_token_count_no_more() -> None:
    data = EncodedRewrites([[1, 2]], [[3, 4, 5]], [[6]], torch.ones(1), torch.ones(1))
    batch, policy, reference = everything(data), Writer(0), Writer(1)
    sides = [token_log_probs(m, batch.winner).sum() / 3 - token_log_probs(m, batch.loser).sum() for m in (policy, reference)]
    outcome = SemDPO(beta=2.0, alpha=0.0, length="mean")(batch, policy, reference)
    torch.testing.assert_close(outcome.metrics["margin"][0], 2.0 * (sides[0] - sides[1]))


def test_token_guidance_counts_a_winners_rewarded_tokens_more_and_a_losers_less() -> None:
    data = some_rewrites(4)
    sides = [[[0.1 * (k + 1) for k in range(len(side[r]))] for r in range(4)] for side in (data.winner, data.loser)]
    guided = EncodedRewrites(data.prompt, data.winner, data.loser, data.label, data.weight, token_rewards=tuple(sides))
    batch, policy, reference = everything(guided), Writer(0), Writer(1)
    outcome = SemDPO(beta=1.0, alpha=0.0, token_guidance=0.5)(batch, policy, reference)
    expected = []
    for r in range(4):
        total = 0.0
        for side, sign, texts in ((0, 1.0, batch.winner), (1, -1.0, batch.loser)):
            ratio = (token_log_probs(policy, texts) - token_log_probs(reference, texts))[r][texts.completion[r]]
            factor = 1.0 + sign * 0.5 * torch.tensor(sides[side][r], dtype=torch.float64)
            total = total + sign * (factor * ratio).sum()
        expected.append(total)
    torch.testing.assert_close(outcome.metrics["margin"], torch.stack(expected).detach(), rtol=1e-6, atol=1e-7)


def test_a_gold_rewrite_adds_its_likelihood_in_the_same_call() -> None:
    data, policy, reference = some_rewrites(gold=True), Writer(0), Writer(1)
    batch = everything(data)
    without, with_gold = (SemDPO(alpha=0.0, gold_weight=w)(batch, policy, reference) for w in (0.0, 0.7))
    nll = -token_log_probs(policy, batch.gold).sum(dim=1) / batch.gold.lengths
    torch.testing.assert_close(with_gold.loss - without.loss, 0.7 * nll)
    assert [len(c) for c in (policy.calls[0], policy.calls[1])] == [3, 3] and policy.calls[1][0] == 3 * len(data)


def test_kto_measures_against_mismatched_completions() -> None:
    data, policy = some_rewrites(), Writer(0)
    made = learner(SemDPO(alpha=0.0, loss="kto"), data, policy)
    batch = next(iter(made.source.steps(0, 1)))[0]
    prompts, winners = [data.prompt[int(r)] for r in batch.index], [data.winner[int(r)] for r in batch.index]
    expected = Texts.of(prompts, winners[1:] + winners[:1])
    width = expected.tokens.shape[1]
    assert torch.equal(batch.mismatched.tokens[:, :width], expected.tokens)
    made.losses(batch)
    ratio = (token_log_probs(policy, expected) - token_log_probs(Writer(1), expected)).sum(dim=1).mean().clamp(min=0)
    torch.testing.assert_close(made.stateful["baseline"].value, ratio.detach())


@pytest.mark.parametrize(
    "loss",
    [
        "ipo",
        "hinge",
        "simpo",
        "orpo",
        "cdpo",
        "apo-zero",
        "sppo",
        "bco",
        "kto",
        "aot",
        "beta-dpo",
        "rdpo",
        "apo-down",
        "nca",
        "exo",
        "discopop",
        "hypo",
        "cal-dpo",
    ],
)
def test_losses_of_the_family_work_on_rewrites(loss: str) -> None:
    data, policy = some_rewrites(), Writer(0)
    made = learner(SemDPO(alpha=2.0, loss=loss, length="mean"), data, policy)
    grads = gradients(step_loss(made), policy)
    assert all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
    assert set(made.validate(everything(data)).metrics) >= {"margin", "accuracy", "winner_ratio", "loser_ratio", "distance"}


# ----------------------------------------------------------------------------------------------------------------- bounds


def test_the_tilt_never_moves_winners_away_and_its_tail_is_bounded() -> None:
    """methods.md 6.5 (ii) and (iii), on distances of many shapes."""
    g = torch.Generator().manual_seed(5)
    shapes = [torch.rand(400, generator=g) * 2, torch.rand(400, generator=g) ** 4, 2 * torch.rand(400, generator=g).round()]
    for d in shapes:
        means = [tilted(d, alpha, 0.5).tilted_mean for alpha in (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)]
        assert means[0] == pytest.approx(float(d.double().mean()), rel=1e-12)
        assert all(later < earlier for earlier, later in itertools.pairwise(means)), means
        for alpha in (1.0, 5.0):
            for delta in (0.05, 0.3, 1.0, 1.9):
                t = tilted(d, alpha, delta)
                assert t.tilted_beyond <= t.bound + 1e-12 <= t.weaker_bound + 2e-12 and t.tilted_beyond <= t.beyond + 1e-12
    constant = tilted(torch.full((10,), 0.3), 5.0, 0.2)
    assert constant.tilted_mean == pytest.approx(0.3) and constant.effective == pytest.approx(1.0)


def test_the_tail_shrinks_at_the_rate_that_the_bound_names() -> None:
    """d(E_W[d])/d(alpha) = -Var_W(d), by a difference quotient."""
    d, alpha, h = torch.rand(300, generator=torch.Generator().manual_seed(1)), 2.0, 1e-4
    slope = (tilted(d, alpha + h, 0.5).tilted_mean - tilted(d, alpha - h, 0.5).tilted_mean) / (2 * h)
    w = semantic_weights(d, alpha) / semantic_weights(d, alpha).sum()
    variance = float((w * d.double() ** 2).sum() - (w * d.double()).sum() ** 2)
    assert slope == pytest.approx(-variance, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------------- SFT


def test_sft_is_the_mean_negative_log_probability_of_a_rewrites_tokens() -> None:
    data, policy = some_rewrites(), Writer(0)
    batch = everything(data)
    log_p = token_log_probs(policy, batch.winner).sum(dim=1)
    torch.testing.assert_close(PromptSFT()(batch, policy).loss, -log_p / batch.winner.lengths)
    torch.testing.assert_close(PromptSFT("sum")(batch, policy).loss, -log_p)


# ------------------------------------------------------------------------------------------------------------------ loader


def test_every_row_comes_once_in_an_epoch() -> None:
    data = some_rewrites(12)
    loader = TextLoader(data, range(2, 12), batch_size=5, seed=1)
    seen = torch.cat([b.index for step in loader.steps(0, 2) for b in step]).tolist()
    assert sorted(seen) == list(range(2, 12))
    again = torch.cat([b.index for step in loader.steps(1, 2) for b in step]).tolist()
    assert again == seen[5:]  # a step is a function of its number: resuming needs nothing else


def test_ragged_rows_are_what_went_in() -> None:
    rows = [[1, 2, 3], [], [4], [5, 6]]
    assert [Ragged(rows)[i] for i in range(4)] == rows and len(Ragged(rows)) == 4 and len(Ragged([])) == 0


def test_validation_batches_hold_each_row_once_with_its_own_weight() -> None:
    data = some_rewrites(7)
    batches = validation_batches(data, range(7), 3)
    assert torch.cat([b.index for b in batches]).tolist() == list(range(7)) and [len(b) for b in batches] == [3, 3, 1]
    assert all(torch.equal(b.weight, torch.ones(len(b))) for b in batches)


# ------------------------------------------------------------------------------------------------------------------- errors


def test_what_the_data_lack_is_said_before_anything_is_trained() -> None:
    data, policy = some_rewrites(), Writer(0)
    unmeasured = EncodedRewrites(data.prompt, data.winner, data.loser, data.label, data.weight)
    for objective, found, message in (
        (SemDPO(alpha=1.0), unmeasured, "distance from the prompt"),
        (SemDPO(alpha=0.0, gold_weight=1.0), data, "a column gold"),
        (SemDPO(alpha=0.0, token_guidance=1.0), data, "--token-rewards"),
        (SemDPO(alpha=0.0, loss="adpo"), data, "a judge's scores of both rewrites"),
    ):
        with pytest.raises(UserError, match=message):
            learner(objective, found, policy)
    with pytest.raises(UserError, match="batch_size of at least 2"):
        learner(SemDPO(alpha=0.0, loss="kto"), data, policy, batch_size=1)
    with pytest.raises(ValueError, match="normalise is one of none, step, data; got 'epoch'"):
        SemDPO(normalise="epoch")
    with pytest.raises(ValueError, match="length is one of sum, mean; got 'max'"):
        SemDPO(length="max")


def test_json_of_the_tilt_is_plain() -> None:
    assert json.loads(json.dumps(vars(tilted(torch.rand(5), 1.0, 0.2))))
