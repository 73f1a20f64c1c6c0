"""Every golden case, values, gradients and trajectories, against the numbers that the released codes gave.

The cases are those of the folder named by the variable DIFFALIGN_GOLDEN (default: tests/golden), so that the tests can be run on
cases that nobody here has seen. The tests themselves are in ``golden_dpo`` (Diffusion-DPO through the loop), ``golden_chain``
(what walks the chain: D3PO, DDPO, Diffusion-DRO, SmPO) and ``golden_losses`` (TRL's family, Diffusion-KTO, MaPO).
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("golden_dpo", "golden_chain", "golden_losses")

import golden_chain  # noqa: E402
import golden_dpo  # noqa: E402
import golden_losses  # noqa: E402
from golden_chain import *  # noqa: E402, F403
from golden_dpo import *  # noqa: E402, F403
from golden_losses import *  # noqa: E402, F403

NO_CASES = ("unet", "scheduler")
"""Folders of the network and the schedules that the cases share."""


def test_every_case_of_the_folder_is_run() -> None:
    """Whatever lies there is known to one of the tests, and there is something."""
    run = {*golden_dpo.CASES, *golden_chain.CASES, *golden_losses.CASES}
    there = {path for path in golden_dpo.GOLDEN.glob("*/*.json") if path.parent.name not in NO_CASES}
    assert there, f"no cases under {golden_dpo.GOLDEN}"
    assert there == run, f"not run: {sorted(there - run)}"
    if golden_dpo.GOLDEN == golden_dpo.OURS:
        assert {path.parent.name for path in there} == {*golden_losses.FOLDERS, "diffusion_dpo", "d3po", "ddpo", "dro", "smpo"}
