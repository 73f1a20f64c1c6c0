"""Stored trajectories and people's choices: what is read is what was written, and what is learnt is what was chosen."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judged import SEED, PromptsInMemory, at_work, gradients, moved
from safetensors import SafetensorError
from worlds import SHAPE, sd_alpha_bar, small_denoiser

from diffalign.errors import UserError
from diffalign.objectives.d3po import D3PO
from diffalign.processes import OneProcess
from diffalign.references import Frozen
from diffalign.schedule import NoiseSchedule
from diffalign.sources import store as store_module
from diffalign.sources.choices import read_choices
from diffalign.sources.rollout import Sampling, Trajectory, rollout
from diffalign.sources.rounds import TransitionBatch, densities, stacked
from diffalign.sources.store import Store, TrajectoryOrigin, schedule_fingerprint
from diffalign.sources.stored import Stored

SAMPLING = Sampling(steps=3, guidance=2.0)
OBJECTIVE = D3PO(rollout_steps=3, guidance=2.0)
PROMPTS = PromptsInMemory(dtype=torch.float64)
"""Five of them."""


def made_by(per_prompt: int = 2, **more: Any) -> TrajectoryOrigin:
    schedule = schedule_fingerprint(small_denoiser().schedule)
    return TrajectoryOrigin(SAMPLING, schedule, {"base": "abc"}, tuple(PROMPTS.prompts), per_prompt, True, 0, **more)


def trajectories(made: TrajectoryOrigin, numbers: range, by: float = 0.0) -> Trajectory:
    network = small_denoiser(torch.float64)
    moved(network.network, by)
    groups = [made.group(n) for n in numbers]
    empty = {name: value[None] for name, value in PROMPTS.conditioning(None).items()}
    how = {"shape": SHAPE, "start_seeds": groups, "unconditional": empty}
    found = rollout(network, network.schedule, stacked(PROMPTS, groups), SAMPLING, seeds=[100 + n for n in numbers], **how)
    return found.labelled(torch.tensor(groups))


@pytest.fixture
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PER_SHARD", 4)


def filled(folder: Path, made: TrajectoryOrigin | None = None, by: float = 0.0) -> Store:
    store = Store.create(folder, made or made_by())
    for numbers in store.missing():
        store.write(numbers, trajectories(store.made, numbers, by))
    return Store.open(folder)


def chosen(folder: Path, *rows: dict, by: float = 0.0) -> Stored:
    """Trajectories of a network that is ``by`` away from the start, with these choices; without any, the second ones win."""
    filled(folder, by=by)
    rows = rows or tuple({"chosen": f"{g:05d}-1", "rejected": f"{g:05d}-0"} for g in range(5))
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Stored.open(folder)


# --------------------------------------------------------------------------------------------------------------- store


def test_any_rows_come_back_to_the_bit_from_several_shards(short_shards: None, tmp_path: Path) -> None:
    store, whole = filled(tmp_path), trajectories(made_by(), range(10))
    assert [p.name for p in sorted((tmp_path / "trajectories").iterdir())] == [f"0000{i}.safetensors" for i in range(3)]
    numbers = [9, 0, 4, 4, 3]
    read = store.read(numbers)
    for name in ("x", "t", "t_previous", "log_density", "has_noise", "index", "start_seed", "seed"):
        assert torch.equal(getattr(read, name), getattr(whole, name)[numbers]), name
    assert (read.x.dtype, read.log_density.dtype, read.has_noise.dtype) == (torch.float32, torch.float64, torch.bool)
    assert read.prediction.shape == (5, 0, *SHAPE)
    assert read.index.tolist() == [4, 0, 2, 2, 1]
    assert (store.made, store.made.picture(9)) == (made_by(), "00004-1")


def test_a_stopped_rollout_goes_on_with_the_shards_that_are_missing(short_shards: None, tmp_path: Path) -> None:
    store = Store.create(tmp_path, made_by(), batch_size=3)
    assert store.missing() == [range(0, 6), range(6, 10)]  # whole batches
    made = trajectories(store.made, range(0, 6))
    store.write(range(0, 6), replace(made, start_seed=made.seed))  # tensors in shared memory are no trouble
    (tmp_path / "trajectories" / "00001.safetensors.partial").write_bytes(b"half")
    with pytest.raises(UserError, match="holds 6 of 10 trajectories: the rollout was stopped"):
        Store.open(tmp_path)
    again = Store.create(tmp_path, made_by(), batch_size=2)
    assert again.missing() == [range(6, 10)]
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(ValueError, match="shards are written whole"):
        again.write(range(6, 8), trajectories(store.made, range(6, 8)).rows([0]))


def test_trajectories_made_otherwise_are_not_mixed(tmp_path: Path) -> None:
    filled(tmp_path)
    Store.create(tmp_path, replace(made_by(), called={"model": "elsewhere"}))  # a name decides nothing
    others = replace(made_by(), seed=1, prompts=("a",), sampling=Sampling(steps=3, guidance=4.0), model={"base": "xyz"})
    with pytest.raises(UserError) as caught:
        Store.create(tmp_path, others)
    for part in (
        "made otherwise",
        "seed was 0 and is now 1",
        'and is now ["a"]',
        "sampling.guidance was 2.0 and is now 4.0",
        'model.base was "abc" and is now "xyz"',
    ):
        assert part in str(caught.value)
    assert len(Store.open(tmp_path).made) == 10


def test_a_folder_without_trajectories_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no trajectories in .* \(no rollout.json\): `diffalign rollout --out"):
        Store.open(tmp_path)
    filled(tmp_path / "a")
    shard = tmp_path / "a" / "trajectories" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(
        UserError, match=r"00000.safetensors is damaged: .* Delete it; the same `diffalign rollout` makes it again"
    ):
        Store.open(tmp_path / "a").read([3])
    about = tmp_path / "a" / "rollout.json"
    about.write_text(about.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(UserError, match="is of version 7, and this diffalign reads version 1"):
        Store.open(tmp_path / "a")
    about.write_text("{}")
    with pytest.raises(UserError, match=r"rollout.json is damaged \(KeyError\('version'\)\)"):
        Store.open(tmp_path / "a")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_what_was_there(
    error: Exception, short_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(tmp_path, made_by())
    store.write(range(0, 4), trajectories(store.made, range(0, 4)))

    def full(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(UserError, match="00001.safetensors could not be written: the disk is full.*What was there"):
        store.write(range(4, 8), trajectories(store.made, range(4, 8)))
    assert [p.name for p in (tmp_path / "trajectories").iterdir()] == ["00000.safetensors"]


def test_others_may_read_a_shard_as_the_umask_has_it(short_shards: None, tmp_path: Path) -> None:
    store, before = Store.create(tmp_path, made_by()), os.umask(0o027)
    try:
        store.write(range(0, 4), trajectories(store.made, range(0, 4)))
    finally:
        os.umask(before)
    (shard,) = (tmp_path / "trajectories").iterdir()
    assert shard.stat().st_mode & 0o777 == 0o640


def test_a_shard_that_a_kill_cut_short_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path, made_by())

    def killed(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write(range(10), trajectories(store.made, range(10)))
    assert Store.create(tmp_path, made_by()).missing() == [range(10)]


# -------------------------------------------------------------------------------------------------------------- choices


def said(tmp_path: Path, *lines: Any, per_prompt: int = 2) -> Any:
    path = tmp_path / "choices.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_choices(path, made_by(per_prompt))


def test_pairs_may_be_sure_unsure_or_ties_and_come_twice(tmp_path: Path) -> None:
    found = said(
        tmp_path,
        {"chosen": "00001-0", "rejected": "00001-1"},
        "",
        {"chosen": "pictures/00002-1.png", "rejected": "00002-0.png", "label": 0.7, "who": "Ada"},
        {"chosen": "00003-1", "rejected": "00003-0", "label": 0.5},
        {"chosen": "00001-1", "rejected": "00001-0", "judges": ["oracle"]},  # somebody else sees it otherwise
    )
    assert found.pairs == ((2, 3), (5, 4), (7, 6), (3, 2))
    assert found.labels == (1.0, 0.7, 0.5, 1.0)
    assert (len(found), found.ties, found.skipped, found.judged) == (4, 1, 0, 1)


def test_scores_of_seven_pictures_are_twenty_one_pairs_less_the_equal_ones(tmp_path: Path) -> None:
    different = [{"picture": f"00002-{k}", "score": s} for k, s in enumerate([3, 1, 4, 1.5, 9, 2, 6])]
    found = said(tmp_path, *different, per_prompt=7)
    assert len(found) == 21 and found.skipped == 0
    score = {14 + k: row["score"] for k, row in enumerate(different)}
    assert all(score[better] > score[worse] for better, worse in found.pairs)
    assert len({frozenset(pair) for pair in found.pairs}) == 21
    labels = [1, 0, 1, 1, 0, 1, 1]  # five good ones and two bad: 10 + 1 pairs are equal
    found = said(tmp_path, *({"picture": f"00000-{k}", "score": s} for k, s in enumerate(labels)), per_prompt=7)
    assert (len(found), found.skipped) == (10, 11)


def test_scores_compare_pictures_of_one_prompt_only(tmp_path: Path) -> None:
    rows = [{"picture": f"0000{g}-0", "score": g} for g in range(5)] + [{"picture": "00001-1", "score": 7}]
    assert said(tmp_path, *rows).pairs == ((3, 2),)


GOOD = {"chosen": "00001-0", "rejected": "00001-1"}
FORMS = r'A line reads \{"chosen": "00012-1", "rejected": "00012-0"\} or \{"picture": "00012-1", "score": 4\}'


@pytest.mark.parametrize(
    "lines, message",
    {
        "no json": ((GOOD, "chosen: 1"), rf"choices.jsonl, line 2: this is not JSON \(.*\). {FORMS}"),
        "no object": ((GOOD, "", "[1]"), rf"line 3: found '\[1\]'. {FORMS}"),
        "other fields": (({"winner": "00001-0", "loser": "00001-1"},), rf"line 1: found the fields 'loser', 'winner'. {FORMS}"),
        "half": (({"chosen": "00001-0"},), rf"line 1: found the fields 'chosen'. {FORMS}"),
        "both": (({**GOOD, "picture": "00001-0", "score": 1},), "line 1: found the fields 'chosen', 'picture'"),
        "unknown": (
            ({**GOOD, "rejected": "00005-0"},),
            "line 1: there is no picture '00005-0'; they are called 00000-0 to 00004-1",
        ),
        "no name": (({**GOOD, "rejected": 3},), "line 1: there is no picture 3; they are called"),
        "itself": (({**GOOD, "rejected": "00001-0"},), "line 1: '00001-0' is both chosen and rejected"),
        "two prompts": (
            ({**GOOD, "rejected": "00003-0"},),
            "'00001-0' and '00003-0' are pictures of different prompts, 'prompt 1' and 'prompt 3'; only pictures of one prompt",
        ),
        "label": (({**GOOD, "label": 1.5},), "line 1: label is 1.5; it is the probability that the chosen is preferred"),
        "no label": (({**GOOD, "label": "tie"},), "line 1: label is 'tie'; it should be a number"),
        "score": (({"picture": "00001-0", "score": True},), "line 1: score is True; it should be a number"),
        "not a number": (('{"picture": "00001-0", "score": NaN}',), "line 1: score is nan; it should be a number"),
        "twice": (
            ({"picture": "00001-0", "score": 1}, GOOD, {"picture": "00001-0", "score": 1}),
            "line 3: '00001-0' has a score already, in line 1; give one score to each picture",
        ),
        "empty": (("",), rf"choices.jsonl holds no choice. {FORMS}"),
        "all equal": (
            ({"picture": "00001-0", "score": 1}, {"picture": "00001-1", "score": 1.0}),
            "holds no choice: all 1 pairs of pictures have equal scores",
        ),
    }.values(),
)
def test_mistakes_are_told_with_file_and_line(lines: tuple, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        said(tmp_path, *lines)


def test_equal_prompts_of_two_groups_may_be_compared_by_name(tmp_path: Path) -> None:
    path, made = tmp_path / "c.jsonl", replace(made_by(), prompts=("1 hand", "1 hand"))
    path.write_text('{"chosen": "00001-0", "rejected": "00000-1"}\n')
    assert read_choices(path, made).pairs == ((2, 1),)


def test_ends_of_lines_within_a_text_end_no_line(tmp_path: Path) -> None:
    """JavaScript writes U+2028 as it is."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"chosen": "00001-0", "rejected": "00001-1", "note": "nice\u2028one\u0085"}\r\n', encoding="utf-8")
    assert len(read_choices(path, made_by()).pairs) == 1


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(UserError, match=rf"There is no .*choices.jsonl: it should hold people's choices, .*{FORMS[13:]}"):
        Stored.open(tmp_path)
    (tmp_path / "other.jsonl").write_bytes(b'{"chosen": "\xff"}')
    with pytest.raises(UserError, match="other.jsonl cannot be read as text in UTF-8"):
        Stored.open(tmp_path / "other.jsonl")


