"""Sources that ask the policy, now or as it was: its weights exchanged for a moment, samples, trajectories, rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from judged import Case, at_work, first_batch, moved, things_given
from torch import Tensor
from worlds import SHAPE, PairsInMemory, given, small_denoiser

from diffalign.data.loader import LoaderSettings, PairLoader
from diffalign.errors import UserError
from diffalign.objectives.d3po import D3PO, dominance
from diffalign.objectives.ddpo import DDPO
from diffalign.objectives.diffusion_dro import DiffusionDRO
from diffalign.objectives.seppo import SePPO
from diffalign.objectives.smpo import SmPO
from diffalign.processes import OneProcess
from diffalign.references import Snapshot
from diffalign.sources.past import Bank, chosen
from diffalign.sources.rollout import Sampling, rollout
from diffalign.sources.rounds import RoundPlan, Rounds, TransitionBatch, stacked
from diffalign.types import PairBatch
from diffalign.weights import TrainedWeights
from pipelines.families import _lora
from pipelines.families.stable_diffusion import UNetDenoiser

OFF = 2e-3


def network(lora: bool = True, dropout: float = 0.0) -> UNetDenoiser:
    denoiser = small_denoiser()
    if lora:
        _lora.attach(denoiser.network, rank=4, alpha=8, targets=("to_q", "to_v"), dropout=dropout, seed=1)
        moved(denoiser.network, 0.05, seed=3)  # an adapter that is not zero
    return denoiser


def seen(n: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(4)
    text = {"encoder_hidden_states": torch.randn(n, 7, 32, generator=g)}
    return torch.randn(n, *SHAPE, generator=g), torch.tensor([500, 100] * n)[:n], text


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_other_weights_for_a_moment(lora: bool) -> None:
    denoiser = network(lora)
    weights, before = TrainedWeights(denoiser.network), denoiser(*seen())
    kept = weights.copy()
    moved(denoiser.network, OFF)
    now = denoiser(*seen())
    with torch.no_grad(), weights.held(kept):
        assert torch.equal(denoiser(*seen()), before)
    assert torch.equal(denoiser(*seen()), now)
    assert not torch.equal(now, before)


def test_whatever_happens_within_the_weights_come_back() -> None:
    denoiser = network(dropout=0.5)
    denoiser.network.train()
    weights = TrainedWeights(denoiser.network)
    trained = {n: p for n, p in denoiser.network.named_parameters() if p.requires_grad}
    values, places = {n: p.detach().clone() for n, p in trained.items()}, {n: p.data_ptr() for n, p in trained.items()}
    training = [m.training for m in denoiser.network.modules()]
    for p in trained.values():
        p.grad = torch.ones_like(p)
    with pytest.raises(KeyboardInterrupt), weights.held({n: torch.zeros_like(p) for n, p in trained.items()}):
        assert not any(p.any() for p in trained.values())
        raise KeyboardInterrupt
    with pytest.raises(KeyError), weights.held({}):
        pass
    for name, parameter in denoiser.network.named_parameters():
        if name in trained:
            assert parameter is trained[name]  # those that the optimizer holds
            assert parameter.data_ptr() == places[name]
            assert torch.equal(parameter, values[name])
            assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert [m.training for m in denoiser.network.modules()] == training


def test_within_there_is_no_dropout_and_no_random_number() -> None:
    denoiser = network(dropout=0.5)
    denoiser.network.train()
    weights = TrainedWeights(denoiser.network)
    past, state = Snapshot(denoiser, weights), torch.get_rng_state()
    past.keep()
    assert torch.equal(past(*seen()), past(*seen()))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(denoiser(*seen()), denoiser(*seen()))  # outside there is
    denoiser.network.eval()
    assert torch.equal(past(*seen()), denoiser(*seen()))
    assert not any(m.training for m in denoiser.network.modules())  # an evaluating network stays one


def test_smpo_inverts_without_dropout_and_learns_with_it() -> None:
    denoiser = network(dropout=0.5)
    denoiser.network.train()
    batch = PairLoader(PairsInMemory(4), range(4), LoaderSettings(batch_size=2))._batch(0)
    state = torch.get_rng_state()
    once, again = (SmPO(smoothing="label").noised(batch, denoiser) for _ in range(2))
    assert torch.equal(once.winner, again.winner) and torch.equal(once.loser_target, again.loser_target)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(denoiser(*seen()), denoiser(*seen()))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("when", ["before the forward pass", "between forward and backward"])
def test_a_look_at_the_past_disturbs_no_gradient(when: str, lora: bool) -> None:
    denoiser = network(lora)
    past = Snapshot(denoiser, TrainedWeights(denoiser.network))
    past.keep()
    moved(denoiser.network, OFF)
    trained = [p for p in denoiser.network.parameters() if p.requires_grad]
    expected = torch.autograd.grad(denoiser(*seen()).square().sum(), trained)
    if when == "before the forward pass":
        past(*seen())
    loss = denoiser(*seen()).square().sum()
    if when == "between forward and backward":
        assert not past(*seen()).requires_grad
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(trained, expected, strict=True))


def test_an_optimizer_does_not_notice() -> None:
    """Two runs of AdamW, one with a look at the past in every step, are one."""
    ends = []
    for looks in (False, True):
        denoiser = network()
        past = Snapshot(denoiser, TrainedWeights(denoiser.network))
        past.keep()
        optimizer = torch.optim.AdamW(denoiser.trainable_parameters(), lr=1e-2)
        for _ in range(3):
            denoiser(*seen()).square().mean().backward()
            if looks:
                past(*seen())
            optimizer.step()
            optimizer.zero_grad()
        ends.append(TrainedWeights(denoiser.network).copy())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_a_copy_stays_what_it_was() -> None:
    denoiser = network()
    weights = TrainedWeights(denoiser.network)
    kept, view = weights.copy("cpu"), weights.state_dict()
    moved(denoiser.network, OFF)
    assert all(not torch.equal(kept[n], p) for n, p in view.items())
    weights.load_state_dict(kept)
    assert all(torch.equal(kept[n], p) for n, p in weights.state_dict().items())
    moved(denoiser.network, OFF)
    assert all(not torch.equal(kept[n], p) for n, p in view.items())  # loading copied, too


def test_weights_of_another_run_are_refused() -> None:
    weights = TrainedWeights(network(lora=True).network)
    for use in (weights.load_state_dict, weights.placed):
        with pytest.raises(UserError, match=r"holds other weights than this run trains \(for example conv_in.bias"):
            use(TrainedWeights(network(lora=False).network).copy())


def test_extrapolation_is_nesterovs() -> None:
    denoiser = network()
    weights = TrainedWeights(denoiser.network)
    start = weights.copy()
    moved(denoiser.network, OFF)
    now = weights.copy()
    places = [p.data_ptr() for p in denoiser.trainable_parameters()]
    weights.move(start, by=0.3)
    for name, value in weights.state_dict().items():
        torch.testing.assert_close(value, now[name] + 0.3 * (now[name] - start[name]), rtol=1e-6, atol=1e-7)
    assert [p.data_ptr() for p in denoiser.trainable_parameters()] == places
    weights.load_state_dict(now)
    weights.move(start, by=-1.0)
    for name, value in weights.state_dict().items():
        torch.testing.assert_close(value, start[name], rtol=0, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------- past


def test_the_past_is_what_the_policy_was() -> None:
    denoiser = network()
    past = Snapshot(denoiser, TrainedWeights(denoiser.network))
    with pytest.raises(ValueError, match=r"there is no snapshot yet: keep\(\) takes one"):
        past(*seen())
    assert past.state_dict() == {"kept": {}}
    past.load_state_dict(past.state_dict())  # so it can be saved before it begins
    before = denoiser(*seen())
    past.keep()
    moved(denoiser.network, OFF)
    assert torch.equal(past(*seen()), before)
    other = Snapshot(denoiser, TrainedWeights(denoiser.network))
    other.load_state_dict(past.state_dict())
    assert torch.equal(other(*seen()), before)
    past.keep()
    assert torch.equal(past(*seen()), denoiser(*seen()))
    assert torch.equal(other(*seen()), before)


def test_which_checkpoint_is_a_function_of_seed_and_round() -> None:
    rounds = [(bank, round_) for round_ in range(200) for bank in (round_ + 1,)]
    drawn = [chosen("uniform", bank, round_, seed=3) for bank, round_ in rounds]
    assert drawn == [chosen("uniform", bank, round_, seed=3) for bank, round_ in rounds]
    assert drawn != [chosen("uniform", bank, round_, seed=4) for bank, round_ in rounds]
    assert all(0 <= which < bank for which, (bank, _) in zip(drawn, rounds, strict=True))
    assert drawn[0] == 0
    shares = [which / bank for which, (bank, _) in zip(drawn, rounds, strict=True)]
    assert 0.4 < sum(shares) / 200 < 0.55
    assert {chosen("uniform", 3, round_, seed=3) for round_ in range(30)} == {0, 1, 2}
    assert [chosen("first", bank, 5, 3) for bank in (1, 6)] == [0, 0]
    assert [chosen("last", bank, 5, 3) for bank in (1, 6)] == [0, 5]


def test_a_bank_comes_back_whole() -> None:
    network = torch.nn.Linear(1, 2, bias=False)
    bank, other = Bank(TrainedWeights(network)), Bank(TrainedWeights(network))
    for k in range(3):
        torch.nn.init.constant_(network.weight, float(k))
        bank.append()
    other.load_state_dict(bank.state_dict())
    bank.append()
    assert [float(other[k]["weight"][0]) for k in range(len(other))] == [0.0, 1.0, 2.0]


# ----------------------------------------------------------------------------------------------------------- self-sampled


def seppo(**options) -> SePPO:
    return SePPO(**{"round_steps": 2, "rollout_steps": 2, "guidance": 2.0, "checkpoint": "last", **options})


def of_step(learner: Any, step: int) -> PairBatch | Any:
    """All micro-batches of one step, joined by the parts that tests ask for."""
    return next(iter(learner.source.steps(step, step + 1)))


CUTS = {"whole": (4, 1, 16), "cut": (1, 4, 16), "half, sampled by threes": (2, 2, 3)}


def cut_runs(objective: Any) -> dict[str, list[Any]]:
    out = {}
    for name, (batch, accumulation, at_once) in CUTS.items():
        learner, _ = at_work(objective, batch=batch, accumulation=accumulation, sampling_batch=at_once)
        out[name] = [each for step in learner.source.steps(0, 2) for each in step]
    return out


def test_sampled_losers_do_not_depend_on_how_a_step_is_cut() -> None:
    runs = {name: torch.cat([b.loser for b in batches]) for name, batches in cut_runs(seppo()).items()}
    assert len(runs["whole"]) == 8
    for name in CUTS:
        torch.testing.assert_close(runs[name], runs["whole"], rtol=0, atol=1e-6)
    assert runs["whole"].flatten(1).unique(dim=0).shape[0] == 8  # every visit has a noise of its own


def test_only_the_loser_is_new() -> None:
    learner, given_ = at_work(seppo(), kind="pictures")
    (batch,), (plain,) = of_step(learner, 0), of_step(replace(learner, source=given_.pairs), 0)
    assert plain.label.tolist() != [1.0] * 4
    assert batch.label.tolist() == [1.0] * 4
    for name in ("winner", "t", "noise", "weight", "index"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    assert batch.conditioning.keys() == plain.conditioning.keys()
    assert all(torch.equal(batch.conditioning[n], plain.conditioning[n]) for n in plain.conditioning)
    assert batch.loser.dtype == plain.loser.dtype
    assert (batch.loser - plain.loser).abs().flatten(1).amax(dim=1).min() > 0.1


def test_losers_are_samples_of_the_reference() -> None:
    """Made again from what is known: the seeds of the visits, the checkpoint, the pairs' own prompts."""
    from diffalign.data.draws import derived_seed
    from diffalign.sources.past import _STREAMS

    learner, given_ = at_work(seppo())
    steps = learner.source.steps(0, 2)
    next(steps)
    moved(given_.policy.network, OFF)
    (batch,) = next(steps)
    made = rollout(
        given_.start,  # which is what the policy was
        given_.policy.schedule,
        batch.conditioning,
        seppo().sampling,
        shape=SHAPE,
        seeds=[derived_seed(given_.seed, _STREAMS["picture"], 4 + i) for i in range(4)],
        unconditional=given_.unconditional,
    )
    torch.testing.assert_close(batch.loser.float(), made.final, rtol=0, atol=1e-6)


