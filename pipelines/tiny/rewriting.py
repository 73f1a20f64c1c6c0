"""How the tiny world's people rewrite a prompt: pairs of plain and expanded prompts, for supervised fine-tuning of a writer.

Logs of real prompts mix two habits, and so do these:

* the *careful* keep every claim of the prompt and add one to three style words of any kind;
* the *embellishers* add two or three words of the tasteful end of the traits (``reward_models.oracle.TASTE_WEIGHTS``) and change
  something that the prompt says: a colour, a shape, a size; or they drop the second object, or the background.

So a writer that imitates people has learnt taste and drift together. Preferring rewrites by their looks raises both;
what tells them apart is the distance between prompt and rewrite.

How often and how much is in the constants below. Everything is drawn from a ``numpy.random.Generator``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from pipelines.tiny import scenes
from reward_models import oracle
from reward_models.oracle import CaptionClaims

EMBELLISHERS = 0.5
"""Share of the rewrites that embellishers write."""
CAREFUL_WORDS = {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}
"""How many style words the careful add, and how often."""
EMBELLISHING_WORDS = {2: 1 / 2, 3: 1 / 2}
"""The same of embellishers."""
CHANGES = {"colour": 0.3, "shape": 0.3, "second object": 0.2, "size": 0.1, "background": 0.1}
"""What embellishers change, and how often; where a prompt has no such claim, the others share its part."""

TASTEFUL = tuple(words[int(oracle.TASTE_WEIGHTS[trait] > 0)] for trait, words in scenes.STYLE_WORDS.items())
"""The word of each trait's end that tastes better: vivid, outlined, shaded, clean, centred."""


@dataclass(frozen=True)
class Expansion:
    """A plain prompt and what somebody made of it; ``drifted`` says that the rewrite makes other claims than the prompt."""

    prompt: str
    rewrite: str
    drifted: bool


def expansions(n: int, seed: int, split: str = "train", embellishers: float = EMBELLISHERS) -> list[Expansion]:
    """``n`` rewrites of plain captions of a split; more of them begin with the same ones.

    For the train split, rewrites without their style are captions of the train split as well: nothing held out is given away.
    """
    return list(islice(_stream(seed, split, embellishers), n))


def _stream(seed: int, split: str, embellishers: float) -> Iterator[Expansion]:
    rng = np.random.default_rng(seed)
    while True:
        _, prompt = scenes.draw_captioned(rng, split, styled=0.0)
        yield embellished(prompt, rng) if rng.random() < embellishers else careful(prompt, rng)


# ------------------------------------------------------------------------------------------------------------------ habits


def careful(prompt: str, rng: np.random.Generator) -> Expansion:
    """The prompt and one to three style words, either end of a trait as likely as the other."""
    words = [scenes.STYLE_WORDS[trait][int(rng.integers(2))] for trait in _some(list(scenes.STYLE_WORDS), CAREFUL_WORDS, rng)]
    return Expansion(prompt, ", ".join([prompt, *words]), drifted=False)


def embellished(prompt: str, rng: np.random.Generator) -> Expansion:
    """The prompt with one of its claims changed, and two or three tasteful words."""
    words = _some(TASTEFUL, EMBELLISHING_WORDS, rng)
    return Expansion(prompt, ", ".join([changed(prompt, rng), *words]), drifted=True)


def changed(prompt: str, rng: np.random.Generator) -> str:
    """A caption that differs from the prompt in one claim, of a kind drawn by ``CHANGES``, and is of its split or for training.

    Raises:
        ValueError: the prompt names no object of the tiny world.
    """
    claims, allowed = oracle.read_caption(prompt), {"train", scenes.split_of(prompt)}
    if not claims.objects:
        raise ValueError(f"people rewrite captions of the tiny world only; there is no object in {prompt!r}")
    possible = {kind: [text for text in texts if scenes.split_of(text) in allowed] for kind, texts in _changes(claims).items()}
    kinds = [kind for kind, texts in possible.items() if texts]
    shares = np.array([CHANGES[kind] for kind in kinds])
    return str(rng.choice(possible[str(rng.choice(kinds, p=shares / shares.sum()))]))


def _changes(claims: CaptionClaims) -> dict[str, list[str]]:
    """Every caption with one claim changed, by the kind of the change; two objects never become the same."""
    fewer = [replace(claims, objects=claims.objects[:1], relation=None)] if len(claims.objects) > 1 else []
    other = {
        "colour": _swapped(claims, "colour", oracle.COLOURS),
        "shape": _swapped(claims, "shape", oracle.SHAPES),
        "second object": fewer,
        "size": _swapped(claims, "size", oracle.SIZES),
        "background": [replace(claims, background=None)] if claims.background else [],
    }
    return {kind: [write_caption(c) for c in others] for kind, others in other.items()}


def _swapped(claims: CaptionClaims, name: str, words: Iterable[str]) -> list[CaptionClaims]:
    out = []
    for i, one in enumerate(claims.objects):
        rivals = [word for word in words if getattr(one, name) not in (None, word)]
        for objects in ((*claims.objects[:i], replace(one, **{name: w}), *claims.objects[i + 1 :]) for w in rivals):
            if len({(o.colour, o.shape) for o in objects}) == len(objects):
                out.append(replace(claims, objects=objects))
    return out


def write_caption(claims: CaptionClaims) -> str:
    """The claims as ``scenes.plain_caption`` words them."""
    parts = [" ".join(word for word in ("a", o.size, o.colour, o.shape) if word) for o in claims.objects]
    ground = f" on a {claims.background} background" if claims.background else ""
    return (f" {claims.relation} ".join(parts) if claims.relation else parts[0]) + ground


def _some(words: Sequence[str], shares: dict[int, float], rng: np.random.Generator) -> list[str]:
    """So many of the words as drawn by ``shares``, in random order."""
    count = int(rng.choice(list(shares), p=list(shares.values())))
    return [str(word) for word in rng.permutation(list(words))[:count]]