def test_what_there_is_in_numbers(tmp_path: Path) -> None:
    rows = [{"picture": f"00000-{k}", "score": 2} for k in (0, 1)]
    stored = chosen(tmp_path, *rows, GOOD, {"chosen": "00001-1", "rejected": "00001-0", "label": 0.5})
    expected = {"pairs": 2, "ties": 1, "equal_scores_skipped": 1, "prompts_with_choices": 1, "lines_by_judges": 0}
    assert stored.stats() == {**expected, "prompts": 5, "trajectories": 10}
    before = stored.fingerprint()
    assert json.loads(json.dumps(before)) == before
    (tmp_path / "choices.jsonl").write_text(json.dumps(GOOD))
    assert Stored.open(tmp_path / "choices.jsonl").fingerprint() != before


# --------------------------------------------------------------------------------------------------------------- source


def steps_of(stored: Stored, start: int, stop: int, objective: D3PO = OBJECTIVE, **more: Any) -> list[list[TransitionBatch]]:
    learner, _ = at_work(objective, feedback=stored, judge=None, **more)
    return [list(batches) for batches in learner.source.steps(start, stop)]


def flat(steps: list[list[TransitionBatch]]) -> list[TransitionBatch]:
    return [batch for batches in steps for batch in batches]


def test_a_step_takes_pairs_with_all_their_transitions(tmp_path: Path) -> None:
    """Two pairs of two usable transitions each (the third step has no noise), three to a micro-batch."""
    stored = chosen(tmp_path)
    (step,) = steps_of(stored, 0, 1, batch=3, accumulation=2)
    assert [len(batch) for batch in step] == [3, 1]
    whole, seen = trajectories(made_by(), range(10)), set()
    for batch in step:
        for i in range(len(batch)):
            group = int(batch.index[i])
            winner, loser = whole.rows([2 * group + 1]), whole.rows([2 * group])
            j = whole.t[0].tolist().index(int(batch.pair.t[i]))
            seen.add((group, j))
            for side, made, next_ in (("winner", winner, "winner_next"), ("loser", loser, "loser_next")):
                assert torch.equal(getattr(batch.pair, side)[i], made.x[0, j])
                assert torch.equal(getattr(batch.pair, next_)[i], made.x[0, j + 1])
                assert getattr(batch.reference, side)[i] == getattr(batch.made_by, side)[i] == made.log_density[0, j]
            assert int(batch.pair.t_previous[i]) == int(whole.t_previous[0, j])
            assert torch.equal(
                batch.pair.conditioning["encoder_hidden_states"][i], PROMPTS.conditioning(group)["encoder_hidden_states"]
            )
    assert len(seen) == 4 and {j for _, j in seen} == {0, 1}
    first = step[0]
    assert first.label.tolist() == [1.0] * 3 and first.rewards.isnan().all() and not first.advantage.any()