def seen_by(learner: Any) -> Tensor:
    x_t, t, text = seen()
    return learner.source.reference(x_t.double(), t, {k: v.double() for k, v in text.items()})


@pytest.mark.parametrize("choice", ["first", "last", "uniform"])
def test_the_checkpoint_changes_with_the_round_and_not_within(choice: str) -> None:
    learner, given_ = at_work(seppo(checkpoint=choice))
    policies, references, held = [], [], []
    for step, _ in enumerate(learner.source.steps(0, 6)):
        x_t, t, text = seen()
        policies.append(given_.policy(x_t.double(), t, {k: v.double() for k, v in text.items()}).detach())
        references.append(seen_by(learner))
        held.append(len(learner.source.bank))
        moved(given_.policy.network, OFF, seed=step)
    assert held == ([1, 1, 2, 2, 3, 3] if choice == "uniform" else [1] * 6)  # no more than may be asked for
    for round_ in range(3):
        which = 2 * chosen(choice, round_ + 1, round_, given_.seed)  # the policy at the beginning of that round
        assert torch.equal(references[2 * round_], policies[which])
        assert torch.equal(references[2 * round_ + 1], policies[which])
    assert not torch.equal(policies[0], policies[2])


# ----------------------------------------------------------------------------------------------------------- policy steps


