"""Prepare the training of a prompt writer from its settings: encoded texts, distances, the writer and its reference.

rewrites      read and encoded; rows that do not fit are left out and counted; too many of them are an error
distances     between every winner and its prompt, in a frozen text embedding (Sem-DPO)
token rewards the log-ratios of every token between another writer and the start (TGDPO)
reference     the frozen start: the adapter switched off, or a second model
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.data.hold_out import shortfall, split_rows
from diffalign.data.texts import EncodedRewrites, Ragged, TextLoader
from diffalign.errors import UserError
from diffalign.learner import TextRunContext
from diffalign.likelihood import token_log_probs
from diffalign.objectives._about import EXPANSIONS
from diffalign.processes import Processes
from diffalign.protocols import LanguageModel
from diffalign.references import AdapterOff, Frozen, Snapshot
from diffalign.types import Texts
from diffalign.weights import TrainedWeights
from pipelines import devices
from pipelines.families._encoding import digest
from pipelines.progress import Bar, Progress
from pipelines.rewrite_pairs import Expansion, RewritePair, RewriteTable, read_expansions, read_rewrites
from pipelines.run import PRECISIONS, Say
from pipelines.semantics import distance, load_embedding
from pipelines.tiny import shipped
from pipelines.writers import _sources
from pipelines.writers.drift import Drift
from pipelines.writers.encoding import Encoded, Encoding, UnusableRow
from pipelines.writers.settings import PromptTrainSettings, RewriteSettings
from pipelines.writers.writer import Writer

TINY_EXPANSIONS, TINY_SEED = 4000, 5
"""Number and seed of the rewrites by the tiny world's people that ``--pairs tiny`` stands for in SFT."""


@dataclass(frozen=True)
class PreparedTexts:
    """Writer, reference and encoded data, ready for training."""

    writer: Writer
    weights: TrainedWeights
    reference: LanguageModel
    base_digest: str  # digest of the model before training: the reference's identity
    data: EncodedRewrites
    data_digest: str
    prompts: list[str]  # the prompt of each row of ``data``
    counts: Mapping[str, int]  # number of rows used, and of rows left out by reason
    train_rows: list[int]
    validation_rows: list[int]
    drift: Drift | None = None  # distances of the rows to train on


# ---------------------------------------------------------------------------------------------------------------- data


def open_rewrites(settings: PromptTrainSettings) -> RewriteTable:
    """Read the rows as texts.

    Raises:
        UserError: the data cannot be read, or lack columns or usable rows.
    """
    data, imitates = settings.data, settings.objective.about.data[0] == EXPANSIONS
    if imitates and settings.pairs == shipped.NAME:
        return tiny_expansions()
    if imitates:
        return read_expansions(settings.pairs, columns=data.columns, split=data.split)
    where = shipped.REWRITES if settings.pairs == shipped.NAME else settings.pairs
    return read_rewrites(where, columns=data.columns, split=data.split, ties=data.ties)


def tiny_expansions() -> RewriteTable[Expansion]:
    """Rewrites by the tiny world's people of captions of its train split."""
    from pipelines.tiny.rewriting import expansions

    found = expansions(TINY_EXPANSIONS, TINY_SEED)
    rows = tuple(Expansion(e.prompt, e.rewrite, origin=f"tiny:{n}") for n, e in enumerate(found, start=1))
    return RewriteTable(rows, "the tiny world's people", {"unusable": 0}, ())


@dataclass(frozen=True)
class EncodedRows:
    """Rows as texts and as token ids."""

    rows: list[RewritePair] | list[Expansion]
    encoded: list[Encoded]
    counts: Mapping[str, int]  # number of rows used, and of rows left out by reason