def test_the_noisy_end_alone_may_be_learnt_from(tmp_path: Path) -> None:
    (step,) = steps_of(chosen(tmp_path), 0, 1, replace(OBJECTIVE, timestep_fraction=0.34), batch=8, accumulation=2)
    assert flat([step])[0].pair.t.tolist() == [int(trajectories(made_by(), range(1)).t[0, 0])] * 2


def test_every_epoch_visits_every_pair_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    steps = steps_of(chosen(tmp_path), 0, 15)
    order = [int(batches[0].index[0]) for batches in steps]
    epochs = [order[:5], order[5:10], order[10:]]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    within = [[int(t) for t in batches[0].pair.t] for batches in steps]
    assert len({tuple(t) for t in within}) > 1  # transitions are shuffled as well


@pytest.mark.parametrize("reference", ["round", "start"])
def test_a_step_is_a_function_of_the_seed_and_its_number(reference: str, tmp_path: Path) -> None:
    """To the bit, though a resumed run has met other trajectories before; so nothing has to be saved."""
    stored, objective = chosen(tmp_path, by=2e-3), replace(OBJECTIVE, reference=reference)
    learner, _ = at_work(objective, feedback=stored)
    assert learner.stateful == {}
    whole, rest = steps_of(stored, 0, 7, objective, accumulation=2), steps_of(stored, 4, 7, objective, accumulation=2)
    for one, other in zip(flat(whole[4:]), flat(rest), strict=True):
        assert torch.equal(one.pair.winner, other.pair.winner) and torch.equal(one.pair.t, other.pair.t)
        assert torch.equal(one.reference.winner, other.reference.winner)
        assert torch.equal(one.reference.loser, other.reference.loser)
    elsewhere = steps_of(stored, 0, 7, objective, accumulation=2, seed=SEED + 1)
    pairs = [[sorted({int(i) for b in step for i in b.index}) for step in steps] for steps in (whole, elsewhere)]
    assert pairs[0] != pairs[1]