def dro(**options) -> DiffusionDRO:
    return DiffusionDRO(**{"rollout_steps": 3, **options})


def test_steps_of_the_policy_do_not_depend_on_how_a_step_is_cut() -> None:
    """As long as the buffer holds a micro-batch and no more."""
    runs = cut_runs(dro())
    for name in CUTS:
        for part in ("x_t", "t", "prediction", "x_0", "index"):
            here, whole = (torch.cat([getattr(b.replayed, part) for b in runs[n]]) for n in (name, "whole"))
            torch.testing.assert_close(here, whole, rtol=0, atol=1e-5)
        for part in ("noise", "weight"):
            here, whole = (torch.cat([getattr(b, part) for b in runs[n]]) for n in (name, "whole"))
            assert torch.equal(here, whole)
    t = torch.cat([b.replayed.t for b in runs["whole"]])
    assert t.unique().numel() > 6  # grids are shifted, steps drawn


def test_experts_meet_steps_for_their_own_prompts() -> None:
    learner, given_ = at_work(dro())
    ((batch,), (plain,)) = of_step(learner, 0), of_step(replace(learner, source=given_.pairs), 0)
    assert torch.equal(batch.replayed.index, plain.index)
    assert torch.equal(batch.replayed.x_0, plain.winner)
    for name, value in plain.conditioning.items():
        assert torch.equal(batch.replayed.conditioning[name], value)


