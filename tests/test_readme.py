"""What the README and the pages of docs/ name is there: links, commands, options, imports. (What their commands do:
test_slow_promises.)"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import cli

ROOT = Path(__file__).parent.parent
PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
OTHERS = {"--nproc_per_node", "--num_processes", "--config_file", "--dist", "-m", "-n", "-k", "-s", "-e", "--signal"}
"""Options of torchrun, Accelerate's launcher, pytest, pip and SLURM."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def spans() -> list[str]:
    """Code within sentences."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(TEXT))]


def commands() -> list[list[str]]:
    """Every ``diffalign ...`` that is given in full, as words."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in [*lines, *spans()]:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if len(words) > 1 and words[0].endswith("diffalign") and not {"...", "--help"} & {*words}:
                found.append(words[1:])
    return found


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_the_commands_were_found() -> None:
    assert len(commands()) > 40
    assert {words[0] for words in commands() if not words[0].startswith("-")} <= {*cli.command_names(), "world"}


@pytest.mark.parametrize("words", [w for w in commands() if len(w) > 2 and "|" not in " ".join(w)], ids=" ".join)
def test_a_command_is_understood(words: list[str]) -> None:
    """As the command line reads it, to the last option."""
    _, unknown = cli.build_parser(words[0]).parse_known_args(words)
    assert not unknown


def test_every_option_that_is_named_exists() -> None:
    of_benchmarks = {name for file in ROOT.glob("benchmarks/*.py") for name in re.findall(r'"(--[a-z-]+)"', file.read_text())}
    known = of_benchmarks | {
        name
        for command in cli.command_names()
        for parser in parsers(cli.build_parser(command))
        for action in parser._actions
        for name in action.option_strings
    }
    text = "\n".join([*spans(), *blocks("bash")])
    named = set(re.findall(r"(?<!\S)(?:--[a-z][\w-]+|-[a-z]\b)", text))
    assert len(named) > 60
    assert named - known <= OTHERS


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(PAGES[page]), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", prose(PAGES[page])):
        place, _, anchor = link.partition("#")
        if not link.startswith("http"):
            target = (page.parent / place).resolve() if place else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    named = set(re.findall(r"\]\(docs/([a-z-]+\.md)", PAGES[ROOT / "README.md"]))
    assert named == {page.name for page in PAGES} - {"README.md"}


def test_files_that_are_named_exist() -> None:
    text = "\n".join([*spans(), *blocks("bash")])
    named = set(re.findall(r"(?:tests|benchmarks|notebooks)/\w+\.\w+", text))
    assert len(named) > 12
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_python_examples_import_what_there_is() -> None:
    found = blocks("python")
    assert len(found) >= 3
    for block in found:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert all(importlib.import_module(alias.name) for alias in node.names)
