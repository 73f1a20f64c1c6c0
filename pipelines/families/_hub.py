"""Files that are fetched from the hub, and the errors where they cannot be had."""

from __future__ import annotations

import re
from pathlib import Path

from diffalign.errors import UserError
from pipelines.families._names import INDEX_FILE, NOTE_FILE

LORA_ON_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(/(?P<file>.+\.safetensors))?")


class HubUnreachable(UserError):
    """Something on the hub is not here, and the hub cannot be asked: it may be as it should be."""


def lora_on_hub(name: str) -> Path:
    """The local copy of a file on the hub, or of a repository's LoRA files.

    Raises:
        UserError: it cannot be had.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    asked = LORA_ON_HUB.fullmatch(name)
    try:
        if asked["file"]:
            return Path(hf_hub_download(asked["repo"], asked["file"]))
        return Path(snapshot_download(asked["repo"], allow_patterns=["*.safetensors", NOTE_FILE]))
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise UserError(
            f"There is no LoRA at {name} here, and the hub could not give one: {' '.join(str(error).split())[:300]} "
            "Name a .safetensors file, a folder with one, or org/name or org/name/FILE on the hub."
        ) from error


def index_on_hub(name: str) -> Path:
    """The local copy of a pipeline's ``model_index.json``.

    Raises:
        HubUnreachable: it is not in the local cache, and the hub cannot be asked.
        UserError: there is no such pipeline, or it may not be had.
    """
    from huggingface_hub import errors, hf_hub_download

    local = "A local folder in the Diffusers layout, or a .safetensors file, works without the hub."
    try:
        return Path(hf_hub_download(name, INDEX_FILE))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubUnreachable(
            f"There is no folder {name} here, and the model {name} is neither in the local hub cache "
            f"nor could the hub be reached. {local}"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"The model {name} asks for an agreement: accept it on its page on the hub and log in. {local}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder {name} here and no model {name} on the hub (or it is private and you are not logged in)."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"The model {name} on the hub has no {INDEX_FILE}: it is not a Diffusers pipeline.") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise UserError(f"The hub could not give the model {name}: {error}. {local}") from error
