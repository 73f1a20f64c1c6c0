"""The reference asked beforehand: what is kept, when it is refused, and that training cannot tell the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from judged import PAIRS_OF, SEED, Case, gradients, moved, things_given
from threads import Process, in_threads
from torch import Tensor
from worlds import PairsInMemory, flow_denoiser, small_denoiser

from diffalign.data import cached_errors
from diffalign.data.buckets import BucketOrder
from diffalign.data.cache_files import CacheFolder
from diffalign.data.cached_errors import CachedErrors, cache_errors, with_known
from diffalign.data.draws import Curriculum, FixedDraws, Order
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.errors import StaleCacheError, UserError
from diffalign.levels import LevelDistribution, Levels
from diffalign.objectives._denoising import errors_beforehand
from diffalign.objectives.diffusion_dpo import DiffusionDPO
from diffalign.objectives.ipo import IPO
from diffalign.objectives.kto import KTO
from diffalign.objectives.mapo import MaPO
from diffalign.objectives.sft import SFT
from diffalign.references import Cached, Frozen
from diffalign.types import PairBatch

SHAPE = (4, 8, 8)
ABOUT = {"reference": "r", "precision": "float32", "encoded": {"data": "d"}, "schedule": {"T": 1000}}


def draws(count: int = 3, **more: Any) -> FixedDraws:
    return FixedDraws(count, 0, more.pop("levels", Levels()), **more)


class Asked:
    """A reference that is asked, and counts."""

    def __init__(self, kind: str = "pairs", make: Any = small_denoiser, fails_after: int | None = None) -> None:
        self.start, self.kind, self.fails_after = make(), kind, fails_after
        self.samples = self.calls = self.most = 0

    def __call__(self, batch: PairBatch) -> Tensor:
        if self.calls == self.fails_after:
            raise KeyboardInterrupt
        self.calls, self.samples, self.most = self.calls + 1, self.samples + len(batch), max(self.most, len(batch))
        return errors_beforehand(batch, Frozen(self.start), self.start.schedule, self.kind)


def kept(folder: Path, ask: Asked | None = None, pairs: Any = None, of: FixedDraws | None = None, **more: Any) -> CachedErrors:
    how = {"batch_size": 4, "depends_on": ABOUT, **more}
    return cache_errors(pairs or PAIRS_OF["pairs"](12), of or draws(), ask or Asked(), folder, **how)


# --------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("distribution", [LevelDistribution(), LevelDistribution("logit-normal", shift=3.0)])
def test_the_draws_of_a_row_cover_the_levels_in_an_order_of_its_own(distribution: LevelDistribution) -> None:
    levels = Levels(continuous=True, distribution=distribution)
    found = torch.tensor([[draws(8, levels=levels).draw(row, k, SHAPE).t for k in range(8)] for row in range(50)])
    bounds = torch.tensor([levels.at(part / 8) for part in range(9)])
    parts = torch.bucketize(found, bounds[1:-1])
    assert torch.equal(parts.sort(dim=1).values, torch.arange(8).expand(50, 8))  # one draw in each part
    assert all(len(set(column.tolist())) == 8 for column in parts.T)  # and at every epoch all parts
    assert len({tuple(row) for row in parts.tolist()}) > 45


def test_one_draw_has_the_distribution_of_a_free_one() -> None:
    t = torch.tensor([draws(1).draw(row, 0, (1, 1, 1)).t for row in range(4000)], dtype=torch.float64)
    assert t.mean().item() == pytest.approx(499.5, abs=15)
    assert t.std().item() == pytest.approx(1000 / 12**0.5, rel=0.03)
    assert t.min() >= 0
    assert t.max() <= 999


class OnlyNoisy(LevelDistribution):
    """Somebody's own: its fields are those of the plain one, its levels are not."""

    def quantile(self, u: Tensor) -> Tensor:
        return 0.8 + 0.2 * u


