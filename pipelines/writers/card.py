"""The model card of a trained writer: what it is, how to use it, and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.differences import flatten
from diffalign.written_aside import write_file
from pipelines import config
from pipelines.model_card import CARD, public, table
from pipelines.writers.sampling import MAX_REWRITE_TOKENS
from pipelines.writers.settings import PromptTrainSettings
from pipelines.writers.writer import Writer


def write(settings: PromptTrainSettings, summary: Mapping[str, Any], curves: Path | None, paper: str, writer: Writer) -> Path:
    """Write ``README.md`` into the run's folder. Absolute paths are cut to their last part, as a card is for others to read.

    Raises:
        UserError: the card could not be written; an older one stays.
    """
    base, kind = public(settings.model), "LoRA of the" if settings.adapter == "lora" else "version of the"
    name = summary["objective"]
    parts = [
        f"---\nlibrary_name: transformers\ntags: [text-generation, prompt-optimisation, diffalign, {name}]\n---\n",
        f"# {base}, trained by {name}\n",
        f"This is a {kind} prompt writer `{base}`, trained with diffalign by `{name}` ({paper}). It rewrites a plain prompt for",
        "a text-to-image model.\n",
        "## Use\n",
        _with_diffalign(settings, summary),
        _without_diffalign(settings, writer),
        _rewritten(summary["rewritten"]),
        f"## Training\n\n![Training curves]({curves.name})\n" if curves else "",
        _numbers("Weights by meaning (of the winners that it was trained on)", summary["weights"]),
        _numbers("Held-out rewrites, at the end", summary["validation"]),
        "## Data\n\n" + table(("field", "value"), flatten({"source": summary["rewrites"], **summary["rows"]}).items()),
        "## Configuration\n\n" + table(("field", "value"), flatten(config.as_tree(settings)).items()),
    ]
    path = settings.output / CARD
    write_file(path, "\n".join(part for part in parts if part))
    return path


def _with_diffalign(settings: PromptTrainSettings, summary: Mapping[str, Any]) -> str:
    measured = summary["weights"] is not None and settings.data.distances == "measured"
    embedding = public(settings.data.embedding) if measured else None  # the one that training measured distances in
    return (
        "```python\nfrom pipelines.writers.optimizer import PromptOptimizer\n\n"
        f"optimizer = PromptOptimizer.from_pretrained({_name(settings)!r}, embedding={embedding!r})\n"
        'rewrites = optimizer("a cat", n=4)\n```\n'
    )


def _without_diffalign(settings: PromptTrainSettings, writer: Writer) -> str:
    """A program that gives the same token ids to the model as diffalign and stops at the same ids."""
    encoding, template, name = writer.encoding(), writer.template, _name(settings)
    lora = settings.adapter == "lora"
    cls, package = ("AutoPeftModelForCausalLM", "peft") if lora else ("AutoModelForCausalLM", "transformers")
    begin = f"{encoding.begin} + " if encoding.begin else ""
    return "\n".join(
        [
            f"Without diffalign, by {'PEFT and ' if lora else ''}Transformers; greedy, as `--way beam -n 1` is:",
            f"\n```python\nimport torch\nfrom {package} import {cls}\nfrom transformers import AutoTokenizer, GenerationConfig\n",
            f'model, tokenizer = {cls}.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")',
            f"before, after = {template.before!r}, {template.after!r}  # what the writer is shown around a prompt",
            f'ids = {begin}tokenizer(before + "a cat" + after, add_special_tokens=False).input_ids',
            "model.generation_config = GenerationConfig()  # the base's own settings of sampling, penalties say, do not count",
            f"options = dict(max_new_tokens={MAX_REWRITE_TOKENS}, eos_token_id={encoding.ends}, pad_token_id={encoding.pad})",
            "tokens = torch.tensor([ids])",
            "written = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **options)",
            "print(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True).strip())\n```\n",
            f"Where `adapter_config.json` names a base that is not there, load the base and give it to "
            f'`PeftModel.from_pretrained(base, "{name}")`.\n'
            if lora
            else "",
        ]
    )


def _name(settings: PromptTrainSettings) -> str:
    return settings.output.absolute().name


def _rewritten(rows: list[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    cells = [(row["prompt"], row["before"], row["after"]) for row in rows]
    return "## Held-out prompts, rewritten before and after\n\n" + table(("prompt", "before", "after"), cells)


def _numbers(title: str, values: Mapping[str, float] | None) -> str:
    return "" if not values else f"## {title}\n\n" + table(("field", "value"), flatten(values).items())
