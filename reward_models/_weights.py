"""Where a judge's weights are, and how they are read: never by running code that lies in the file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_models.base import JudgeError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """One file: ``file`` of the repository ``repo`` at ``revision`` on the Hugging Face hub, or ``local`` instead, which is the
    file itself or a folder that holds it by that name.
    """

    repo: str
    file: str
    revision: str | None = None
    local: Path | None = None

    @classmethod
    def of(cls, repo: str, file: str, revision: str | None = None, weights: str | Path | None = None) -> Source:
        """``weights`` as a user gives it: None, something on this machine, or another repository of the hub (``owner/name``)."""
        if weights is None:
            return cls(repo, file, revision)
        here = Path(weights).expanduser()
        if not here.exists() and _HUB_ID.fullmatch(str(weights)):
            return cls(str(weights), file, revision)
        return cls(repo, file, revision, here)


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.pt)(?<!\.pth)(?<!\.bin)(?<!\.safetensors)")


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
            f"a file or folder that you have is used by weights=PATH (in the shell --judge-options {judge}.weights=PATH)"
        ) from error


def read_tokenizer(kind: Any, where: str | Path, judge: str) -> Any:
    """``kind.from_pretrained(where)``. Where it finds no file, Transformers 5 makes a tokenizer that knows no word, and says
    nothing: every prompt would then be the same.

    Raises:
        JudgeError: there is no tokenizer; says how to get it.
    """
    place = Path(where).expanduser()
    try:
        found = kind.from_pretrained(str(place) if place.is_dir() else str(where))
        knows_words = found.unk_token_id not in found("a", add_special_tokens=False).input_ids
    except (OSError, ValueError):
        knows_words = False
    if not knows_words:
        raise JudgeError(
            f"the judge {judge!r} needs the tokenizer of {where}, which is not on this machine and could not be fetched. Where "
            f"there is a connection, `hf download {where} --include '*token*' 'vocab*' 'merges*'` fetches it; a folder that you "
            f"have is used by tokenizer=PATH (in the shell --judge-options {judge}.tokenizer=PATH)"
        )
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256, as ``sha256:...``, of what decides the tokens of a text, except the length at which it is cut: vocabulary, merges,
    rules and padding of a tokenizer of Transformers, wherever they were read from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # one of SentencePiece or of Python alone has none
    rules = json.loads(backend.to_str()) if backend else {"kind": type(tokenizer).__name__, "words": tokenizer.get_vocab()}
    for changing in ("truncation", "padding"):  # set anew by every call
        rules.pop(changing, None)
    told = json.dumps([rules, tokenizer.pad_token_id], sort_keys=True)
    return f"sha256:{hashlib.sha256(told.encode()).hexdigest()}"


def read_state(path: Path, judge: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a ``.pt``/``.bin``/``.pth`` file that holds nothing but tensors.

    Raises:
        JudgeError: reading the file would run code that it brings along, or it is no file of weights.
    """
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
    check_fit(model, state, judge)
    model.load_state_dict(dict(state))  # copies into the model's own float32


def check_fit(model: nn.Module, state: Mapping[str, Tensor], judge: str) -> None:
    """Raises JudgeError, naming some, unless the weights are those of the model by name and shape."""
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    other = sorted(name for name in wanted.keys() & state.keys() if wanted[name] != state[name].shape)
    if missing or unknown or other:
        told = {"are missing": missing, "are unknown": unknown, "have another size": other}
        raise JudgeError(
            f"the weights of the judge {judge!r} are not those of its network: "
            + ", ".join(f"{len(names)} {what} ({', '.join(names[:3]) or 'none'})" for what, names in told.items())
        )


def digest(path: Path) -> str:
    """SHA-256 of a file; that of a file in the hub's cache is its name there and costs nothing."""
    blob = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