def test_a_distribution_of_somebodys_own_is_another_one(tmp_path: Path) -> None:
    plain, own = draws(), draws(levels=Levels(distribution=OnlyNoisy()))
    assert plain.draw(0, 0, SHAPE).t != own.draw(0, 0, SHAPE).t
    kept(tmp_path, of=plain)
    with pytest.raises(StaleCacheError, match="quantiles"):
        kept(tmp_path, of=own)
    kept(tmp_path / "own", of=own)
    kept(tmp_path / "own", Asked(fails_after=0), of=draws(levels=Levels(distribution=OnlyNoisy())))


def test_draws_are_functions_of_seed_row_and_number() -> None:
    one, same = (draws(3, prompt_dropout=0.5, flip=True).draw(5, 1, SHAPE) for _ in range(2))
    assert one.t == same.t
    assert torch.equal(one.noise, same.noise)
    assert torch.equal(one.posterior, same.posterior)
    others = [draws(3).draw(5, 2, SHAPE), draws(3).draw(6, 1, SHAPE), replace(draws(3), seed=1).draw(5, 1, SHAPE)]
    assert all(not torch.equal(one.noise, other.noise) for other in others)
    dropped = [draws(4, prompt_dropout=0.3).draw(row, k, (1, 1, 1)).drop_prompt for row in range(200) for k in range(4)]
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.05)
    flipped = [draws(4, flip=True).draw(row, k, (1, 1, 1)).flip for row in range(200) for k in range(4)]
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "order",
    [
        Order(10, seed=3),
        BucketOrder([0, 1, 0, 0, 1, 0], batch_size=2, seed=0),
        Curriculum(range(12), stages=3, cumulative=False, steps=60, global_batch=4, seed=0),
    ],
    ids=["order", "buckets", "curriculum"],
)
def test_one_visit_to_a_row_comes_after_the_other(order: Any) -> None:
    visits: dict[int, list[int]] = {}
    for position in range(200):
        visits.setdefault(order.row(position), []).append(order.visit(position))
    for numbers in visits.values():
        assert numbers == list(range(numbers[0], numbers[-1] + 1))  # none is left out, none comes again


def test_visits_to_a_row_that_comes_again_in_an_epoch() -> None:
    """Buckets of 13, 3 and 1 in batches of 4: 16, 4 and 4 places an epoch. One row has 4 visits in each; of the others some have
    one more, which the next epoch has as well."""
    order, epoch, visits = BucketOrder([0] * 13 + [1] * 3 + [2], batch_size=4, seed=0), 24, {}
    for number in range(10):
        for position in range(number * epoch, (number + 1) * epoch):
            visits.setdefault(order.row(position), []).append((number, order.visit(position)))
    assert sorted(visit for _, visit in visits[16]) == list(range(40))
    for row in range(16):
        assert {visit - number for number, visit in visits[row]} <= {0, 1}
        assert {visit for _, visit in visits[row]} >= set(range(10))
    blocks = [[(order.row(p), order.visit(p)) for p in range(first, first + 4)] for first in range(0, 240, 4)]
    assert all(len(set(block)) == 4 for block in blocks)


class Told:
    """Kept draws whose errors say which they are."""

    def __init__(self, of: FixedDraws, rows: int) -> None:
        self.draws = of
        codes = np.stack(np.meshgrid(np.arange(rows), np.arange(of.count), indexing="ij"), axis=-1).astype(np.float32)
        self.visited = CachedErrors(of, codes, {}, 0.0).visited


class InBuckets(PairsInMemory):
    """Thirteen pairs in one bucket, and one in another."""

    buckets, bucket_numbers = True, [0] * 13 + [2]

    def shape_of(self, row: int) -> tuple[int, ...]:
        return self.latent_shape


