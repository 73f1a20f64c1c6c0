"""The import rule of the three rooms, read from the sources: the first wrong arrow fails."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("diffalign", "pipelines", "reward_models")
FORBIDDEN = {
    "diffalign": {"diffusers", "transformers", "open_clip", "peft", "pipelines", "reward_models"},
    "reward_models": {"diffalign", "pipelines"},
    "pipelines": set(),
}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module a file names in an import statement, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level_imports(path: Path, modules: set[str]) -> set[str]:
    """Our modules that are imported when this one is."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= inner or {node.module}
    return found & modules


@pytest.mark.parametrize("room", ROOMS)
def test_no_wrong_arrow(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] == room
        for name in imports(path)
        if name.split(".")[0] in FORBIDDEN[room]
    ]
    assert wrong == []


def test_no_cycles_between_modules() -> None:
    modules = {module_of(p) for p in FILES}
    graph = {module_of(p): top_level_imports(p, modules) - {module_of(p)} for p in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    assert done == modules


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running ``code``."""
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(' '.join(sys.modules))"], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in out.stdout.split()}


def test_importing_the_core_brings_nothing_heavy() -> None:
    assert not loaded_after("import diffalign") & {"torch", "numpy", "diffusers", "transformers"}


def test_the_core_does_its_work_without_the_model_libraries() -> None:
    loaded = loaded_after("import diffalign.train, diffalign.objectives.diffusion_dpo, diffalign.data.cache, diffalign.evaluate")
    assert "torch" in loaded
    assert not loaded & FORBIDDEN["diffalign"]


def test_building_the_command_line_brings_nothing_heavy() -> None:
    loaded = loaded_after("from pipelines import cli; cli.build_parser(None)")
    assert "diffalign" in loaded
    assert not loaded & {"torch", "numpy", "diffusers", "transformers", "datasets", "pandas", "matplotlib"}


@pytest.mark.parametrize(
    "words, most", [(["-c", "import diffalign"], 0.3), (["-m", "pipelines.cli", "--help"], 1.0)], ids=["import", "help"]
)
def test_the_first_answer_is_quick(words: list[str], most: float) -> None:
    """The quickest of three, less what the interpreter itself takes: other tests run beside this one."""

    def seconds(words: list[str]) -> float:
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], capture_output=True, check=True)
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert seconds(words) - seconds(["-c", "pass"]) < most


def test_the_learning_steps_of_alignment_stand_in_the_loop_only() -> None:
    tiny = ROOT / "pipelines" / "tiny"
    allowed = {ROOT / "diffalign" / "updates.py", *(tiny / f"{name}.py" for name in ("train", "train_pickscore", "train_writer"))}
    found = {p for p in FILES if "optimizer.step()" in p.read_text()}
    assert found == allowed
    assert {p for p in FILES if "._updates.apply()" in p.read_text()} == {ROOT / "diffalign" / "train.py"}
