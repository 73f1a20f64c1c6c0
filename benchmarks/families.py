"""Which family of models trains under which objective, found out by doing it: the table of docs/families.md.

    python benchmarks/families.py                       print the table
    python benchmarks/families.py --write docs/families.md     and put it between its marks there

Runs ``tests/test_families_all.py`` and writes down which of its runs passed. A run trains a miniature of the genuine classes for
two steps through ``diffalign train``, goes on after a checkpoint to the bit, and has the result loaded by plain Diffusers. A cell
names the objectives whose run passed, so nothing is in the table that was not seen to work.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from diffalign import objectives
from pipelines.families._registry import registry
from pipelines.text_tables import Table

TESTS = Path(__file__).parent.parent / "tests" / "test_families_all.py"
MARKS = "<!-- families -->", "<!-- end of families -->"
ADAPTERS = {"lora": "LoRA", "full": "full fine-tuning"}
REMARK = (
    "*All* are {objectives}. Every one is a run of `tests/test_families_all.py` that passed (`python benchmarks/families.py` "
    "writes this table): trained, resumed to the bit, saved, and loaded by plain Diffusers."
)


class Outcomes:
    """A pytest plugin: what became of every test that has a family."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)  # (objective, family) -> adapter -> passed
        self._about: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._about = {item.nodeid: item.callspec.params for item in items if item.originalname == "test_a_run"}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        about = self._about.get(report.nodeid)
        if about is not None and (report.when == "call" or not report.passed):
            self.runs[about["objective"], about["family"]][about["adapter"]] = report.passed


def table(runs: dict[tuple[str, str], dict[str, bool]]) -> Table:
    """A row for each family, with the objectives whose runs passed by kind of adapter."""
    every = objectives.names(of_prompts=False)
    rows = []
    for family, declared in registry().items():
        passed = [[name for name in every if runs.get((name, family), {}).get(adapter)] for adapter in ADAPTERS]
        rows.append([family, ", ".join(declared.PIPELINES), *(_cell(names, every) for names in passed)])
    return Table("", ["family", "pipelines of Diffusers", *ADAPTERS.values()], rows, REMARK.format(objectives=", ".join(every)))


def _cell(passed: list[str], every: list[str]) -> str:
    return "all" if passed == every else ", ".join(passed) or "-"


def written(text: str, fresh: str) -> str:
    """``text`` with what stands between the marks replaced.

    Raises:
        ValueError: the marks are not there.
    """
    first, last = MARKS
    between = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    found, count = between.subn(lambda _: f"{first}\n{fresh}\n{last}", text)
    if count != 1:
        raise ValueError(f"there should be one {first} and one {last} after it; found {count}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a file with the marks, in which the table is put")
    args = parser.parse_args()
    outcomes = Outcomes()
    code = pytest.main(["-q", "-m", "slow or not slow", "-p", "no:cacheprovider", str(TESTS)], plugins=[outcomes])
    found = table(outcomes.runs).to_markdown()
    print(found)
    if args.write is not None:
        args.write.write_text(written(args.write.read_text(encoding="utf-8"), found), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