def test_a_larger_buffer_mixes_in_older_trajectories() -> None:
    learner, given_ = at_work(dro(buffer=8))
    rows, own = [], []
    for (batch,), (plain,) in zip(learner.source.steps(0, 8), given_.pairs.steps(0, 8), strict=True):
        rows.append(set(batch.replayed.index.tolist()))
        own.append(set(plain.index.tolist()))
    assert rows[0] == own[0]  # nothing older yet: each expert with its own
    assert any(seen_rows - now for seen_rows, now in zip(rows, own, strict=True))
    for step in range(1, 8):
        assert rows[step] <= own[step] | own[step - 1]  # the newest eight
    assert len(learner.source._buffer) == 8


@pytest.mark.parametrize("refresh", [1, 2])
def test_the_policy_that_walks_is_refreshed_every_so_often(refresh: int) -> None:
    learner, given_ = at_work(dro(refresh=refresh))
    steps = learner.source.steps(0, 4)
    gaps = []
    for step in range(4):
        (batch,) = next(steps)
        r = batch.replayed
        with torch.no_grad():
            now = given_.policy(r.x_t, r.t, r.conditioning)
        gaps.append((now - r.prediction).abs().max().item() > 1e-4)
        moved(given_.policy.network, OFF, seed=step)
    assert gaps == [step % refresh != 0 for step in range(4)]


