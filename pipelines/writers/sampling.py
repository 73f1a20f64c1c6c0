"""Decode several rewrites of each prompt: by sampling, by beam search, or by diverse beam search.

Samples are drawn by the Gumbel-max rule: independent Gumbel noise is added to the (warped) logits and the largest is taken, which
is a draw from their softmax. The noise depends on the seed, the prompt and the candidate's number alone. So the third rewrite of
a prompt is the same whatever else is in its batch, up to rounding: a batch of another shape may round a logit differently, and
the largest of two that are equal to the last digit may change. (Half precision rounds a thousand times more coarsely.)

Diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424) left Transformers with version 5; this is our own. The beams are
split into groups that search one after the other, each with ``diversity_penalty`` taken off a token's log-probability for every
earlier beam that has it at the same place (Hamming diversity). The paper's groups go in step; as a group never looks at a later
one, searching in turn is the same. With one beam per group, the default and the paper's advice, this is the paper's algorithm;
with more, later groups see the beams that an earlier group ended with, not those that it dropped on the way. End marks cost
nothing: rewrites should differ in what they say, not in their length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.types import widest
from pipelines.families._quiet import quietly
from pipelines.progress import Progress
from pipelines.writers.encoding import Encoding
from pipelines.writers.templates import clean
from pipelines.writers.writer import Writer

How = Literal["sample", "beam", "diverse-beam"]
MAX_REWRITE_TOKENS = 75
"""Promptist's limit; CLIP's text encoder reads 75 tokens and its two marks."""


@dataclass(frozen=True)
class Decoding:
    """A method of decoding rewrites, with its options. Each method uses only its own options.

    Args:
        how: ``sample``; ``beam``, the best beam first; ``diverse-beam``, the best beam of each group first, then the second best
            of each.
        temperature, top_p, top_k: warp the distribution that samples are drawn from, in the order temperature, top_k, top_p.
            ``top_k=0`` keeps all tokens.
        beams: number of beams over all groups; None: as many as candidates.
        groups: number of groups of diverse beam search; None: as many as beams.
        diversity_penalty: what diverse beam search takes off a token's log-probability, in nats, for every earlier beam that has
            the token at the same place.
        length_penalty: beams are compared by their log-probability over their length to this power.
        max_rewrite_tokens: the most tokens of a rewrite, its end mark included; a rewrite that has not ended by then is cut off
            there and is a ``Truncated``.
    """

    how: How = "sample"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int | None = None
    groups: int | None = None
    diversity_penalty: float = 1.0
    length_penalty: float = 1.0
    max_rewrite_tokens: int = MAX_REWRITE_TOKENS

    @staticmethod
    def of(options: Mapping[str, Any]) -> Decoding:
        """The decoding with these options, by their names.

        Raises:
            UserError: an option that decoding does not have.
        """
        names = [field.name for field in fields(Decoding)]
        if unknown := [name for name in options if name not in names]:
            raise UserError(f"Decoding has no option {unknown[0]!r}; its options are {', '.join(names)}.")
        return Decoding(**options)

    def checked(self, n: int) -> Decoding:
        """The same decoding with numbers in place of None, for ``n`` candidates of each prompt.

        Raises:
            UserError: a value out of range, or numbers that do not go together.
        """
        if self.how not in get_args(How):
            raise UserError(f"Rewrites are looked for by {', '.join(get_args(How))}; got {self.how!r}.")
        if n < 1:
            raise UserError(f"The number of candidates must be at least 1; got {n}.")
        if self.how == "sample" and not (self.temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            got = f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}"
            greedy = "" if self.temperature else " Greedy decoding is a beam of one: --way beam -n 1."
            raise UserError(f"Sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0 (0 is all); got {got}.{greedy}")
        beams = n if self.beams is None else self.beams
        groups = beams if self.groups is None else self.groups
        if beams < n:
            raise UserError(f"{beams} beams cannot give {n} candidates: beams must be at least as many.")
        if groups < 1 or beams % groups:
            raise UserError(f"{beams} beams cannot be split into {groups} groups of equal size.")
        if self.diversity_penalty < 0:
            raise UserError(f"diversity_penalty must be at least 0; got {self.diversity_penalty}.")
        return replace(self, beams=beams, groups=groups)


SAMPLE = Decoding("sample")


def candidates(
    writer: Writer,
    prompts: Sequence[str],
    n: int = 1,
    decoding: Decoding = SAMPLE,
    *,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[str]]:
    """``n`` rewrites of each prompt, in the prompts' order. Equal rewrites all stay; an empty rewrite becomes the prompt itself.

    Args:
        seed: random seed of samples; beam searches draw nothing.
        max_prompt_tokens: the most tokens of a prompt, its template included; None: what the model's context leaves.
        batch_size: sequences that are written at once.
        progress: called with ("writing", rewrites done, rewrites in all).

    Raises:
        UserError: a prompt is empty or too long, or a setting is out of range.
    """
    decoding = decoding.checked(n)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {batch_size}.")
    encoding = writer.encoding(max_prompt_tokens, decoding.max_rewrite_tokens)
    cleaned = [clean(prompt) for prompt in prompts]
    ids = {prompt: encoding.for_writing(prompt) for prompt in dict.fromkeys(cleaned)}
    job = _Job(writer, encoding, decoding, n, seed, batch_size, ids)
    found: dict[str, list[str]] = {prompt: [] for prompt in ids}
    done = 0
    with writer.writing(), _own_settings(writer):
        for prompt, rewrites in job.results():
            found[prompt] += [rewrite or prompt for rewrite in rewrites]
            done += len(rewrites)
            if progress is not None:
                progress("writing", done, n * len(ids))
    return [list(found[prompt]) for prompt in cleaned]


@contextmanager
def _own_settings(writer: Writer) -> Iterator[None]:
    """Context in which the model's generation settings are empty: a repetition penalty, say, would be added to our decoding."""
    from transformers import GenerationConfig

    kept = writer.model.generation_config
    writer.model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        writer.model.generation_config = kept


