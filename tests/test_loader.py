"""Order, draws and batches are functions of seed and position alone."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import chain

import pytest
import torch
from worlds import SHAPE, PairsInMemory

from diffalign.data.ahead import Stopwatch
from diffalign.data.draws import Curriculum, Order, draw, fixed_draws
from diffalign.data.loader import LoaderSettings, PairLoader, easiest_first, validation_batches
from diffalign.errors import UserError
from diffalign.levels import Levels
from diffalign.types import LENGTHS, PairBatch
from diffalign.waiting import Clock, Waiting

FIELDS = ("winner", "loser", "t", "noise", "label", "weight", "index")


def loaded(
    rank: int = 0, world: int = 1, batch: int = 4, accumulation: int = 1, steps: range = range(3), **options
) -> list[list[PairBatch]]:
    settings = LoaderSettings(batch_size=batch, accumulation=accumulation, seed=5, **options)
    return list(PairLoader(PairsInMemory(12), range(12), settings, rank, world).steps(steps.start, steps.stop))


def joined(batches: list[PairBatch]) -> dict[str, torch.Tensor]:
    out = {f: torch.cat([getattr(b, f) for b in batches]) for f in FIELDS}
    return {**out, "text": torch.cat([b.conditioning["encoder_hidden_states"] for b in batches])}


def test_every_epoch_visits_every_row_once_in_another_order() -> None:
    order = Order(10, seed=3)
    epochs = [[order.row(e * 10 + i) for i in range(10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 1, 4), (1, 2, 2), (2, 2, 1), (4, 1, 1), (2, 1, 2)])
def test_the_global_batch_does_not_depend_on_how_it_is_cut(world: int, batch: int, accumulation: int) -> None:
    whole = loaded(batch=4, prompt_dropout=0.3, flip=True)
    parts = [loaded(rank, world, batch, accumulation, prompt_dropout=0.3, flip=True) for rank in range(world)]
    for step in range(3):
        cut = joined([b for rank in range(world) for b in parts[rank][step]])
        for name, expected in joined(whole[step]).items():
            assert torch.equal(cut[name], expected), name


def test_starting_in_the_middle_gives_the_same_batches() -> None:
    late = loaded(steps=range(2, 5))
    for name, expected in joined([b for step in loaded(steps=range(5))[2:] for b in step]).items():
        assert torch.equal(joined([b for step in late for b in step])[name], expected), name


def test_another_seed_gives_other_draws() -> None:
    a, b = (draw(seed, 0, SHAPE, Levels(), 0.5, True) for seed in (0, 1))
    assert not torch.equal(a.noise, b.noise)


def test_draws_have_the_right_distribution() -> None:
    draws = [draw(0, p, (1, 4, 4), Levels(), 0.2, True) for p in range(3000)]
    t = torch.tensor([d.t for d in draws], dtype=torch.float64)
    assert t.min() >= 0 and t.max() <= 999
    assert abs(t.mean().item() - 499.5) < 20  # standard error 5.3
    assert abs(sum(d.flip for d in draws) / 3000 - 0.5) < 0.04
    assert abs(sum(d.drop_prompt for d in draws) / 3000 - 0.2) < 0.03
    noise = torch.stack([d.noise for d in draws])
    assert abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1) < 0.02
    neighbours = torch.stack([draws[i].noise.flatten() @ draws[i + 1].noise.flatten() for i in range(2999)])
    assert abs(neighbours.mean().item()) < 0.3  # standard error 0.07


def test_dropped_prompts_get_the_empty_one() -> None:
    pairs = PairsInMemory(12)
    empty = pairs.conditioning(None)["encoder_hidden_states"]
    text = joined([b for step in loaded(prompt_dropout=1.0) for b in step])["text"]
    assert all(torch.equal(row, empty) for row in text)


def test_a_flip_turns_both_pictures() -> None:
    pairs = PairsInMemory(12)
    flipped = 0
    for step in loaded(flip=True, latent_mode=True):
        for batch in step:
            for i, row in enumerate(batch.index.tolist()):
                sides = [torch.equal(getattr(batch, side)[i], pairs.moments(row, side, True)[0]) for side in ("winner", "loser")]
                assert sides[0] == sides[1]
                flipped += sides[0]
    assert 0 < flipped < 12


def test_posterior_samples_differ_between_the_sides_and_have_the_right_spread() -> None:
    pairs = PairsInMemory(12)
    batches = [b for step in loaded(steps=range(12)) for b in step]
    parts = {
        side: torch.cat(
            [
                (getattr(b, side)[i] - pairs.moments(r, side, False)[0])[None]
                for b in batches
                for i, r in enumerate(b.index.tolist())
            ]
        )
        for side in ("winner", "loser")
    }
    assert parts["winner"].std().item() == pytest.approx(0.1, rel=0.03)
    correlation = (parts["winner"] * parts["loser"]).mean() / 0.01
    assert abs(correlation.item()) < 0.03


def test_validation_draws_are_fixed_and_spread_over_time() -> None:
    settings = LoaderSettings(batch_size=4, seed=5)
    one, two = (validation_batches(PairsInMemory(12), [3, 7], settings, 10) for _ in range(2))
    assert all(torch.equal(a.noise, b.noise) and torch.equal(a.t, b.t) for a, b in zip(one, two, strict=True))
    t = torch.cat([b.t for b in one])
    assert Counter((t[:10] // 100).tolist()) == Counter(range(10))
    assert sorted(set(torch.cat([b.index for b in one]).tolist())) == [3, 7]


def test_fixed_draws_of_two_pairs_differ() -> None:
    a, b = (fixed_draws(0, row, SHAPE, Levels(), 2) for row in (0, 1))
    assert not torch.equal(a[0].noise, b[0].noise)


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        PairLoader(PairsInMemory(4), [], LoaderSettings(batch_size=1))


# ------------------------------------------------------------------------------------------------------------- waiting


def test_waiting_is_the_share_of_the_time_until_data_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    watch = Stopwatch()
    waiting = Waiting(watch)
    for wait, work in ((3.0, 1.0), (0.0, 8.0), (1.0, 7.0)):
        waiting.data_requested()
        with watch.running():
            clock[0] += wait
        clock[0] += work
        assert waiting.step_done() == {"waiting": wait / (wait + work)}
        clock[0] += 100.0  # validation
    assert waiting.share == 4 / 20
    assert Waiting(None).step_done() == {} and Waiting(None).share is None


def test_a_clock_goes_on_where_an_earlier_session_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def session(state: dict[str, float], waited: float, whole: float) -> Clock:
        watch = Stopwatch()
        clock = Clock(watch)
        clock.load_state_dict(state)
        now[0] += 1000.0  # loading
        clock.begin()
        clock.steps.data_requested()
        with watch.running():
            now[0] += waited
        now[0] += whole - waited
        clock.steps.step_done()
        return clock

    first = session({}, waited=1.0, whole=4.0)
    assert (first.seconds, first.earlier, first.waiting) == (4.0, 0.0, 0.25)
    second = session(first.state_dict(), waited=5.0, whole=6.0)
    assert (second.seconds, second.earlier, second.waiting) == (10.0, 4.0, 0.6)


class SlowPairs(PairsInMemory):
    """Every prompt takes 10 ms; ``made`` counts them."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.made, self._changed = 0, threading.Condition()

    def conditioning(self, pair_index: int | None) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        with self._changed:
            self.made += pair_index is not None
            self._changed.notify()
        return super().conditioning(pair_index)

    def wait_until_made(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.made >= count, timeout=60)