def test_each_micro_batch_of_a_step_without_a_walk_has_the_trajectories_of_its_place() -> None:
    learner, _ = at_work(dro(walk_every=2, buffer=0), batch=2, accumulation=2)
    walked, resting = [[batch.replayed.index.tolist() for batch in step] for step in learner.source.steps(0, 2)]
    assert resting == walked and not set(walked[0]) & set(walked[1])


def test_the_buffers_of_other_processes_are_theirs() -> None:
    """Each goes on with its own; another number of processes begins anew."""
    learner, _ = at_work(dro())
    first_batch(learner)
    shared = learner.stateful["buffer"]
    shared.collect()
    state = shared.state_dict()
    assert len(state["ranks"]) == 1
    again, _ = at_work(dro())
    again.stateful["buffer"].load_state_dict({"ranks": state["ranks"] * 2})
    assert len(again.source._buffer) == 0
    again.stateful["buffer"].load_state_dict(state)
    assert len(again.source._buffer) == 4


# --------------------------------------------------------------------------------------------------------------- rounds


def d3po(**options) -> D3PO:
    return D3PO(**{"round_pairs": 6, "rollout_steps": 3, "guidance": 1.0, **options})


def shown(batches: list[TransitionBatch], judged: Any) -> list[tuple[int, int]]:
    """Which (pair of the round, t) the micro-batches hold, found by the states themselves."""
    out = []
    for batch in batches:
        for x_t, t in zip(batch.pair.winner, batch.pair.t.tolist(), strict=True):
            (match,) = [(i, j) for i in range(len(judged.first)) for j in range(3) if torch.equal(judged.first.x[i, j], x_t)]
            assert judged.first.t[match] == t
            out.append(match)
    return out


@pytest.mark.parametrize("batch, sizes", [(3, [3, 1]), (1, [1] * 4), (8, [4])])
def test_a_step_is_all_transitions_of_its_pairs(batch: int, sizes: list[int]) -> None:
    """Two pairs a step, the first two of three transitions each: the last has no noise."""
    learner, _ = at_work(d3po(round_epochs=2), batch=batch, accumulation=2)
    steps, seen_pairs, orders = learner.source.steps(0, 6), [], []
    for _ in range(6):
        batches = next(steps)
        assert [len(b) for b in batches] == sizes
        found = shown(batches, learner.source._judged)
        pairs = sorted({i for i, _ in found})
        assert len(pairs) == 2
        assert sorted(found) == [(i, j) for i in pairs for j in (0, 1)]
        seen_pairs.append(pairs)
        orders.append([(pairs.index(i), j) for i, j in found])
    for epoch in (seen_pairs[:3], seen_pairs[3:]):  # each pair once in each of the two epochs
        assert sorted(i for pairs in epoch for i in pairs) == list(range(6))
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("share, learnt", [(0.01, [0]), (0.34, [0]), (0.5, [0, 1]), (1.0, [0, 1, 2])])
@pytest.mark.parametrize("objective", [d3po, lambda **o: DDPO(round_pairs=6, rollout_steps=3, guidance=1.0, **o)])
def test_the_noisy_end_alone_may_be_learnt_from(objective: Any, share: float, learnt: list[int]) -> None:
    """Here the last transition has noise, too."""
    denoiser = small_denoiser(torch.float64)
    denoiser = replace(denoiser, schedule=replace(denoiser.schedule, clean_end="first"))
    all_given = things_given(denoiser, denoiser, Case(objective(timestep_fraction=share), batch=8, accumulation=2))
    learner = objective(timestep_fraction=share).learner(all_given)
    found = shown(of_step(learner, 0), learner.source._judged)
    assert sorted(j for _, j in found) == sorted(learnt * 2)