def test_a_pair_that_fills_a_batch_alone_has_another_draw_at_each_place() -> None:
    loader = PairLoader(InBuckets(14), range(14), LoaderSettings(4), cached_errors=Told(draws(8), 14))
    steps = [batch for (batch,) in loader.steps(0, 10)]  # two epochs
    alone = [batch for batch in steps if batch.index.tolist() == [13] * 4]
    assert len(alone) == 2
    assert torch.cat([batch.known[:, 1] for batch in alone]).sort().values.tolist() == list(range(8))  # all that there are
    for batch in alone:
        assert len(set(batch.t.tolist())) == 4 and len({noise.sum().item() for noise in batch.noise}) == 4
    for step, batch in enumerate(steps):
        assert len({tuple(both) for both in batch.known.tolist()}) == 4
        ((resumed,),) = loader.steps(step, step + 1)
        assert all(torch.equal(getattr(resumed, name), getattr(batch, name)) for name in ("index", "t", "noise", "known"))


# ------------------------------------------------------------------------------------------------------ what is on disk


def test_it_holds_what_the_network_says(tmp_path: Path) -> None:
    pairs, ask = PAIRS_OF["pairs"](12), Asked()
    found = kept(tmp_path, ask, pairs)
    assert (ask.samples, ask.most) == (12 * 3, 4)
    for row, epoch in [(0, 0), (7, 2), (11, 4)]:
        draw, errors = found.visited(row, epoch, SHAPE)
        (batch,) = next(PairLoader(pairs, [row], LoaderSettings(1)).steps(0, 1))
        x = {
            side: mean + std * draw.posterior[n]
            for n, side in enumerate(("winner", "loser"))
            for mean, std in [pairs.moments(row, side, False)]
        }
        by_hand = replace(
            batch, **{side: value[None] for side, value in x.items()}, t=torch.tensor([draw.t]), noise=draw.noise[None]
        )
        torch.testing.assert_close(errors[None], ask(by_hand).float(), rtol=1e-5, atol=0)
        assert errors.dtype == torch.float32


def test_it_is_asked_once(tmp_path: Path) -> None:
    first, again = Asked(), Asked()
    one, two = kept(tmp_path, first), kept(tmp_path, again)
    assert first.samples == 36
    assert again.calls == 0
    assert torch.equal(one.visited(3, 1, SHAPE)[1], two.visited(3, 1, SHAPE)[1])


def test_an_interruption_costs_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_errors, "LEAST", 1)
    pairs, whole = PAIRS_OF["pairs"](150), tmp_path / "whole"  # shards of three rows
    kept(whole, Asked(), pairs)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "broken", Asked(fails_after=7), pairs)  # three calls make a shard of nine draws
    rest = Asked()
    kept(tmp_path / "broken", rest, pairs)
    assert rest.samples == 150 * 3 - 2 * 9
    assert (tmp_path / "broken" / "errors.npy").read_bytes() == (whole / "errors.npy").read_bytes()
    assert not list((tmp_path / "broken").rglob("errors/*"))


