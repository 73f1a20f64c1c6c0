"""The model card: it must say how to load what lies beside it, and the lines it shows must run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from miniature import save_untrained
from miniatures import MINIATURES
from PIL import Image

from diffalign.errors import UserError
from pipelines import families
from pipelines.model_card import write_model_card

RECIPE = {
    "steps": 200,
    "lora": {"rank": 4, "alpha": 16.0},
    "learning_rate": 1e-5,
    "betas": [0.9, 0.999],
    "base": "/home/someone/models/base",
    "ema": False,
}
DATA = {"source": "pairs.parquet", "pairs": 600, "fingerprint": "abc123"}
SCORES = {
    "oracle": {"base": 0.512345, "tuned": 0.698765, "win rate": 0.81, "95 % interval": (0.76, 0.86)},
    "clip": {"base": 0.2, "tuned": 0.21},
}


def read(card: Path) -> tuple[dict, str]:
    _, front, body = card.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def write(output: Path, **changes) -> Path:
    return write_model_card(
        output, **{"objective": "diffusion-dpo", "base": "org/model", "recipe": RECIPE, "data": DATA, **changes}
    )


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_untrained(tmp_path / "base")


def run_the_lines(card: Path) -> dict:
    """Execute the card's Python block with two sampling steps."""
    [code] = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert "num_inference_steps" not in code
    scope: dict = {}
    exec(code.replace('"a prompt"', '"a red circle", num_inference_steps=1'), scope)
    return scope


def test_the_lines_for_a_lora_load_it(base: Path) -> None:
    family = families.load_family(base)
    family.attach_lora(rank=2, alpha=8)
    output = base.parent / "run"
    family.save_adapter(output)
    scope = run_the_lines(write(output, base="base"))
    assert scope["pipe"].unet.peft_config["default_0"].lora_alpha == 8
    assert scope["picture"].size == (64, 64)


def test_the_lines_for_a_whole_pipeline_load_it(base: Path) -> None:
    family = families.load_family(base)
    family.train_fully()
    output = base.parent / "run"
    family.save_pipeline(output)
    scope = run_the_lines(write(output, base="base"))
    assert scope["picture"].size == (64, 64)
    assert "LoRA" not in (output / "README.md").read_text()


@pytest.mark.parametrize("full", [True, False], ids=["whole", "lora"])
def test_the_lines_say_which_parts_there_are_none_of(full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers asks for SD3's third text encoder unless it is told that there is none."""
    monkeypatch.chdir(tmp_path)
    MINIATURES["sd3, of 3.5 and without T5"].save(tmp_path / "base")
    family = families.load_family("base")
    assert family.left_out == ("text_encoder_3", "tokenizer_3")
    if full:
        family.train_fully()
        family.save_pipeline("run")
    else:
        family.attach_lora(rank=2, alpha=8)
        family.save_adapter("run")
    told = {"pipeline_class": family.pipeline_class, "left_out": family.left_out}
    code = re.findall(r"```python\n(.*?)picture = ", write(tmp_path / "run", base="base", **told).read_text(), re.DOTALL)[0]
    exec(code, scope := {})
    assert scope["pipe"].text_encoder_3 is None and scope["pipe"].transformer is not None


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    front, _ = read(write(tmp_path, licence="openrail"))
    assert front["base_model"] == "org/model" and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "diffusers" and front["license"] == "openrail"
    assert {"lora", "diffusion-dpo", "text-to-image"} <= set(front["tags"])


def test_a_local_base_is_not_given_as_a_hub_id(tmp_path: Path) -> None:
    front, body = read(write(tmp_path, base="/home/someone/models/base"))
    assert "base_model" not in front and "license" not in front
    assert "/home/someone" not in body and "`base`" in body


def test_tables_hold_configuration_data_and_scores(tmp_path: Path) -> None:
    _, body = read(write(tmp_path, scores=SCORES))
    assert "| lora.rank | 4 |" in body and "| learning_rate | 1e-05 |" in body and "| ema | no |" in body
    assert "| fingerprint | abc123 |" in body
    assert "| judge | base | tuned | win rate | 95 % interval |" in body
    assert "| oracle | 0.5123 | 0.6988 | 0.81 | 0.76 to 0.86 |" in body
    assert "| clip | 0.2 | 0.21 |  |  |" in body
    assert "/home/someone" not in body


def test_a_report_with_judges_gives_both_tables(tmp_path: Path) -> None:
    report = {"prompts": 300, "judges": {"oracle": {"mean": {"base": 0.5, "tuned": 0.75}}}}
    _, body = read(write(tmp_path, scores=report, paper="arXiv 2311.12908", adapter="lora"))
    assert "| judge | mean.base | mean.tuned |" in body and "| oracle | 0.5 | 0.75 |" in body
    assert "| prompts | 300 |" in body
    assert "arXiv 2311.12908" in body and "load_lora_weights" in body


def test_a_cell_cannot_break_its_table(tmp_path: Path) -> None:
    _, body = read(write(tmp_path, recipe={"prompt": "a | b\nc"}))
    assert "| prompt | a \\| b c |" in body


def test_pictures_are_shown_where_they_are(tmp_path: Path) -> None:
    output = tmp_path / "run"
    (output / "plots").mkdir(parents=True)
    assert "![" not in write(output).read_text()
    for picture in (output / "samples.png", output / "plots" / "in.png", tmp_path / "out.png"):
        Image.new("RGB", (4, 4)).save(picture)
    inside = write(output, curves=output / "plots" / "in.png").read_text()
    assert "(samples.png)" in inside and "(plots/in.png)" in inside
    assert "(out.png)" in write(output, curves=tmp_path / "out.png").read_text()
    assert (output / "out.png").is_file()


def test_the_mode_of_a_card_is_what_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        card = write(tmp_path)
    finally:
        os.umask(before)
    assert card.stat().st_mode & 0o777 == 0o660


def test_a_card_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "nowhere").write_text("a file")
    with pytest.raises(UserError, match=r"nowhere/README.md could not be written"):
        write(tmp_path / "nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["nowhere"]