def test_ddpo_may_keep_the_best_and_the_worst_of_several() -> None:
    def judged(**options: Any) -> Any:
        learner, _ = at_work(DDPO(round_pairs=6, rollout_steps=3, guidance=1.0, least=2, **options))
        first_batch(learner)
        return learner.source._judged

    five, two = judged(candidates=5), judged()
    assert (five.rewards[:, 0] > five.rewards[:, 1]).all() and (five.label == 1).all()
    assert (five.advantage[:, 0] > five.advantage[:, 1]).all()
    gaps = [(j.rewards[:, 0] - j.rewards[:, 1]).abs().mean() for j in (five, two)]
    assert gaps[0] > 1.3 * gaps[1]  # of two 1.13 deviations on average, of five 2.33


def test_what_is_known_about_a_transition_is_its_own() -> None:
    learner, _ = at_work(d3po(same_start=False), accumulation=2, batch=8)
    (batch,) = of_step(learner, 0)
    judged = learner.source._judged
    for k, (i, j) in enumerate(shown([batch], judged)):
        for side, made, reference in (("winner", judged.first, 0), ("loser", judged.second, 1)):
            assert torch.equal(getattr(batch.pair, side)[k], made.x[i, j])
            assert torch.equal(getattr(batch.pair, f"{side}_next")[k], made.x[i, j + 1])
            assert getattr(batch.made_by, side)[k] == made.log_density[i, j]
            assert getattr(batch.reference, side)[k] == judged.reference[reference][i, j]
        assert batch.pair.t_previous[k] == judged.first.t_previous[i, j]
        assert batch.label[k] == judged.label[i]
        assert torch.equal(batch.rewards[k], judged.rewards[i])
        assert batch.index[k] == judged.first.index[i]
        text = learner.source._run.prompts.conditioning(int(batch.index[k]))["encoder_hidden_states"]
        assert torch.equal(batch.pair.conditioning["encoder_hidden_states"][k], text)
    assert batch.weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("same", [True, False])
def test_pairs_may_begin_alike(same: bool) -> None:
    learner, _ = at_work(d3po(same_start=same))
    first_batch(learner)
    one, two = learner.source._judged.first, learner.source._judged.second
    assert torch.equal(one.x[:, 0], two.x[:, 0]) == same
    assert (one.x[:, 1] - two.x[:, 1]).abs().flatten(1).amax(dim=1).min() > 0.1
    assert one.x[:, 0].flatten(1).unique(dim=0).shape[0] == 6
    assert torch.equal(one.index, two.index)


def test_prompts_take_turns() -> None:
    """Over the rounds every prompt is sampled for as often as every other, whatever the size of a round."""
    learner, _ = at_work(d3po(round_pairs=2))
    prompts = []
    for step, _ in enumerate(learner.source.steps(0, 10)):
        if step % 2 == 0:
            prompts += learner.source._judged.first.index.tolist()
    assert sorted(prompts) == sorted(list(range(5)) * 2)
    assert sorted(prompts[:5]) == list(range(5))


