"""Weights too large to be held twice: in one file or in several with an index, put into a network tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reward_models._weights import Source, path_of, read_state
from reward_models.base import JudgeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

INDEX = ".index.json"
FILES = ("model.safetensors" + INDEX, "model.safetensors", "pytorch_model.bin" + INDEX, "pytorch_model.bin")
"""What Transformers calls the weights of a repository, in the order in which it looks for them."""


def files_of(repo: str, judge: str, revision: str | None = None, weights: str | Path | None = None) -> list[Path]:
    """All files of the weights, on this machine, fetched from the hub if need be.

    ``weights``: None, a file, an index, a folder, or another repository of the hub.

    Raises:
        JudgeError: they are not here and cannot be had; says what was looked for.
    """
    there = Source.of(repo, FILES[0], revision, weights)
    if there.local is not None and not there.local.is_dir():
        return _behind(there, path_of(there, judge), judge)
    for name in FILES:
        source = Source(there.repo, name, revision, there.local)
        try:
            found = path_of(source, judge)
        except JudgeError:
            continue
        return _behind(source, found, judge)
    if there.local is not None:
        raise JudgeError(f"the weights of the judge {judge!r} should be in {there.local}; there is none of {', '.join(FILES)}")
    raise JudgeError(
        f"the judge {judge!r} needs the weights of {there.repo} ({', '.join(FILES)}), which are not on this machine and could "
        f"not be fetched. Where there is a connection, `hf download {there.repo}` fetches them; a folder that you have is used "
        f"by weights=PATH (in the shell --judge-options {judge}.weights=PATH)"
    )


def _behind(source: Source, found: Path, judge: str) -> list[Path]:
    """The file itself, or those that an index names, which lie beside it."""
    if not found.name.endswith(INDEX):
        return [found]
    names = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    folder = None if source.local is None else found.parent
    return [path_of(Source(source.repo, name, source.revision, folder), judge) for name in names]


def tensors(files: Sequence[Path], judge: str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after the other; the files are mapped into memory, not read as a whole.

    Raises:
        JudgeError: reading a file would run code that it brings along.
    """
    for file in files:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    yield name, opened.get_tensor(name)
        else:
            yield from _mapped(file, judge).items()


def _mapped(file: Path, judge: str) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError):
        return read_state(file, judge)  # of before 2020, which cannot be mapped; or not of tensors alone, which this refuses


def put(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]], judge: str, device: torch.device | str, dtype: torch.dtype
) -> list[str]:
    """Put the weights into a model on the ``meta`` device, each in its place; returns the names of those still missing.

    Each tensor is converted and moved as it comes and takes the place of the empty one, so that no second copy of the model
    is ever held, and weights that the class ties but the file does not stay apart.

    Raises:
        JudgeError: a name that the model does not have, or another shape.
    """
    from torch import nn

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, value in weights:
        if shapes.get(name) != tuple(value.shape):
            found = f"{name} of shape {tuple(value.shape)}"
            wanted = f"is of shape {shapes[name]} in its network" if name in shapes else "is unknown to its network"
            raise JudgeError(f"the weights of the judge {judge!r} are not those of its network: {found} {wanted}")
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, nn.Parameter(value.to(device, dtype), requires_grad=False))
    return sorted(name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta)
