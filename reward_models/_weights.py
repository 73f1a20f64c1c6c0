"""Where a judge's weights are, and how they are read: never by running code that lies in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.base import JudgeError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """One file: ``file`` of the repository ``repo`` at ``revision`` on the Hugging Face hub, or ``local`` instead."""

    repo: str
    file: str
    revision: str | None = None
    local: Path | None = None


def path_of(source: Source, judge: str) -> Path:
    """The file on this machine, fetched from the hub if need be.

    Raises:
        JudgeError: it is not here and cannot be had; says which file, and how to get it.
    """
    if source.local is not None:
        path = source.local / source.file if source.local.is_dir() else source.local
        if not path.is_file():
            raise JudgeError(f"the weights of the judge {judge!r} should be in {path}; there is no such file")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source.repo, source.file, revision=source.revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise JudgeError(
            f"the judge {judge!r} needs {source.file} of {source.repo}, which is not on this machine and could not be fetched. "
            f"Where there is a connection, `hf download {source.repo} {source.file}` fetches it; "
            f"a file or folder that you have is used by weights=PATH"
        ) from error


def read_state(source: Source, judge: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a ``.pt``/``.bin``/``.pth`` file that holds nothing but tensors.

    Raises:
        JudgeError: the file is not here, or reading it would run code that it brings along.
    """
    path = path_of(source, judge)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return _unwrapped(_safe_load(path, judge))


def _safe_load(path: Path, judge: str) -> Any:
    from pickle import UnpicklingError

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # heads saved on a GPU load on a CPU, too
    except UnpicklingError as error:
        raise JudgeError(
            f"{path}, weights of the judge {judge!r}, holds Python objects besides tensors; loading it would run their code, "
            f"which is refused. Use a .safetensors copy, or a file of tensors alone"
        ) from error


def _unwrapped(saved: Any) -> dict[str, Tensor]:
    """The weights themselves, where a file wraps them with other things."""
    while isinstance(saved, Mapping) and isinstance(saved.get("state_dict"), Mapping):
        saved = saved["state_dict"]
    return dict(saved)


def fill(model: nn.Module, state: Mapping[str, Tensor], judge: str) -> None:
    """Put the weights into the model, which stays float32 whatever the file keeps; nothing may be missing or left over.

    Raises:
        JudgeError: they are those of another network; names some.
    """
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        raise JudgeError(
            f"the weights of the judge {judge!r} are not those of its network: {len(missing)} are missing "
            f"({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown ({', '.join(unknown[:3]) or 'none'})"
        )
    model.load_state_dict(dict(state))  # copies into the model's own float32