def test_two_processes_take_what_one_takes(tmp_path: Path) -> None:
    stored = chosen(tmp_path)

    def keys(batches: list[TransitionBatch]) -> list[tuple[int, int]]:
        return sorted((int(i), int(t)) for b in batches for i, t in zip(b.index, b.pair.t, strict=True))

    one = steps_of(stored, 0, 4, accumulation=4, batch=3)
    two = [steps_of(stored, 0, 4, accumulation=2, batch=3, processes=OneProcess(rank, 2)) for rank in (0, 1)]
    for step in range(4):
        assert keys(one[step]) == sorted(keys(two[0][step]) + keys(two[1][step]))
    assert keys(two[0][0]) != keys(two[1][0])


def test_the_start_is_asked_once_for_each_trajectory_whatever_made_it(tmp_path: Path) -> None:
    stored, calls = chosen(tmp_path, by=2e-3), []
    network = small_denoiser(torch.float64)

    class Counted(Frozen):
        def __call__(self, x_t, t, conditioning):
            calls.append(len(x_t))
            return super().__call__(x_t, t, conditioning)

    objective = replace(OBJECTIVE, reference="start")
    _, given = at_work(objective, feedback=stored)
    given = replace(given, start=Counted(network))
    batches = flat([list(b) for b in objective.learner(given).source.steps(0, 11)])
    assert calls == [4] * 10  # both transitions, with and without the prompt; two epochs ask no second time
    whole = trajectories(made_by(), range(10), by=2e-3)
    under_start = densities(whole, Frozen(network), given, SAMPLING)
    for batch in batches:
        for i in range(len(batch)):
            j, group = whole.t[0].tolist().index(int(batch.pair.t[i])), int(batch.index[i])
            assert float(batch.reference.winner[i]) == pytest.approx(float(under_start[2 * group + 1, j]), abs=1e-9)
            assert float(batch.reference.loser[i]) == pytest.approx(float(under_start[2 * group, j]), abs=1e-9)
            assert abs(float(batch.reference.winner[i] - batch.made_by.winner[i])) > 1e-6


