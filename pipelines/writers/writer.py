"""A writer: a causal language model that rewrites prompts, with its tokenizer and its template.

It is the commands' interface to every language model, as ``families._family.Family`` is to image models, and it is the
``diffalign.protocols.TextPolicy`` that is trained.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from pipelines.families._encoding import digest, tokenizer_digest
from pipelines.families._files import installed_into
from pipelines.families._frozen import frozen_copy
from pipelines.families._lora import is_attached, switched_off
from pipelines.families._names import NOTE_FILE
from pipelines.families._quiet import quietly
from pipelines.families._reading import torch_dtype
from pipelines.low_rank import joined
from pipelines.writers import _lora
from pipelines.writers._sources import ADAPTER_CONFIG, CONFIG_FILE, TINY, Merged, Origin, find, note_of, read, rows_of
from pipelines.writers.encoding import Encoding
from pipelines.writers.templates import Template, template_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Writer:
    """A language model with its tokenizer and template. It is frozen until ``attach_lora`` or ``train_fully`` is called.

    Dropout that the model's configuration asks for is switched off: a policy with the reference's weights must give the
    reference's probabilities. The dropout of an attached LoRA stays.

    Args:
        origin: where the writer was read from; None for one that was built in memory.
        merged: the LoRAs that are merged into the model's weights; None for none.

    Raises:
        UserError: the tokenizer has no end mark.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        template: Template,
        origin: Origin | None = None,
        merged: Merged | None = None,
    ) -> None:
        self.model = _without_dropout(model)  # the bare network, never a wrapper
        self.tokenizer, self.template, self.origin = tokenizer, template, origin
        self.merged = merged or Merged()
        self._network: nn.Module = model
        self._takes_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.requires_grad_(False)
        self.encoding()

    @classmethod
    def load(
        cls,
        where: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        template: str | None = None,
        base: str | None = None,
        instruction: str | None = None,
        system: str | None = None,
    ) -> Writer:
        """Load a writer on the CPU, in evaluation mode, with any LoRA merged into its weights.

        Args:
            where: ``tiny``, a folder, a hub id, or the folder of a LoRA that PEFT or diffalign wrote.
            dtype: float32, bfloat16 or float16.
            template: see ``templates.template_for``; None is the one that the writer was trained with, if that is on record, else
                ``auto``.
            base: base model of a LoRA, if it is not the one on record.
            instruction, system: turns of a chat template, in place of those on record (``templates.template_for``).

        Raises:
            UserError: there is no such writer, it is no causal language model, or it cannot be read.
        """
        origin = find(where, base=base)
        model, tokenizer, merged = read(origin, torch_dtype(dtype))
        if (template, instruction, system) == (None, None, None) and origin.template is not None:
            return cls(model, tokenizer, Template.from_record(origin.template), origin, merged)
        return cls(model, tokenizer, template_for(template or "auto", tokenizer, instruction, system), origin, merged)

    @property
    def name(self) -> str:
        """Name of the writer: ``tiny``, a hub id or a path; empty if it was built in memory."""
        return self.origin.name if self.origin else ""

    # ------------------------------------------------------------------------------------------------ as a text policy

    @property
    def network(self) -> nn.Module:
        """The module that training calls: the model, or the wrapper of it that ``with_network`` was given."""
        return self._network

    def with_network(self, network: nn.Module) -> Writer:
        """The same writer, called through a wrapper (DDP, autocast, compiled) of its model."""
        other = copy.copy(self)
        other._network = network
        return other

    def __call__(self, tokens: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        """``tokens`` [N, S] int64, ``mask`` [N, S] bool, padded at the right -> logits [N, S, V] in the model's dtype.

        Args:
            last: number of last positions to compute logits of, for a result [N, last, V]; None: all. With a large vocabulary
                logits take most of the memory.
        """
        keep = {"logits_to_keep": last} if last is not None and self._takes_last else {}
        logits = self._network(input_ids=tokens, attention_mask=mask.to(torch.int64), use_cache=False, **keep).logits
        return logits if last is None else logits[:, -last:]

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained, in a stable order: all after ``train_fully``, the adapter's after ``attach_lora``."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def adapter_off(self) -> AbstractContextManager[None]:
        """Context in which the writer is the model before training, to the bit.

        Raises:
            ValueError: there is no adapter.
        """
        return switched_off(self.model)

    # ------------------------------------------------------------------------------------------------ what is trained

    def attach_lora(
        self,
        rank: int = 8,
        alpha: float | None = None,
        targets: str | Sequence[str] | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Add a trainable float32 adapter and freeze the rest.

        Args:
            rank: rank of the adapter, at least 1.
            alpha: the adapter is scaled by alpha / rank; None: as large as ``rank``.
            targets: ends of layers' names, or ``all-linear``; None is PEFT's own choice for the architecture.
            dropout: dropout probability in the adapter, in [0, 1).
            seed: random seed of the adapter's first weights.

        Raises:
            UserError: a number is out of range, a target matches no layer, or a merged LoRA cannot be joined with another.
        """
        if self.has_adapter:
            raise ValueError("there is an adapter already")
        self.check_joinable()
        alpha = rank if alpha is None else alpha
        _lora.attach(self.model, rank=rank, alpha=alpha, targets=targets, dropout=dropout, seed=seed)
        self.model.train()

    def check_joinable(self) -> None:
        """Check that the merged LoRAs and a LoRA on top of them can be written as one LoRA on the whole model.

        Raises:
            UserError: a merged LoRA is more than a plain LoRA.
        """
        if self.merged.more:
            raise UserError(
                f"{self.merged.more} A LoRA of it, or on top of it, could not be written as one that other programs load: make a "
                f"whole model of it first (`diffalign export {self.name} --merge --out FOLDER`), or train the whole model "
                "(--adapter full)."
            )

    @property
    def has_adapter(self) -> bool:
        """Whether ``attach_lora`` has been called."""
        return is_attached(self.model)

    def train_fully(self) -> None:
        """Make every weight trainable, in float32."""
        if self.has_adapter:
            raise ValueError("the model carries an adapter; load the writer again to train all of it")
        self.model.float().requires_grad_(True).train()

    def frozen_copy(self, half: torch.dtype | None = None) -> Writer:
        """A second, frozen writer with the present weights: the reference of a full fine-tuning run.

        Args:
            half: dtype of autocast, for a copy of half the size that under autocast gives the model's own results; None: the
                model's dtype.
        """
        if self.has_adapter:
            raise ValueError("with an adapter, adapter_off() is the reference; no copy is needed")
        return Writer(frozen_copy(self.model, half), self.tokenizer, self.template, self.origin)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Switch gradient checkpointing on or off: less memory, about a third more time. It acts in training mode only.

        Raises:
            UserError: the architecture does not support it.
        """
        # Transformers 5.2x calls it activation checkpointing and warns of the older name
        names = ("activation_checkpointing", "gradient_checkpointing")
        name = next(n for n in names if hasattr(self.model, f"{n}_enable"))
        try:
            if on:
                getattr(self.model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
            else:
                getattr(self.model, f"{name}_disable")()
        except ValueError as error:
            raise UserError(f"{type(self.model).__name__} cannot use gradient checkpointing: {error}") from error

    # -------------------------------------------------------------------------------------------- encoding and writing

    def encoding(self, max_prompt_tokens: int | None = None, max_rewrite_tokens: int | None = None) -> Encoding:
        """The ``encoding.Encoding`` of prompts and rewrites as this writer's token ids, within these limits."""
        limits = {"max_prompt_tokens": max_prompt_tokens, "max_rewrite_tokens": max_rewrite_tokens}
        return Encoding(self.tokenizer, self.template, context=self.context, known=rows_of(self.model), **limits)

    @property
    def context(self) -> int | None:
        """Most tokens that the model can read, prompt and rewrite together; None if there is no limit."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> Writer:
        """Move the model to a device. Returns the writer itself."""
        self.model.to(device)
        return self

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context in which the model is in evaluation mode."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def fingerprint(self) -> Mapping[str, Any]:
        """Plain values of everything that the writer's rewrites depend on, but for seed and decoding."""
        config = {name: value for name, value in self.model.config.to_diff_dict().items() if name != "transformers_version"}
        return {
            "model": digest(self.model),
            "adapter": _lora.described(self.model) if self.has_adapter else "",
            "config": config | {"dtype": str(self.model.dtype)},
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": self.template.as_record(),
        }

    # --------------------------------------------------------------------------------------------------------- saving

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter into the folder ``path`` as PEFT does: ``PeftModel.from_pretrained(model, path)`` reads it, too.

        LoRAs that were merged into the writer on loading are part of it: the result is one LoRA on the whole model, and the ranks
        add up. The tokenizer and ``diffalign.json``, with the base model's name and the template, are written beside it. Other
        files in ``path`` stay.

        Raises:
            UserError: the files could not be written, the folder holds a whole model, or a merged LoRA is more than a plain LoRA;
                the folder is left as it was.
        """
        own, below = _lora.layers_of(self.model), self.merged.layers
        self.check_joinable()
        if not own and not below:
            raise ValueError("there is no adapter to save")
        if (Path(path) / CONFIG_FILE).exists():
            raise UserError(f"{path} holds a whole model; a LoRA beside it would be confused with it. Name another folder.")
        layers = joined({"": below}, {"": own})[""]
        config = _lora.config_for(layers, self.model) if below else _lora.config_of(self.model)
        whole, held = (self.origin.whole, self.origin.holds) if self.origin else ("", "")
        with installed_into(Path(path), last=ADAPTER_CONFIG) as folder:
            _lora.write(layers, config, folder, str(TINY) if whole == "tiny" else whole)
            self._save_tokenizer(folder)
            self._write_note(folder, "writer LoRA", note_of(whole, self.name if own and below else held, Path(path)))

    def save(self, path: str | Path) -> None:
        """Write model, tokenizer and generation settings into the folder ``path``. Other files in ``path`` stay.

        Raises:
            UserError: the files could not be written, or the folder holds a LoRA; the folder is left as it was.
        """
        if self.has_adapter:
            raise ValueError("the model carries an adapter: save_adapter writes it, loading it again merges it")
        if (Path(path) / ADAPTER_CONFIG).exists():
            raise UserError(f"{path} holds a LoRA; a whole model beside it would be confused with it. Name another folder.")
        with installed_into(Path(path), last=CONFIG_FILE) as folder, quietly():
            self.model.save_pretrained(folder)
            self._save_tokenizer(folder)
            self._write_note(folder, "writer", {"base_model": self.name})

    def _save_tokenizer(self, folder: Path) -> None:
        with quietly():
            self.tokenizer.save_pretrained(folder)

    def _write_note(self, folder: Path, kind: str, base: Mapping[str, Any]) -> None:
        note = {"kind": kind, **base, "template": self.template.as_record()}
        (folder / NOTE_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` without dropout: in dropout layers, and in other layers that hold a dropout probability."""
    with quietly():
        from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError("a writer is made of a model without adapters")
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model