def encode(table: RewriteTable, writer: Writer, data: RewriteSettings, say: Say, gold: bool = False) -> EncodedRows:
    """Encode every row. Nothing is cut: rows that do not fit are left out.

    Args:
        gold: whether the objective learns from reference rewrites. If so, rows without one are left out, too.

    Raises:
        UserError: more than the share ``max_left_out`` of the rows are left out, or all of them.
    """
    bound = writer.context is not None and data.max_rewrite_tokens >= writer.context  # then the context is the limit
    encoding = writer.encoding(data.max_prompt_tokens, None if bound else data.max_rewrite_tokens)
    found = [(row, _encoded(row, encoding, gold)) for row in table]
    kept = [(row, got) for row, got in found if isinstance(got, Encoded)]
    problems = [got for _, got in found if isinstance(got, UnusableRow)]
    for problem in problems[:5]:
        say(f"left out {problem}")
    by_kind = {kind: sum(p.kind == kind for p in problems) for kind in dict.fromkeys(p.kind for p in problems)}
    unusable = len(problems) + table.left_out["unusable"]
    total = len(table) + table.left_out["unusable"]
    if not kept or unusable > data.max_left_out * total:
        listed = "; ".join(str(p) for p in [*problems, *table.problems][:3])
        raise UserError(
            f"{unusable} of {total} rows of {table.where} cannot be used, more than max_left_out ({data.max_left_out:g}) allows. "
            f"The first: {listed}. Raise max_prompt_tokens or max_rewrite_tokens where texts are too long, or max_left_out."
        )
    counts = {"rows": len(kept), **{f"left out, {why}": n for why, n in {**table.left_out, **by_kind}.items() if n}}
    return EncodedRows([row for row, _ in kept], [got for _, got in kept], counts)


def _encoded(row: RewritePair | Expansion, encoding: Encoding, gold: bool) -> Encoded | UnusableRow:
    if isinstance(row, Expansion):
        return encoding.row(row.origin, row.prompt, {"rewrite": row.rewrite})
    if gold and not row.gold:
        return UnusableRow(row.origin, "no gold", "there is no reference rewrite (column gold), which gold_weight learns from")
    texts = {"chosen": row.chosen, "rejected": row.rejected, **({"gold": row.gold} if gold else {})}
    return encoding.row(row.origin, row.prompt, texts)


def as_tokens(rows: EncodedRows, pad: int, distances: Tensor | None = None) -> EncodedRewrites:
    """The rows as ``diffalign.data.texts`` has them, with gold rewrites if they were encoded.

    Args:
        pad: token id for padding.
        distances: [N] distances of the preferred rewrites from their prompts.
    """
    weight = torch.tensor([row.weight for row in rows.rows])
    prompt = Ragged([e.prompt for e in rows.encoded])
    if isinstance(rows.rows[0], Expansion):
        winner = Ragged([e.rewrites["rewrite"] for e in rows.encoded])
        return EncodedRewrites(prompt, winner, winner, torch.ones(len(weight)), weight, pad=pad)
    gold = [e.rewrites.get("gold") for e in rows.encoded]
    return EncodedRewrites(
        prompt=prompt,
        winner=Ragged([e.rewrites["chosen"] for e in rows.encoded]),
        loser=Ragged([e.rewrites["rejected"] for e in rows.encoded]),
        label=torch.tensor([row.label for row in rows.rows]),
        weight=weight,
        distance=distances,
        scores=_scores(rows.rows),
        gold=Ragged(gold) if all(gold) else None,
        pad=pad,
    )


def _scores(rows: Sequence[RewritePair]) -> Tensor | None:
    """[N, 2] float32 scores of chosen and rejected, NaN for an unknown one; None if no row has a score."""
    both = [[float("nan") if s is None else s for s in (row.chosen_score, row.rejected_score)] for row in rows]
    found = torch.tensor(both, dtype=torch.float32)
    return None if bool(found.isnan().all()) else found


@dataclass(frozen=True)
class Distances:
    """The distances of the preferred rewrites from their prompts, and where they come from."""

    values: Tensor  # [N], 1 - cos, in [0, 2]
    embedding: str = "the data"  # name of the embedding
    fingerprint: str = ""  # fingerprint of the embedding; empty where the distances are a column of the data

    def drift(self, rows: Sequence[int], alpha: float) -> Drift:
        """The distances of some rows, for the writer's folder."""
        return Drift(alpha, self.embedding, self.fingerprint, self.values[list(rows)].tolist())


def distances_of(rows: EncodedRows, settings: RewriteSettings, say: Say, progress: Progress | None) -> Distances:
    """Measure the distances in an embedding, or read them from the data.

    Raises:
        UserError: the embedding cannot be loaded, or rows lack the distance that was to be read.
    """
    if settings.distances == "data":
        refuse_unmeasured(rows.rows)
        return Distances(torch.tensor([row.distance for row in rows.rows]))
    embedding = load_embedding(settings.embedding)
    prompts, winners = [row.prompt for row in rows.rows], [row.chosen for row in rows.rows]
    cut = sum(bool(lost) for lost in embedding.cut(winners))
    if cut:
        say(f"{cut} of {len(winners)} rewrites are longer than the embedding {settings.embedding} reads: their ends do not count")
    found = distance(embedding, prompts, winners, settings.embed_batch, progress)
    return Distances(found, embedding.name, embedding.fingerprint)


