"""Every notebook runs from top to bottom, with small numbers in its cell of parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from pipelines.tiny.model import pairs_path

TEXTS = ("text/plain", "text/markdown")
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@dataclass(frozen=True)
class Expected:
    """The parameters that make it quick, and what it must show and leave."""

    parameters: str
    pictures: int
    words: tuple[str, ...]
    files: tuple[str, ...]


EXPECTED = {
    "align_a_checkpoint": Expected(
        'data, output, settings = "pairs.parquet", "run", {"steps": 3, "validation_pairs": 8, "prompt_count": 4, '
        '"batch_size": 2, "accumulation": 1, "sampling_steps": 4, "tracker": "none"}',
        pictures=3,
        words=("win rate of the aligned model",),
        files=("run/pytorch_lora_weights.safetensors",),
    ),
    "score_images": Expected(
        'prompts, output, judges = 5, "pictures", ["tiny-pickscore", "oracle", "jpeg"]',
        pictures=2,
        words=("win rates", "P(guidance 4 before guidance 1.5) = 0.", "tiny-pickscore.z() + 0.5*saturation.z()"),
        files=("pictures/low/00004.png", "pictures/high/metadata.jsonl"),
    ),
    "optimize_prompts": Expected(
        'captions, candidates, sft_steps, steps, held_out, drawing_steps, output = 6, 2, 8, 3, 2, 3, "runs"',
        pictures=2,
        words=("pairs from 6 prompts", "as weighted", "0.0"),
        files=("runs/sem/model.safetensors", "runs/report/report.md", "runs/pairs.candidates.jsonl"),
    ),
}


def executed(name: str, folder: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = EXPECTED[name].parameters
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_stored_was_shown_by_one_run_and_tells_nothing_of_the_machine(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    pictures = [output for output in outputs if {"image/png", "image/jpeg"} & output.get("data", {}).keys()]
    assert len(pictures) >= EXPECTED[name].pictures
    forms = [[output.get("text", ""), *(output.get("data", {}).get(kind, "") for kind in TEXTS)] for output in outputs]
    absolute = re.compile(r"(?<![\w.<>:/])/\w[\w.-]*/")
    assert not [text for texts in forms for text in texts if absolute.search(text) or "site-packages" in text]


def test_every_notebook_is_tested() -> None:
    assert {p.stem for p in NOTEBOOKS.glob("*.ipynb")} == set(EXPECTED)


@pytest.fixture(autouse=True)
def fewer_pairs(tmp_path: Path) -> None:
    """A tenth of the tiny world's pairs, where the notebook on aligning is pointed to: a third of its time was their encoding."""
    pq.write_table(pq.read_table(pairs_path()).slice(0, 100), tmp_path / "pairs.parquet")


@pytest.mark.parametrize("name", EXPECTED)
def test_it_runs_and_shows_pictures_and_plots(name: str, tmp_path: Path) -> None:
    notebook, expected = executed(name, tmp_path), EXPECTED[name]
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= expected.pictures
    shown = "".join(o.get("text", "") + "".join(o.get("data", {}).get("text/html", "")) for o in outputs)
    assert all(word in shown for word in expected.words), [word for word in expected.words if word not in shown]
    assert all((tmp_path / file).is_file() for file in expected.files)