@pytest.mark.parametrize("works", [False, True])
def test_who_works_meanwhile_does_not_wait(works: bool) -> None:
    """A step is four pairs, 40 ms, and made while the one before it is used."""
    pairs = SlowPairs(12)
    loader = PairLoader(pairs, range(12), LoaderSettings(batch_size=4))
    first = 0.0
    for step, _ in enumerate(loader.steps(0, 5)):
        first = first or loader.waiting.seconds
        if works and step < 4:
            pairs.wait_until_made(4 * (step + 2))
    assert first > 0.01
    later = loader.waiting.seconds - first  # of four steps
    assert later < 0.08 if works else later > 0.12


# ------------------------------------------------------------------------------------------------------- a curriculum


GAPS = [0.5, 3.0, float("nan"), 0.1, -2.0, 0.5, 7.0, 0.0, 4.0, -0.3, 1.0, 6.0]
RANKED = [6, 11, 8, 1, 4, 10, 0, 5, 9, 3, 7, 2]
"""Places in GAPS, by size: equal ones in their own order, the unknown one last."""


def scored(gaps: list[float] = GAPS) -> PairsInMemory:
    pairs = PairsInMemory(len(gaps))
    loser = torch.linspace(-1, 1, len(gaps))
    pairs.scores = torch.stack([loser + torch.tensor(gaps), loser], dim=1)
    return pairs


def visited(
    pairs: PairsInMemory, steps: int, start: int = 0, rank: int = 0, world: int = 1, rows: range | None = None, **options
) -> list[list[int]]:
    """The rows of each step."""
    how = {"batch_size": 4, "curriculum": "margin", "curriculum_stages": 3, "steps": steps, "seed": 5, **options}
    loader = PairLoader(pairs, rows or range(len(pairs)), LoaderSettings(**how), rank, world)
    return [[i for b in step for i in b.index.tolist()] for step in loader.steps(start, steps)]


def test_without_a_curriculum_the_order_is_what_it_was_before_there_was_one() -> None:
    found = visited(scored(), 4, curriculum="none")  # of seed 5, written down then
    assert found == [[3, 1, 7, 11], [10, 0, 5, 9], [2, 4, 8, 6], [4, 1, 10, 0]]
    assert loaded()[0][0].t.tolist() == [482, 428, 194, 246]