def refuse_unmeasured(rows: Sequence[RewritePair]) -> None:
    """Raise UserError if rows lack a distance of their own."""
    if lacking := [row.origin for row in rows if row.distance is None]:
        raise UserError(
            f"data.distances is data, but {len(lacking)} of {len(rows)} rows have no distance (the first: {lacking[0]}). "
            "Add the column, or let them be measured (--distances measured)."
        )


def digest_of(table: RewriteTable, settings: PromptTrainSettings, data: EncodedRewrites) -> str:
    """A digest of everything that training sees of the data."""
    sha = hashlib.sha256(json.dumps([table.fingerprint, settings.data.template]).encode())
    for side in (data.prompt, data.winner, data.loser, data.gold or []):
        for row in side:
            sha.update(len(row).to_bytes(4, "little") + torch.tensor(row).numpy().tobytes())
    if data.distance is not None:
        sha.update(data.distance.numpy().tobytes())
    for side in data.token_rewards or ():
        for row in side:
            sha.update(torch.tensor(row, dtype=torch.float32).numpy().tobytes())
    return sha.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- prepare


def load_writer(settings: PromptTrainSettings, say: Say) -> Writer:
    """Load the writer to start from, with any LoRA merged into it."""
    dtype = PRECISIONS[settings.compute.mixed_precision] if settings.adapter == "lora" else "float32"
    chosen = None if settings.data.template == "auto" else settings.data.template
    turns = {"instruction": settings.data.instruction, "system": settings.data.system}
    writer = Writer.load(settings.model, dtype=dtype, template=chosen, base=settings.base, **turns)
    if settings.adapter == "lora":
        writer.check_joinable()
    say(f"{settings.model}: {type(writer.model).__name__}, {writer.model.num_parameters() / 1e6:.1f} M parameters, {dtype}")
    return writer


def prepare(
    settings: PromptTrainSettings,
    table: RewriteTable,
    writer: Writer,
    accelerator: Accelerator,
    say: Say,
    progress: bool = True,
) -> PreparedTexts:
    """Encode and measure the data, and make the writer trainable.

    Raises:
        UserError: too many rows do not fit, an embedding or a writer is missing, or the data lack what the objective needs.
    """
    say(table.description)
    base_digest, rows = digest(writer.model), encode(table, writer, settings.data, say, wants_gold(settings))
    alpha = getattr(settings.objective, "alpha", 0.0)
    with Bar(progress and accelerator.is_main_process) as bar:
        found = distances_of(rows, settings.data, say, bar.advance) if alpha > 0 else None
        data = as_tokens(rows, writer.encoding().pad, found.values if found else None)
        if settings.data.token_rewards is not None:
            data = _rewarded(settings, data, writer, accelerator.device, bar.advance)
    prompts = [row.prompt for row in rows.rows]
    train_rows, validation_rows = (r.tolist() for r in split_rows(prompts, settings.data.validation_pairs, settings.seed))
    say(f"{len(train_rows)} rows to train on, {len(validation_rows)} for validation")
    if line := shortfall(settings.data.validation_pairs, len(validation_rows), len(prompts), "rows"):
        say(line)
    writer, reference = _attach(settings, writer, accelerator)
    weights = TrainedWeights(writer.model)
    data_digest = digest_of(table, settings, data)
    return PreparedTexts(
        writer=writer,
        weights=weights,
        reference=reference,
        base_digest=base_digest,
        data=data,
        data_digest=data_digest,
        prompts=prompts,
        counts=rows.counts,
        train_rows=train_rows,
        validation_rows=validation_rows,
        drift=found.drift(train_rows, alpha) if found else None,
    )


def wants_gold(settings: PromptTrainSettings) -> bool:
    """Whether the objective learns from reference rewrites."""
    return getattr(settings.objective, "gold_weight", 0.0) > 0