# ------------------------------------------------------------------------------------------------------------- learning


def test_the_model_that_made_them_has_no_margin_and_a_gradient_towards_the_chosen(tmp_path: Path) -> None:
    stored = chosen(tmp_path / "a")
    learner, given = at_work(OBJECTIVE, feedback=stored, judge=None)
    batch = next(iter(learner.source.steps(0, 1)))[0]
    outcome = learner.losses(batch)
    torch.testing.assert_close(outcome.loss, torch.full((2,), math.log(2.0), dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(outcome.metrics["margin"].abs().max()) < 1e-12
    assert "reward" not in outcome.metrics and "reward" in OBJECTIVE(batch, given.policy, given.unconditional).metrics
    pushed = gradients(outcome.loss.sum(), given.policy.network)
    # the same pairs chosen the other way round push the other way
    rows = [{"chosen": f"{g:05d}-0", "rejected": f"{g:05d}-1"} for g in range(5)]
    learner, given = at_work(OBJECTIVE, feedback=chosen(tmp_path / "b", *rows), judge=None)
    opposite = gradients(learner.losses(next(iter(learner.source.steps(0, 1)))[0]).loss.sum(), given.policy.network)
    assert pushed.abs().max() > 0
    torch.testing.assert_close(opposite, -pushed, rtol=1e-9, atol=1e-15)


def test_a_step_downhill_makes_the_chosen_likelier(tmp_path: Path) -> None:
    learner, given = at_work(OBJECTIVE, feedback=chosen(tmp_path), judge=None, accumulation=5, batch=10)
    batch = next(iter(learner.source.steps(0, 1)))[0]
    network = given.policy.network
    trained = [p for p in network.parameters() if p.requires_grad]
    for p, g in zip(trained, torch.autograd.grad(learner.losses(batch).loss.mean(), trained, allow_unused=True), strict=True):
        if g is not None:
            p.data -= 0.5 * g
    metrics = learner.losses(batch).metrics
    assert float(metrics["margin"].mean()) > 0 and float(metrics["accuracy"].mean()) > 0.8


def test_ties_give_no_gradient(tmp_path: Path) -> None:
    tie = {"chosen": "00001-1", "rejected": "00001-0", "label": 0.5}
    learner, given = at_work(OBJECTIVE, feedback=chosen(tmp_path, tie), judge=None, by=1e-3)
    outcome = learner.losses(next(iter(learner.source.steps(0, 1)))[0])
    assert outcome.metrics["tie"].tolist() == [1.0, 1.0] and not gradients(outcome.loss.sum(), given.policy.network).any()


def test_another_chain_is_refused(tmp_path: Path) -> None:
    stored = chosen(tmp_path)
    with pytest.raises(
        UserError, match="otherwise than this objective would: guidance was 2.0 and is now 5.0; steps was 3 and is now 4"
    ):
        at_work(D3PO(rollout_steps=4), feedback=stored)
    other = replace(small_denoiser(torch.float64), schedule=NoiseSchedule(sd_alpha_bar(), clean_end="first"))
    _, given = at_work(OBJECTIVE, feedback=stored)
    with pytest.raises(UserError, match='noise schedule of this run is not that of .*: clean_end was "one" and is now "first"'):
        OBJECTIVE.learner(replace(given, policy=other))
    with pytest.raises(ValueError, match="prompts that the run gives are not those"):
        OBJECTIVE.learner(replace(given, prompts=PromptsInMemory(4)))
    with pytest.raises(UserError, match="needs the prompts of the stored trajectories"):
        OBJECTIVE.learner(replace(given, prompts=None))