def test_pairs_are_ranked_by_the_size_of_the_gap_and_unknown_ones_come_last() -> None:
    assert easiest_first(scored(), range(12)).tolist() == RANKED
    assert easiest_first(scored(), [3, 2, 1]).tolist() == [2, 0, 1]  # places among the rows that are trained on


@pytest.mark.parametrize("cumulative", [True, False])
def test_each_stage_visits_its_own_rows_in_epochs(cumulative: bool) -> None:
    """12 pairs and 9 steps in 3 stages: 12 positions each, over groups of 4."""
    steps = visited(scored(), 9, curriculum_cumulative=cumulative)
    for k in range(3):
        rows = list(chain(*steps[3 * k : 3 * k + 3]))
        allowed = RANKED[: 4 * k + 4] if cumulative else RANKED[4 * k : 4 * k + 4]
        for low in range(0, 12, len(allowed)):
            epoch = rows[low : low + len(allowed)]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(allowed), (k, low)
    assert steps[0] != steps[1]  # another order in the next epoch
    other = visited(scored(), 9, curriculum_cumulative=cumulative, seed=6)
    assert other != steps


def test_stages_of_steps_and_groups_of_rows_that_do_not_divide() -> None:
    """7 steps in 3 stages begin at 0, 2 and 4; 11 rows end at 3, 7 and 11. Beyond the last step it is still the last stage."""
    order = Curriculum(list(range(11)), 3, False, 7, 10, seed=0)
    assert [order.stage(10 * step) for step in range(9)] == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert order.stage(19) == 0 and order.stage(39) == 1
    for stage, low, high in ((0, 0, 3), (1, 3, 7), (2, 7, 11)):
        first = 20 * stage
        assert sorted(order.row(first + i) for i in range(high - low)) == list(range(low, high))


def test_two_stages_with_as_many_rows_have_orders_of_their_own() -> None:
    order = Curriculum(list(range(40)), 2, False, 2, 20, seed=0)
    assert [order.row(p) for p in range(20)] != [order.row(20 + p) - 20 for p in range(20)]


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 1, 4), (2, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize("cumulative", [True, False])
def test_a_curriculum_does_not_depend_on_how_a_batch_is_cut(world: int, batch: int, accumulation: int, cumulative: bool) -> None:
    whole = visited(scored(), 7, curriculum_cumulative=cumulative)
    how = {"batch_size": batch, "accumulation": accumulation, "curriculum_cumulative": cumulative}
    parts = [visited(scored(), 7, rank=rank, world=world, **how) for rank in range(world)]
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == whole


def test_a_curriculum_goes_on_in_the_middle() -> None:
    assert visited(scored(), 7, start=3) == visited(scored(), 7)[3:]


def test_a_curriculum_is_over_the_rows_that_are_trained_on() -> None:
    steps = visited(scored(), 3, rows=range(1, 7), curriculum_stages=3, curriculum_cumulative=False, batch_size=2)
    assert [set(step) for step in steps] == [{6, 1}, {4, 5}, {3, 2}]


@pytest.mark.parametrize(
    "gaps, steps, message",
    [
        (None, 9, "which these data do not have.*--reward.*--scores.*curriculum to none"),
        ([float("nan")] * 12, 9, "which these data do not have"),
        ([0.0] * 12, 9, "difference, which is zero for all of them: single pictures"),
        (GAPS, 2, "3 stages needs at least 3 pairs and 3 optimizer steps; there are 12 pairs and 2 steps"),
        (GAPS[:2], 9, "there are 2 pairs and 9 steps"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(gaps: list[float] | None, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        visited(PairsInMemory(12) if gaps is None else scored(gaps), steps)


def test_batches_for_a_gpu_are_pinned_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but lengths of prompts, by a thread whose current GPU is that of the process."""
    threads, devices = [], []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.current_thread())))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    for name, index in (("cuda:3", 3), ("cuda", 5)):
        threads.clear(), devices.clear()
        loader = PairLoader(WithLengths(4), range(4), LoaderSettings(batch_size=2), device=name)
        (first,), (second,) = loader.steps(0, 2)
        assert set(threads) == {thread for _, thread in devices} and threading.main_thread() not in threads
        assert [device for device, _ in devices] == [index]
        assert first.conditioning[LENGTHS].tolist() == [7, 7] and len(second) == 2
        assert len(threads) == 2 * (len(FIELDS) + 1)  # and the text
    monkeypatch.undo()
    (plain,) = next(PairLoader(WithLengths(4), range(4), LoaderSettings(batch_size=2)).steps(0, 1))
    assert plain.to("meta").conditioning[LENGTHS].device.type == "cpu"
    assert plain.to("meta").conditioning["encoder_hidden_states"].is_meta and plain.to("meta").host_noise is plain.noise


class WithLengths(PairsInMemory):
    """Pairs whose prompts have a number of tokens each."""

    def conditioning(self, pair_index: int | None) -> dict[str, torch.Tensor]:
        return {**super().conditioning(pair_index), LENGTHS: torch.tensor(7)}