def check_dry(settings: PromptTrainSettings, table: RewriteTable, rows: EncodedRows) -> None:
    """Check the data and the other models as far as that is possible without measuring or training.

    Raises:
        UserError: an embedding or a writer is missing, or the data lack what the objective needs.
    """
    if not hasattr(settings.objective, "refuse_lacking"):
        return
    scores = as_tokens(rows, 0).scores
    has = {"gold"} if wants_gold(settings) else set()
    if scores is not None and not bool(scores.isnan().any()):
        has.add("scores")
    if settings.data.token_rewards is not None:
        _sources.find(settings.data.token_rewards)
        has.add("token_rewards")
    if getattr(settings.objective, "alpha", 0.0) > 0:
        refuse_unmeasured(rows.rows) if settings.data.distances == "data" else load_embedding(settings.data.embedding)
        has.add("distance")
    settings.objective.refuse_lacking(has)


def _rewarded(
    settings: PromptTrainSettings, data: EncodedRewrites, start: Writer, device: torch.device, progress: Progress
) -> EncodedRewrites:
    """``data`` with token rewards: the log-ratio of each token between another writer, trained by DPO, and ``start``."""
    from dataclasses import replace

    other = Writer.load(settings.data.token_rewards, template=None)
    if other.tokenizer.get_vocab() != start.tokenizer.get_vocab():
        raise UserError(
            f"token_rewards {settings.data.token_rewards} is a writer with another vocabulary than {settings.model}: its tokens "
            "are not these. Train it from the same start."
        )
    models = [model.to(device) for model in (other, start)]
    sides = [_token_ratios(models, data.prompt, side, settings.data.embed_batch, progress) for side in (data.winner, data.loser)]
    return replace(data, token_rewards=(sides[0], sides[1]))


@torch.no_grad()
def _token_ratios(
    models: Sequence[Writer], prompts: Sequence[Sequence[int]], side: Sequence[Sequence[int]], batch: int, progress: Progress
) -> list[list[float]]:
    """For each row the log-ratio of each token of ``side`` between the two ``models``."""
    out: list[list[float]] = []
    for low in range(0, len(side), batch):
        rows = range(low, min(low + batch, len(side)))
        texts = Texts.of([prompts[r] for r in rows], [side[r] for r in rows]).to(models[0].device)
        ratio = token_log_probs(models[0], texts) - token_log_probs(models[1], texts)
        out += [ratio[n][texts.completion[n]].tolist() for n in range(len(texts))]
        progress("rewarding tokens", len(out), len(side))
    return out


def _attach(settings: PromptTrainSettings, writer: Writer, accelerator: Accelerator) -> tuple[Writer, LanguageModel]:
    """Make parameters trainable and place everything on the device. Returns the writer and its reference."""
    frozen = None
    if settings.adapter == "full" and settings.objective.about.reference != "nobody":
        frozen = writer.frozen_copy(getattr(torch, PRECISIONS[settings.compute.mixed_precision]))
    make_trainable(settings, writer)
    writer.set_gradient_checkpointing(settings.compute.gradient_checkpointing)
    devices.refuse_sharding(accelerator, "A prompt writer")
    writer.to(accelerator.device)
    trained = writer.with_network(devices.wrapped(writer.model, accelerator))
    if settings.adapter == "lora":
        return trained, AdapterOff(trained)
    return trained, Frozen(frozen.with_network(devices.wrapped(frozen.model, accelerator)) if frozen else trained)


def make_trainable(settings: PromptTrainSettings, writer: Writer) -> None:
    """Attach the LoRA, or make every weight trainable.

    Raises:
        UserError: the LoRA does not fit the model.
    """
    lora = settings.lora
    if settings.adapter == "full":
        return writer.train_fully()
    targets = "all-linear" if lora.targets == ("all-linear",) else lora.targets
    writer.attach_lora(lora.rank, lora.lora_alpha, targets, lora.dropout, settings.seed)


# ------------------------------------------------------------------------------------------------------- run context


def run_context(settings: PromptTrainSettings, prepared: PreparedTexts, processes: Processes) -> TextRunContext:
    """The context that an objective's learner works with."""
    batch = settings.batch
    loader = TextLoader(
        prepared.data,
        prepared.train_rows,
        batch.batch_size,
        batch.accumulation,
        settings.seed,
        processes.rank,
        processes.world,
    )
    renewed = settings.loop.round_reference == "round"
    return TextRunContext(
        policy=prepared.writer,
        weights=prepared.weights,
        start=prepared.reference,
        texts=loader,
        reference=Snapshot(prepared.writer, prepared.weights) if renewed else None,
        processes=processes,
    )