class Truncated(str):
    """A rewrite that was cut off at ``max_rewrite_tokens``, before it had ended."""


@dataclass(frozen=True)
class _Job:
    """The work of one call of ``candidates``."""

    writer: Writer
    encoding: Encoding
    decoding: Decoding
    n: int
    seed: int
    batch_size: int
    ids: Mapping[str, list[int]]  # token ids of each prompt

    def results(self) -> Iterator[tuple[str, list[str]]]:
        """Prompts with some or all of their rewrites, as these are finished."""
        if self.decoding.how == "sample":
            yield from self._samples()
        else:
            yield from self._beams()

    def _samples(self) -> Iterator[tuple[str, list[str]]]:
        rows = [(prompt, number) for prompt in self._by_length() for number in range(self.n)]
        for part in _parts(rows, self.batch_size):
            processors = [*self._warpers(), GumbelNoise(self.seed, part, self.encoding.ends)]
            written = self._written([prompt for prompt, _ in part], 1, 1, processors)
            for (prompt, _), rewrites in zip(part, written, strict=True):
                yield prompt, [self._text(rewrite) for rewrite in rewrites]

    def _beams(self) -> Iterator[tuple[str, list[str]]]:
        choice = self.decoding
        groups = choice.groups if choice.how == "diverse-beam" else 1
        width = choice.beams // groups
        for part in _parts(self._by_length(), max(1, self.batch_size // width)):
            by_group: list[list[list[_Ids]]] = []  # group, prompt, beam
            for _ in range(groups):
                earlier = [[beam.ids for group in by_group for beam in group[row]] for row in range(len(part))]
                penalties = [Hamming(earlier, width, choice.diversity_penalty, self._longest(part))] if by_group else []
                by_group.append(self._written(part, width, width, penalties))
            for row, prompt in enumerate(part):
                ranked = [group[row][rank] for rank in range(width) for group in by_group]
                yield prompt, [self._text(beam) for beam in ranked[: self.n]]

    def _text(self, written: _Ids) -> str:
        text = self.encoding.text(written.ids)
        return text if written.ended else Truncated(text)

    def _by_length(self) -> list[str]:
        """The prompts in order of their length: batches of similar length have the least padding."""
        return sorted(self.ids, key=lambda prompt: len(self.ids[prompt]))

    def _longest(self, prompts: Sequence[str]) -> int:
        return max(len(self.ids[prompt]) for prompt in prompts)

    def _warpers(self) -> list:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        choice, warpers = self.decoding, []
        if choice.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(choice.temperature)))
        if choice.top_k:
            warpers.append(TopKLogitsWarper(choice.top_k))
        if choice.top_p < 1:
            warpers.append(TopPLogitsWarper(choice.top_p))
        return warpers

    def _written(self, prompts: Sequence[str], beams: int, returned: int, processors: Sequence) -> list[list[_Ids]]:
        """For each prompt ``returned`` completions, up to their end mark and without it."""
        from transformers import GenerationConfig, LogitsProcessorList

        longest, encoding, model = self._longest(prompts), self.encoding, self.writer.model
        tokens = torch.full((len(prompts), longest), encoding.pad)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):  # padded at the left: all rewrites begin in the same column
            ids = self.ids[prompt]
            tokens[row, longest - len(ids) :], mask[row, longest - len(ids) :] = torch.tensor(ids), 1
        settings = GenerationConfig(
            do_sample=False,
            num_beams=beams,
            num_return_sequences=returned,
            max_new_tokens=self.decoding.max_rewrite_tokens,
            length_penalty=float(self.decoding.length_penalty) if beams > 1 else None,
            eos_token_id=encoding.ends,
            pad_token_id=encoding.pad,
        )
        device = self.writer.device
        with quietly():
            out = model.generate(
                tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([*self._only_real_tokens(), *processors]),
            )
        rows = [_before_end(row, encoding.ends) for row in out[:, longest:].tolist()]
        return [rows[i : i + returned] for i in range(0, len(rows), returned)]

    def _only_real_tokens(self) -> list:
        """A processor that suppresses outputs without a token: models round their number up to one that is quick to compute."""
        from transformers import SuppressTokensLogitsProcessor

        outputs, tokens = self.writer.model.get_output_embeddings().weight.shape[0], len(self.writer.tokenizer)
        if outputs <= tokens:
            return []
        return [SuppressTokensLogitsProcessor(list(range(tokens, outputs)), device=self.writer.device)]