@pytest.mark.parametrize("world", [1, 2])
def test_what_another_run_has_completed_meanwhile_is_not_asked_again(
    world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after this one has looked, and before this one has the lock."""
    locked, late = CacheFolder.locked, [Asked() for _ in range(world)]
    first: list[CachedErrors] = []

    def waiting(folder: CacheFolder, shared: bool = False, busy: object = None) -> Any:
        if not first:
            first.append(None)
            first[0] = kept(tmp_path)
        return locked(folder)

    monkeypatch.setattr(CacheFolder, "locked", waiting)
    found = in_threads(world, lambda process: kept(tmp_path, late[process.rank], processes=process))
    assert all(ask.calls == 0 for ask in late)
    assert all(torch.equal(one.visited(3, 1, SHAPE)[1], first[0].visited(3, 1, SHAPE)[1]) for one in found)


@pytest.mark.parametrize("harm", ["empty", "header", "cut", "other"])
def test_a_torn_shard_is_asked_again(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_errors, "LEAST", 1)
    kept(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "torn", Asked(fails_after=5))  # one call for each shard, a row's three draws
    shard = tmp_path / "torn/errors/00001.npy"
    content = shard.read_bytes()
    if harm == "other":
        np.save(shard, np.zeros((2, 3, 2), np.float32))
    else:
        shard.write_bytes(content[: {"empty": 0, "header": 20, "cut": len(content) - 4}[harm]])
    rest = Asked()
    kept(tmp_path / "torn", rest)
    assert rest.samples == (12 - 5 + 1) * 3
    assert (tmp_path / "torn/errors.npy").read_bytes() == (tmp_path / "whole/errors.npy").read_bytes()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"depends_on": {**ABOUT, "reference": "other"}}, "reference was"),
        ({"depends_on": {**ABOUT, "precision": "bfloat16"}}, "precision was"),
        ({"depends_on": {**ABOUT, "encoded": {"data": "other"}}}, "encoded.data was"),
        ({"depends_on": {**ABOUT, "schedule": {"T": 500}}}, "schedule.T was"),
        ({"of": draws(4)}, "draws.count was 3 and is now 4"),
        ({"of": draws(levels=Levels(distribution=LevelDistribution("mode")))}, "draws.levels.distribution.shape was"),
        ({"of": draws(prompt_dropout=0.1)}, "draws.prompt_dropout was"),
        ({"pairs": PairsInMemory(11)}, "pairs was 12 and is now 11"),
    ],
    ids=["reference", "precision", "data", "schedule", "count", "levels", "dropout", "pairs"],
)
def test_other_circumstances_are_refused_by_name(changed: dict, named: str, tmp_path: Path) -> None:
    kept(tmp_path)
    ask = Asked()
    with pytest.raises(StaleCacheError, match=named):
        kept(tmp_path, ask, **changed)
    assert ask.calls == 0


def test_of_many_differences_the_first_are_named_and_the_way_out(tmp_path: Path) -> None:
    kept(tmp_path, depends_on={**ABOUT, "encoded": {"data": {f"field {n}": n for n in range(9)}}})
    with pytest.raises(StaleCacheError) as caught:
        kept(tmp_path, depends_on={**ABOUT, "encoded": {"data": {f"field {n}": -1 for n in range(9)}}})
    message = str(caught.value)
    assert message.count(" and is now -1") == 6 and "encoded.data.field 5 was 5 and is now -1; and 3 more. " in message
    assert message.endswith("Name another folder (--reference-cache), or delete this one to make it anew.")


def test_a_folder_that_cannot_be_used_says_how_to_choose_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"folder for cached reference errors cannot .* Name another one \(--reference-cache\)"):
        kept(tmp_path / "file")
    with pytest.raises(UserError, match=r"is not a cache of diffalign; name an empty or a new folder \(--reference-cache\)"):
        kept(tmp_path)


def test_an_error_that_is_no_number_is_named(tmp_path: Path) -> None:
    def ask(batch: PairBatch) -> Tensor:
        return torch.where(batch.index[:, None] == 5, torch.nan, 1.0).expand(-1, 2)

    with pytest.raises(UserError, match="pair 5 at draw 0 is not finite"):
        kept(tmp_path, ask)


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_errors, "LEAST", 1)
    pairs, asks = PAIRS_OF["pairs"](20), [Asked() for _ in range(3)]
    in_threads(3, lambda process: kept(tmp_path / "three", asks[process.rank], pairs, processes=process))
    assert [ask.samples for ask in asks] == [21, 21, 18]  # shards of one row, three draws each
    kept(tmp_path / "one", Asked(), pairs)
    assert (tmp_path / "one" / "errors.npy").read_bytes() == (tmp_path / "three" / "errors.npy").read_bytes()


# ------------------------------------------------------------------------------------------------------------- training


def loaded(folder: Path, case: Case, rows: Sequence[int] = range(10), make: Any = small_denoiser) -> PairLoader:
    pairs, levels = PAIRS_OF[case.kind](12), make().schedule.levels()
    table = kept(folder, Asked(case.kind, make), pairs, draws(levels=levels))
    return PairLoader(pairs, rows, LoaderSettings(case.batch, seed=SEED, levels=levels), cached_errors=table)


CASES = {
    "diffusion-dpo": Case(DiffusionDPO(beta=500)),
    "hinge": Case(DiffusionDPO(beta=500, loss="hinge")),
    "ipo": Case(IPO(beta=500)),
    "kto": Case(KTO(beta=200)),
    "kto of pictures": Case(KTO(beta=200), kind="pictures"),
    "mapo": Case(MaPO()),
    "sft": Case(SFT()),
}


@pytest.mark.parametrize("make", [small_denoiser, flow_denoiser], ids=["epsilon", "flow"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_with_cached_errors_is_the_step_with_the_network(name: str, make: Any, tmp_path: Path) -> None:
    case, policy, start = CASES[name], make(), make()
    moved(policy.network)
    loader = loaded(tmp_path, case, make=make)
    network = case.objective.learner(replace(things_given(policy, Frozen(start), case, torch.float32), pairs=loader))
    known = case.objective.learner(replace(things_given(policy, Cached(), case, torch.float32), pairs=loader))
    for step in (0, 5, 12):  # of three epochs
        (batch,) = next(loader.steps(step, step + 1))
        one, two = network.losses(batch), known.losses(batch)
        torch.testing.assert_close(two.loss, one.loss, rtol=5e-4, atol=5e-5)
        before, now = (gradients(outcome.loss.mean(), policy.network) for outcome in (one, two))
        assert (now - before).norm() <= 1e-3 * before.norm()


def test_every_visit_of_an_epoch_has_the_draw_that_was_asked_about(tmp_path: Path) -> None:
    """At the start the policy is the reference: with any other draw the margin would not be zero."""
    loader, policy = loaded(tmp_path, CASES["diffusion-dpo"]), small_denoiser()
    learner = DiffusionDPO(beta=500).learner(things_given(policy, Cached(), CASES["diffusion-dpo"], torch.float32))
    seen: dict[int, list[float]] = {}
    for (batch,) in loader.steps(0, 20):  # four epochs
        margin = learner.losses(batch).metrics["margin"]
        torch.testing.assert_close(margin, torch.zeros_like(margin), rtol=0, atol=2e-3)
        for row, t in zip(batch.index.tolist(), batch.t.tolist(), strict=True):
            seen.setdefault(row, []).append(t)
    assert all(len(set(t)) == 3 and t[0] == t[3] for t in seen.values())  # three draws, and the first again


def test_held_out_pairs_bring_their_errors(tmp_path: Path) -> None:
    policy, start, case = small_denoiser(), small_denoiser(), CASES["mapo"]
    moved(policy.network)
    batches = validation_batches(PAIRS_OF["pairs"](12), [10, 11], LoaderSettings(2, seed=SEED), 3)
    ask = Asked()
    given = things_given(policy, Cached(), case, torch.float32)
    for plain, known in zip(batches, with_known(batches, ask), strict=True):
        one = case.objective.learner(replace(given, start=Frozen(start))).validate(plain)
        two = case.objective.learner(given).validate(known)
        for name in one.metrics:
            torch.testing.assert_close(two.metrics[name], one.metrics[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="asked about something else"):
        case.objective.learner(given).validate(batches[0])


def test_only_a_process_own_validation_is_asked_about() -> None:
    batches = validation_batches(PAIRS_OF["pairs"](12), [9, 10, 11], LoaderSettings(2, seed=SEED), 2)
    ask = Asked()
    found = with_known(batches, ask, Process(1, 2, Barrier(1), []))
    assert [b.known is not None for b in found] == [True, True, False]  # two calls each: the first is gone through by both
    assert ask.calls == 2


@pytest.mark.parametrize("kind", ["pairs", "pictures"])
def test_mismatched_prompts_are_nothing_that_was_asked_beforehand(kind: str, tmp_path: Path) -> None:
    case = Case(KTO(beta=200, baseline="mismatched"), kind=kind)
    loader, policy = loaded(tmp_path, case), small_denoiser()
    learner = case.objective.learner(replace(things_given(policy, Cached(), case, torch.float32), pairs=loader))
    (batch,) = next(loader.steps(0, 1))
    with pytest.raises(UserError, match="asked about something else"):
        learner.losses(batch)
