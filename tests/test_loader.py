"""Order, draws and batches are functions of seed and position alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from worlds import SHAPE, PairsInMemory

from diffalign.data.draws import Order, draw, fixed_draws
from diffalign.data.loader import LoaderSettings, PairLoader, validation_batches
from diffalign.types import PairBatch

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
    a, b = (draw(seed, 0, SHAPE, 1000, 0.5, True) for seed in (0, 1))
    assert not torch.equal(a.noise, b.noise)


def test_draws_have_the_right_distribution() -> None:
    draws = [draw(0, p, (1, 4, 4), 1000, 0.2, True) for p in range(3000)]
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
    a, b = (fixed_draws(0, row, SHAPE, 1000, 2) for row in (0, 1))
    assert not torch.equal(a[0].noise, b[0].noise)


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        PairLoader(PairsInMemory(4), [], LoaderSettings(batch_size=1))
