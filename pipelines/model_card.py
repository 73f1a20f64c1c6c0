"""The model card: what a result is, how to load it, and how it was made."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from diffalign.differences import flatten
from diffalign.written_aside import file_aside, write_file
from pipelines.families._names import LORA_FILE, PEFT_FILE
from pipelines.text_tables import table_lines

CARD = "README.md"
SAMPLES = "samples.png"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(
    output: str | Path,
    *,
    objective: str,
    base: str,
    recipe: Mapping[str, Any],
    data: Mapping[str, Any],
    base_loras: Sequence[str] = (),
    scores: Mapping[str, Any] | None = None,
    paper: str | None = None,
    curves: str | Path | None = None,
    licence: str | None = None,
    adapter: str | None = None,
    pipeline_class: str = "StableDiffusionPipeline",
    left_out: Sequence[str] = (),
) -> Path:
    """Write ``README.md`` into the folder of a finished model, and return its path.

    ``adapter`` is 'lora' or 'none' (the whole pipeline); None infers it from the files in ``output``. ``samples.png`` is shown if
    it is there. Absolute paths are cut to their last part: a card is meant to be given away.

    Args:
        base: the checkpoint that was aligned: a hub id, a path, or 'tiny'.
        base_loras: files of the LoRAs that were part of what was aligned, in the order they were merged.
        recipe: the resolved configuration; may be nested.
        data: what the preference data were (source, counts, fingerprint ...); may be nested.
        scores: what was measured; its entry ``judges`` (or all of it) has one entry per judge, a mapping of column to number,
            or to a pair of numbers, an interval.
        paper: citation of the objective.
        curves: a picture of the training curves; copied into ``output`` if it lies elsewhere.
        licence: identifier of the base model's licence, if known.
        left_out: parts of the pipeline that there are none of, which whoever loads it has to say.

    Raises:
        UserError: the card could not be written; an older one stays.
    """
    folder = Path(output)
    is_lora = (folder / LORA_FILE).is_file() if adapter is None else adapter == "lora"
    parts = [
        _front_matter(objective, base, licence, is_lora, folder),
        _introduction(objective, base, is_lora, paper),
        _below(base_loras, is_lora),
        _loading(folder, base, is_lora, pipeline_class, base_loras, left_out),
        _pictures(folder, curves),
        "" if not scores else _scores(scores),
        "## Data\n\n" + table(("field", "value"), flatten(data).items()),
        "## Configuration\n\n" + table(("field", "value"), flatten(recipe).items()),
    ]
    write_file(folder / CARD, "\n".join(part for part in parts if part))
    return folder / CARD


def _front_matter(objective: str, base: str, licence: str | None, is_lora: bool, folder: Path) -> str:
    import yaml

    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if _is_hub_id(base):
        fields |= {"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"}
    if licence:
        fields["license"] = licence
    fields["tags"] = [
        "diffusers",
        "text-to-image",
        "preference-alignment",
        "diffalign",
        objective,
        *(["lora"] if is_lora else []),
    ]
    if (folder / SAMPLES).is_file():
        fields["thumbnail"] = SAMPLES
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _is_hub_id(base: str) -> bool:
    return bool(_HUB_ID.fullmatch(base)) and not base.startswith(".") and not Path(base).exists()


def _introduction(objective: str, base: str, is_lora: bool, paper: str | None) -> str:
    what, name = "LoRA for" if is_lora else "version of", public(base)
    lines = [f"# {name}, aligned by {objective}", "", f"This is a {what} `{name}`, trained on preferences with diffalign."]
    return "\n".join([*lines, f"The method is `{objective}`{f': {paper}' if paper else ''}.", ""])


def _below(base_loras: Sequence[str], is_lora: bool) -> str:
    if not base_loras:
        return ""
    names = ", ".join(f"`{PurePath(lora).name}` of `{PurePath(lora).parent.name}`" for lora in base_loras)
    which = "It works only together with that, as below." if is_lora else "That is part of these weights."
    return f"What was aligned is the base with a LoRA merged into it: {names}. {which}\n"


def _stacked(name: str, base_loras: Sequence[str]) -> list[str]:
    """Lines that load several LoRAs, to act together."""
    folders = [(PurePath(lora).parent.name, PurePath(lora).name) for lora in base_loras] + [(name, LORA_FILE)]
    lines = [
        f'pipe.load_lora_weights("{folder}", weight_name="{file}", adapter_name="lora_{i}")'
        for i, (folder, file) in enumerate(folders)
    ]
    names = json.dumps([f"lora_{i}" for i in range(len(folders))])
    return [*lines, f"pipe.set_adapters({names})"]


def _loading(
    folder: Path, base: str, is_lora: bool, pipeline_class: str, base_loras: Sequence[str], left_out: Sequence[str]
) -> str:
    without = "".join(f", {part}=None" for part in left_out)
    name, imports = folder.absolute().name, [f"from diffusers import {pipeline_class}"]
    if is_lora and base_loras:
        lines = [f'pipe = {pipeline_class}.from_pretrained("{public(base)}"{without})', *_stacked(name, base_loras)]
        note = (
            f"`{public(base)}` stands for the base model, the folders for those of the LoRAs, `{name}` being this one. "
            "`diffalign export` makes one LoRA of them, or one model."
        )
    elif is_lora:
        lines = [f'pipe = {pipeline_class}.from_pretrained("{public(base)}"{without})']
        if (folder / PEFT_FILE).is_file():  # a pipeline without a loader of its own
            imports.append("from peft import PeftModel")
            lines.append(f'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "{name}")')
        else:
            lines.append(f'pipe.load_lora_weights("{name}", weight_name="{LORA_FILE}")')
        note = f"`{public(base)}` stands for the base model, `{name}` for this folder."
    else:
        lines = [f'pipe = {pipeline_class}.from_pretrained("{name}"{without})']
        note = f"`{name}` stands for this folder."
    code = "\n".join([*imports, "", *lines, 'picture = pipe("a prompt").images[0]'])
    return f"## Use\n\n```python\n{code}\n```\n\n{note}\n"


def _pictures(folder: Path, curves: str | Path | None) -> str:
    lines = []
    if (folder / SAMPLES).is_file():
        lines.append(f"## Samples\n\n![Samples at fixed seeds]({SAMPLES})\n")
    if curves is not None:
        lines.append(f"## Training\n\n![Training curves]({_beside(folder, Path(curves))})\n")
    return "\n".join(lines)


def _beside(folder: Path, picture: Path) -> str:
    """The picture's path as seen from ``folder``, after copying it there if it lies elsewhere."""
    if picture.resolve().is_relative_to(folder.resolve()):
        return picture.resolve().relative_to(folder.resolve()).as_posix()
    with file_aside(folder / picture.name) as aside:
        shutil.copyfile(picture, aside)
    return picture.name


def _scores(scores: Mapping[str, Any]) -> str:
    judges = scores.get("judges", scores)
    about = flatten({name: value for name, value in scores.items() if name != "judges"}) if "judges" in scores else {}
    rest = table(("field", "value"), about.items())
    return f"## Scores\n\n{_judge_table(judges)}" + (f"\n{rest}" if rest.count("\n") > 2 else "")


def _judge_table(judges: Mapping[str, Any]) -> str:
    rows = {judge: flatten(value) if isinstance(value, Mapping) else {"value": value} for judge, value in judges.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return table(("judge", *columns), [(judge, *(row.get(column, "") for column in columns)) for judge, row in rows.items()])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of values as ``public`` words them."""
    lines = table_lines(head, [[public(value) for value in row] for row in rows], padded=False)
    return "".join(f"{line}\n" for line in lines)


def public(value: Any) -> str:
    """A value as text: four digits of a float, no folders of the machine it was made on."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        numbers = len(value) == 2 and all(isinstance(v, float) for v in value)
        return (" to " if numbers else ", ").join(public(v) for v in value)
    if isinstance(value, PurePath) or (isinstance(value, str) and os.path.isabs(value)):
        return PurePath(value).name
    return str(value)