def test_where_the_last_step_has_noise_it_is_learnt_from() -> None:
    denoiser = small_denoiser(torch.float64)
    denoiser = replace(denoiser, schedule=replace(denoiser.schedule, clean_end="first"))
    all_given = things_given(denoiser, denoiser, Case(d3po(), batch=8))
    (batch,) = of_step(d3po().learner(all_given), 0)
    assert sorted(batch.pair.t_previous.tolist()) == [-1, 1, 334]
    assert batch.made_by.winner.isfinite().all()


def test_a_round_is_sampled_by_the_policy_at_its_beginning() -> None:
    learner, given_ = at_work(d3po(round_pairs=2))
    steps, made = learner.source.steps(0, 4), []
    for step in range(4):
        next(steps)
        judged = learner.source._judged
        if step % 2 == 0:
            with torch.no_grad():
                said = given_.policy(judged.first.x[:, 0], judged.first.t[:, 0], conditionings(given_, judged.first.index))
            torch.testing.assert_close(judged.first.prediction[:, 0].double(), said, rtol=0, atol=1e-6)
        made.append(judged)
        moved(given_.policy.network, OFF, seed=step)
    assert made[0] is made[1]  # within a round nothing is sampled anew
    assert made[2] is made[3]
    resumed, again = at_work(d3po(round_pairs=2))
    resumed.stateful["round"].load_state_dict(Snapshot(again.policy, again.weights).state_dict() | {"kept": again.weights.copy()})
    moved(again.policy.network, OFF)
    next(resumed.source.steps(1, 2))  # in the middle of the round, by a policy that has moved on
    assert torch.equal(resumed.source._judged.first.x, made[0].first.x)
    assert torch.equal(resumed.source._judged.label, made[0].label)


def conditionings(given_: Any, index: Tensor) -> dict[str, Tensor]:
    return stacked(given_.prompts, index.tolist())


def test_two_processes_share_a_round() -> None:
    """One pair each is two pairs of one process: the same trajectories, prompts and verdicts, whoever makes them."""
    whole, _ = at_work(d3po(), accumulation=2, batch=8)
    shares = [at_work(d3po(), batch=8, processes=OneProcess(rank=rank, world=2))[0] for rank in (0, 1)]
    for batches in zip(*(learner.source.steps(0, 3) for learner in (whole, *shares)), strict=True):
        one, *parts = (b for (b,) in batches)
        assert sorted(one.pair.t.tolist()) == sorted(t for part in parts for t in part.pair.t.tolist())
        for k in range(len(one)):
            found = [
                (part, i)
                for part in parts
                for i in range(len(part))
                if part.index[i] == one.index[k] and part.pair.t[i] == one.pair.t[k]
            ]
            close = [(p, i) for p, i in found if (p.pair.winner[i] - one.pair.winner[k]).abs().max() < 1e-5]
            assert len(close) == 1
            ((part, i),) = close
            torch.testing.assert_close(part.pair.loser_next[i], one.pair.loser_next[k], rtol=0, atol=1e-5)
            assert part.label[i] == one.label[k]
            assert part.made_by.winner[i].item() == pytest.approx(one.made_by.winner[k].item(), abs=1e-6)


def test_what_cannot_be_a_round_is_refused() -> None:
    with pytest.raises(UserError, match=r"A round of 6 pairs is not a whole number of optimizer steps of 4 pairs \(accumulation"):
        at_work(d3po(), accumulation=4)
    with pytest.raises(UserError, match="steps of 4 pairs"):
        at_work(d3po(), accumulation=2, processes=OneProcess(world=2))
    with pytest.raises(UserError, match="needs a judge to reward pictures by \\(--reward\\)"):
        at_work(d3po(), judge=None)
    with pytest.raises(UserError, match="needs prompts to sample for"):
        at_work(d3po(), prompts=None)
    denoiser = small_denoiser()
    plan = RoundPlan(pairs=2, epochs=1, same_start=True, reference="round")
    with pytest.raises(UserError, match="only where they have noise: eta must be greater than 0"):
        Rounds(given(denoiser, denoiser, prompts=[0], judge=print), Sampling(eta=0.0), plan, dominance)