def _parts(rows: Sequence, size: int) -> Iterator[Sequence]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


@dataclass(frozen=True)
class _Ids:
    """A rewrite's token ids up to its end mark and without it."""

    ids: list[int]
    ended: bool


def _before_end(ids: Sequence[int], ends: Sequence[int]) -> _Ids:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return _Ids(list(ids[:stop]), stop < len(ids))


# ------------------------------------------------------------------------------------------- logits processors


class GumbelNoise:
    """A logits processor after which the largest logit is a sample. Each call of ``generate`` needs one of its own.

    Args:
        rows: prompt and number of the candidate, for each row of the batch.
        ends: the ids after which a row has ended and needs no more noise.
    """

    def __init__(self, seed: int, rows: Sequence[tuple[str, int]], ends: Sequence[int]) -> None:
        self._generators = [np.random.default_rng(_key(seed, prompt, number)) for prompt, number in rows]
        self._ended = [False] * len(rows)
        self._ends = set(ends)
        self._begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._begun:
            newest = input_ids[:, -1].tolist()
            self._ended = [was or token in self._ends for was, token in zip(self._ended, newest, strict=True)]
        self._begun = True
        uniform = np.ones(scores.shape)
        for row, (generator, ended) in enumerate(zip(self._generators, self._ended, strict=True)):
            if not ended:
                generator.random(out=uniform[row])
        dtype = widest(scores)
        noise = torch.from_numpy(uniform).to(scores.device, dtype)
        noise = -(-noise.log()).log()  # u = 0 gives minus infinity, which is never taken; u = 1 is only in rows that have ended
        return scores.to(dtype) + noise.nan_to_num(posinf=0.0, neginf=-torch.inf)


def _key(seed: int, prompt: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, prompt, number]).encode()).digest()[:16], "little")


class Hamming:
    """A logits processor that makes tokens less likely where earlier beams have them.

    Args:
        earlier: for each prompt, the token ids of the beams of earlier groups, without end marks.
        width: beams of each prompt in the batch.
        penalty: nats off a token's score for each earlier beam that has it at the same place.
        begin: the column in which rewrites begin.
    """

    def __init__(self, earlier: Sequence[Sequence[Sequence[int]]], width: int, penalty: float, begin: int) -> None:
        self._earlier, self._width, self._penalty, self._begin = earlier, width, penalty, begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self._begin
        taken = torch.zeros(len(self._earlier), scores.shape[1])
        for row, beams in enumerate(self._earlier):
            for beam in beams:
                if place < len(beam):
                    taken[row, beam[place]] += 1
        return scores - self._penalty * taken.to(scores).repeat_interleave(self._width, dim=0)
