"""What libraries say while they are imported and while they load stays off a user's terminal."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.families._quiet import quietly

LOADS_AND_ADDS_A_LORA = """
from pipelines.families import load_family
load_family("tiny").attach_lora(rank=2)
"""
MAKES_A_WRITER_TO_TRAIN = """
from pipelines.writers._lora import attach
from pipelines.writers.writer import Writer
writer = Writer.load("tiny")
attach(writer.model, rank=2, alpha=2, targets=None, dropout=0.0, seed=0)
"""
LOOKS_AT_A_LOGGER = """
import logging
from pipelines.families._quiet import quietly
with quietly():
    pass
print(logging.getLogger("diffusers").handlers)
"""


@pytest.mark.parametrize("code", [LOADS_AND_ADDS_A_LORA, MAKES_A_WRITER_TO_TRAIN], ids=["a family", "a writer"])
def test_a_fresh_process_says_nothing(code: str, tmp_path: Path) -> None:
    """With torchao and bitsandbytes installed, whose imports warn of other people's affairs."""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def state(name: str) -> tuple[list[logging.Handler], bool]:
    import diffusers.utils.logging  # noqa: F401 - sets it up

    return list(logging.getLogger(name).handlers), logging.getLogger(name).propagate


def test_what_was_said_is_kept_and_all_is_as_before() -> None:
    logger = logging.getLogger("diffusers.somewhere")
    before = state("diffusers")
    with pytest.raises(RuntimeError), quietly() as notes:
        logger.warning("a %s is missing", "key")
        raise RuntimeError
    assert notes == ["a key is missing"]
    assert state("diffusers") == before


def test_libraries_set_up_their_loggers_themselves() -> None:
    """Also where they are imported within for the first time: afterwards they speak as they mean to."""
    done = subprocess.run([sys.executable, "-c", LOOKS_AT_A_LOGGER], capture_output=True, text=True)
    assert "StreamHandler" in done.stdout
