"""A LoRA under a run: part of the frozen start, of its identity, of the comparison, of the card, and of every later loading."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath

import huggingface_hub
import pytest
import torch
from diffusers import (
    FluxPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from layout_networks import flux, random_layers, sd3, sdxl
from miniature import make_adapter_matter, sample, save_untrained, write_pairs
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from diffalign.errors import UserError
from pipelines import families, lora_layouts
from pipelines.cli import main
from pipelines.families._encoding import digest
from pipelines.families._loras import checked, read_lora
from pipelines.families._names import LORA_FILE, METADATA, NOTE_FILE
from pipelines.families._quiet import quietly
from pipelines.families._sources import find, find_loras
from pipelines.low_rank import merge


@dataclass(frozen=True)
class Inputs:
    base: Path
    kohya: Path  # somebody's LoRA: rank 5, alpha 2, of UNet and text encoder, in kohya's layout
    pairs: Path
    layers: dict


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_untrained(folder / "base")
    pipe = families.load_pipeline(base, device="cpu")
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layers = {
        "unet": random_layers(pipe.unet, lambda n: n.endswith(("to_q", "to_v", "ff.net.2")), rank=5, alpha=2.0),
        "text_encoder": random_layers(pipe.text_encoder, rank=5, alpha=2.0, seed=1),
    }
    save_file(lora_layouts.written(layers, parts, "kohya"), folder / "old.safetensors")
    return Inputs(base, folder / "old.safetensors", write_pairs(folder / "data", 6), layers)


QUICK = {
    "steps": 2,
    "rank": 2,
    "alpha": 6,
    "targets": "to_q,to_k",
    "validation-pairs": 2,
    "validation-draws": 1,
    "batch-size": 2,
    "tracker": "none",
    "learning-rate": 0.05,
    "warmup-steps": 0,
    "evaluation.prompts": "none",
}
QUICKLY = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))] + ["--quiet"]


def train(inputs: Inputs, out: Path, *words: str | Path) -> int:
    where = ["--model", str(inputs.base), "--pairs", str(inputs.pairs), "--output", str(out)]
    return main(["train", "diffusion-dpo", *where, *QUICKLY, *map(str, words)])


@pytest.fixture(scope="module")
def result(inputs: Inputs) -> Path:
    out = inputs.base.parent / "result"
    assert train(inputs, out, "--base-lora", inputs.kohya) == 0
    return out


def plain(base: Path) -> StableDiffusionPipeline:
    with quietly():
        return StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


@pytest.fixture(scope="module")
def wanted(inputs: Inputs, result: Path) -> torch.Tensor:
    """The picture with both LoRAs loaded by Diffusers, one beside the other."""
    pipe = plain(inputs.base)
    with quietly():
        pipe.load_lora_weights(str(inputs.kohya.parent), weight_name=inputs.kohya.name, adapter_name="old")
        pipe.load_lora_weights(str(result), weight_name=LORA_FILE, adapter_name="new")
        pipe.set_adapters("old")
        old = sample(pipe)
        pipe.set_adapters(["old", "new"])
    both = sample(pipe)
    assert (both - old).abs().max() > 1e-3 and (old - sample(plain(inputs.base))).abs().max() > 1e-2
    return both


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def refused(capsys: pytest.CaptureFixture, *parts: str) -> None:
    err = " ".join(capsys.readouterr().err.split())
    assert all(part in err for part in parts), err


# -------------------------------------------------------------------------------------------------------------- loading


def test_one_of_the_hub_is_found_by_name_and_known_by_content(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local copy of the hub, as its library lays it out; the hub itself cannot be reached."""
    repo = tmp_path / "hub" / "models--somebody--style"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(
        inputs.kohya.parent, snapshot := repo / "snapshots" / ("0" * 40), ignore=lambda *_: {"base", "data", "result"}
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (plain,) = find_loras(inputs.kohya)
    for name in ("somebody/style", "somebody/style/old.safetensors", PureWindowsPath("somebody/style")):
        (found,) = find_loras(name)
        assert (found.sha256, found.hub) == (plain.sha256, "somebody/style/old.safetensors")
    moved = replace(found, path="/gone/old.safetensors")  # on another machine
    assert checked(moved) == str(snapshot / "old.safetensors")
    (snapshot / "old.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="was changed since"):
        checked(moved)


def test_it_is_merged_as_diffusers_merges_it(inputs: Inputs) -> None:
    pipe = plain(inputs.base)
    with quietly():
        pipe.load_lora_weights(str(inputs.kohya.parent), weight_name=inputs.kohya.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    merged = families.load_pipeline(inputs.base, base_lora=inputs.kohya, device="cpu")
    for part in ("unet", "text_encoder"):
        one, two = getattr(pipe, part).state_dict(), getattr(merged, part).state_dict()
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_it_is_merged_into_the_weights_that_the_adapter_is_switched_off_to(inputs: Inputs) -> None:
    """In bfloat16 the sum is made in float32 and rounded once."""
    family = families.load_family(inputs.base, dtype="bfloat16", base_lora=inputs.kohya)
    bare = families.load_family(inputs.base, dtype="bfloat16").network
    merge(inputs.layers["unet"], bare, "it")
    assert next(bare.parameters()).dtype == torch.bfloat16
    assert digest(family.network) == digest(bare) != digest(families.load_family(inputs.base, dtype="bfloat16").network)


def test_a_live_network_is_not_merged_into_again(inputs: Inputs) -> None:
    """A pipeline to sample from in the middle of training has the run's own network, and encoders that are read anew."""
    family = families.load_family(inputs.base, base_lora=inputs.kohya)
    before, text = digest(family.network), family.encoder.fingerprint()["text_encoder"]
    family.release_encoders()
    pipe = family.pipeline()
    assert pipe.unet is family.network and digest(pipe.unet) == before
    assert digest(pipe.text_encoder) == text != digest(families.load_pipeline(inputs.base, device="cpu").text_encoder)


@pytest.mark.parametrize("layout", ["diffusers", "old-diffusers"])
def test_loras_of_other_makings_are_read_by_diffusers_loader(inputs: Inputs, tmp_path: Path, layout: str) -> None:
    unet = inputs.layers["unet"]
    names = {"diffusers": (".lora_A.weight", ".lora_B.weight"), "old-diffusers": (".lora.down.weight", ".lora.up.weight")}[layout]
    tensors = {f"unet.{n}{names[0]}": x.down for n, x in unet.items()} | {f"unet.{n}{names[1]}": x.up for n, x in unet.items()}
    save_file(tensors, tmp_path / "it.safetensors")
    merged, wanted = (families.load_family(inputs.base, base_lora=x).network for x in (tmp_path, None))
    for layer in unet.values():
        object.__setattr__(layer, "scale", 1.0)  # such a file says nothing of alpha: it is the rank
    try:
        merge(unet, wanted, "it")
    finally:
        for layer in unet.values():
            object.__setattr__(layer, "scale", 2 / 5)
    one, two = merged.state_dict(), wanted.state_dict()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


NETWORKS = {
    "sdxl": (sdxl, StableDiffusionXLPipeline),
    "sd3": (sd3, StableDiffusion3Pipeline),
    "flux": (flux, FluxPipeline),
    "pixart": (
        lambda: PixArtTransformer2DModel(num_layers=1, sample_size=8, num_attention_heads=2, attention_head_dim=4),
        PixArtSigmaPipeline,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_own_files_are_read_for_every_network(name: str, tmp_path: Path) -> None:
    """As ``save_adapter`` writes them: rank 3 and alpha 7, by PEFT's names. PixArt has no loader in Diffusers."""
    build, cls = NETWORKS[name]
    network, part = build(), "unet" if name == "sdxl" else "transformer"
    layers = random_layers(network, lambda n: n.endswith(("to_q", "to_v", "ff.net.2")))
    tensors = {
        f"{part}.{n}.lora_{side}.weight": x for n, layer in layers.items() for side, x in zip("AB", (layer.down, layer.up))
    }
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_v", "ff.net.2"]).to_dict()
    plain = {f"{part}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    save_file(tensors, tmp_path / LORA_FILE, metadata={"format": "pt", METADATA: json.dumps(plain)})
    found = read_lora(tmp_path / LORA_FILE, {part: network}, cls)
    assert found.keys() == {part} and found[part].keys() == layers.keys()
    for n, layer in layers.items():
        torch.testing.assert_close(found[part][n].delta(), layer.delta())
    assert not any("lora" in n for n, _ in network.named_parameters())


def test_generate_takes_a_lora(inputs: Inputs, tmp_path: Path) -> None:
    seen = set()
    for number, words in enumerate(([], ["--lora", inputs.kohya])):
        how = ["--prompt", "a red circle", "--steps", "2", "--device", "cpu", "--out", tmp_path / str(number)]
        assert main([str(w) for w in ("generate", "--model", inputs.base, *words, *how)]) == 0
        seen.add((tmp_path / str(number) / "00000.png").read_bytes())
    assert len(seen) == 2


def test_what_is_no_lora_of_this_model_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    def refuse(message: str, path: Path = tmp_path) -> None:
        with pytest.raises(UserError, match=message):
            families.load_family(inputs.base, base_lora=path)

    refuse(r"There is no LoRA at .*: 0 .safetensors files")
    refuse(r"There is no LoRA at .*: no such file or folder", tmp_path / "nothing")
    refuse(r"There is no LoRA at nobody/nothing here, and the hub could not give one", "nobody/nothing")
    refuse(r"There is no LoRA at nobody/nothing/one.safetensors here, and the hub", "nobody/nothing/one.safetensors")
    file, some = tmp_path / "it.safetensors", load_file(inputs.kohya)
    file.write_bytes(b"no")
    refuse(r"it.safetensors cannot be read as a .safetensors file")
    save_file({"a": torch.zeros(2)}, file)
    refuse(r"it.safetensors")
    save_file({key.replace("down_blocks_1", "down_blocks_7"): value for key, value in some.items()}, file)
    refuse(r"it.safetensors")
    save_file({key: torch.cat([value] * 2) if key.endswith("lora_up.weight") else value for key, value in some.items()}, file)
    refuse(r"it.safetensors is of another model: its change of .* has the shape")
    name = next(iter(some)).partition(".")[0]
    save_file({**some, f"{name}.dora_scale": torch.ones(4, 1)}, file)
    refuse(r"it.safetensors is more than a plain LoRA \(it holds .*dora_scale")
    with pytest.raises(UserError, match="is a LoRA on .* and brings what it was trained on top of"):
        family = families.load_family(inputs.base)
        family.attach_lora(rank=2)
        family.save_adapter(tmp_path / "mine")
        find(tmp_path / "mine", base_lora=inputs.kohya)


# -------------------------------------------------------------------------------------------------------------- training


def test_the_run_starts_and_compares_with_base_and_lora(inputs: Inputs, result: Path, tmp_path: Path) -> None:
    first = json.loads((result / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["margin"]) < 1e-6  # the policy is the reference at the first step, so the LoRA is in both
    summary = json.loads((result / "summary.json").read_text())
    merged = families.load_family(inputs.base, base_lora=inputs.kohya)
    assert summary["fingerprint"]["reference"] == digest(merged.network)
    assert summary["fingerprint"]["base_loras"] == [find_loras(inputs.kohya)[0].sha256]
    assert train(inputs, tmp_path / "without") == 0
    other = json.loads((tmp_path / "without" / "summary.json").read_text())["fingerprint"]
    assert other["reference"] != summary["fingerprint"]["reference"]
    assert other["data"] != summary["fingerprint"]["data"]  # the text encoder is another too
    assert "base_loras" not in other


def test_resuming_with_another_lora_is_refused(
    inputs: Inputs, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(result, tmp_path / "run")
    tensors = load_file(inputs.kohya)
    save_file(
        {
            name: value * (0.5 if name.startswith("lora_unet") and name.endswith("alpha") else 1)
            for name, value in tensors.items()
        },
        tmp_path / "other.safetensors",
    )
    assert train(inputs, tmp_path / "run", "--resume", "--base-lora", tmp_path / "other.safetensors") == 2
    refused(capsys, "belongs to another run", "base_loras was", "reference was")


def test_the_result_is_loaded_with_both(inputs: Inputs, result: Path, wanted: torch.Tensor) -> None:
    note = json.loads((result / NOTE_FILE).read_text())
    assert note["base_loras"] == [find_loras(inputs.kohya)[0].note()]
    same(sample(families.load_pipeline(result, device="cpu")), wanted)


def test_a_lora_that_was_changed_or_moved_since_is_noticed(inputs: Inputs, result: Path, tmp_path: Path) -> None:
    shutil.copytree(result, tmp_path / "run")
    note = json.loads((result / NOTE_FILE).read_text())
    for lora, message in (
        ({**note["base_loras"][0], "sha256": "0" * 64}, "old.safetensors, .* was changed since"),
        ({**note["base_loras"][0], "path": str(tmp_path / "gone.safetensors")}, "gone.safetensors, .* is not there any more"),
    ):
        (tmp_path / "run" / NOTE_FILE).write_text(json.dumps({**note, "base_loras": [lora]}))
        with pytest.raises(UserError, match=message):
            families.load_pipeline(tmp_path / "run", device="cpu")


def test_the_card_names_it_and_its_lines_load_both(
    inputs: Inputs, result: Path, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (result / "README.md").read_text()
    assert "the base with a LoRA merged into it: `old.safetensors`" in card and str(inputs.base.parent) not in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    shutil.copytree(
        inputs.kohya.parent, inputs.base.parent / inputs.kohya.parent.name, ignore=lambda f, n: set(n) - {inputs.kohya.name}
    )
    monkeypatch.chdir(inputs.base.parent)
    scope: dict = {}
    with quietly():
        exec(code.replace('"a prompt"', '"a red circle", num_inference_steps=1'), scope)
    same(sample(scope["pipe"]), wanted)


def test_full_fine_tuning_starts_from_both_and_saves_a_whole_model(inputs: Inputs, tmp_path: Path) -> None:
    still = ["--adapter", "full", "--learning-rate", "1e-30"]
    assert train(inputs, tmp_path / "full", "--base-lora", inputs.kohya, *still) == 0
    merged = families.load_pipeline(inputs.base, base_lora=inputs.kohya, device="cpu")
    same(sample(plain(tmp_path / "full")), sample(merged))
    same(sample(families.load_pipeline(tmp_path / "full", device="cpu")), sample(merged))


def test_the_comparison_after_training_is_with_base_and_lora(inputs: Inputs, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\n")
    still = ["--learning-rate", "1e-30", "--evaluation.prompts", prompts, "--judges", "jpeg", "--sampling-steps", "2"]
    assert train(inputs, tmp_path / "run", "--base-lora", inputs.kohya, *still) == 0
    report = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    assert report["base"] == f"{inputs.base} with old.safetensors"
    pictures = [(tmp_path / "run" / "evaluation" / side / "00000.png").read_bytes() for side in ("base", "tuned")]
    assert pictures[0] == pictures[1]  # nothing was learnt, so the result is base and LoRA
    words = ["--tuned", tmp_path / "run", "--prompts", prompts, "--judges", "jpeg", "--steps", "2", "--guidance-scale", "7.5"]
    for lora, equal in (([], False), (["--base-lora", inputs.kohya], True)):
        out = tmp_path / f"report{len(lora)}"
        assert main([str(w) for w in ("evaluate", "--base", inputs.base, *lora, *words, "--device", "cpu", "--out", out)]) == 0
        one, two = ((out / side / "00000.png").read_bytes() for side in ("base", "tuned"))
        assert (one == two) is equal


# ---------------------------------------------------------------------------------------------------- going on, and rounds


def test_going_on_from_a_result_needs_what_it_was_trained_on(
    inputs: Inputs, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    still = ["--learning-rate", "1e-30", "--steps", "1", "--start-lora", result]
    assert train(inputs, tmp_path / "no", *still) == 2
    refused(
        capsys, f"was trained on top of {inputs.kohya}, and this run starts from the model itself", f"--base-lora {inputs.kohya}"
    )
    assert train(inputs, tmp_path / "on", *still, "--base-lora", inputs.kohya) == 0
    assert load_file(tmp_path / "on" / LORA_FILE).keys() == load_file(result / LORA_FILE).keys()
    first = json.loads((tmp_path / "on" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["margin"]) > 1e-6  # --start-lora goes on with the same adapter: the reference is what lies below it


def test_a_result_may_lie_under_the_next_run(inputs: Inputs, result: Path, wanted: torch.Tensor, tmp_path: Path) -> None:
    """Then what it was trained on top of lies under both."""
    assert [lora.path for lora in find_loras(result)] == [str(inputs.kohya), str(result / LORA_FILE)]
    same(sample(families.load_pipeline(inputs.base, base_lora=result, device="cpu")), wanted)
    assert train(inputs, tmp_path / "third", "--base-lora", result, "--learning-rate", "1e-30") == 0
    first = json.loads((tmp_path / "third" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["margin"]) < 1e-6  # --base-lora is the reference, unlike --start-lora
    same(sample(families.load_pipeline(tmp_path / "third", device="cpu")), wanted)


def test_rollouts_of_a_result_sample_with_both(
    inputs: Inputs, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    common = ["--prompts", "tiny", "--count", "1", "--steps", "2", "--device", "cpu", "--judges", "jpeg"]
    ways = ([inputs.base, "--lora", result], [result], [inputs.base, "--lora", result, "--base-lora", inputs.kohya])
    seen = set()
    for number, words in enumerate(ways):
        assert main([str(w) for w in ("rollout", "--model", *words, *common, "--out", tmp_path / str(number))]) == 0
        assert f"--base-lora {inputs.kohya} --start-lora {result}" in " ".join(capsys.readouterr().out.split())
        seen.add((tmp_path / str(number) / "pictures" / "00000-1.png").read_bytes())
    assert len(seen) == 1
    merged = families.load_family(inputs.base, base_lora=inputs.kohya)
    assert json.loads((tmp_path / "0" / "rollout.json").read_text())["model"]["base"] == digest(merged.network)


# ---------------------------------------------------------------------------------------------------------------- export


def test_both_are_exported_as_one_lora_of_both_ranks(inputs: Inputs, result: Path, wanted: torch.Tensor, tmp_path: Path) -> None:
    for layout, out in (("diffusers", tmp_path / "lora"), ("kohya", tmp_path / "lora.safetensors")):
        assert main(["export", str(result), "--to", layout, "--out", str(out)]) == 0
        pipe = plain(inputs.base)
        with quietly():
            pipe.load_lora_weights(str(out if out.is_dir() else tmp_path), weight_name=LORA_FILE if out.is_dir() else out.name)
        same(sample(pipe), wanted)
    ranks = {v.shape[0] for k, v in load_file(tmp_path / "lora.safetensors").items() if k.endswith("to_q.lora_down.weight")}
    assert ranks == {7}  # 5 and 2
    assert {name.split("_")[1] for name in load_file(tmp_path / "lora.safetensors")} == {"unet", "te"}
    assert "base_loras" not in json.loads((tmp_path / "lora" / NOTE_FILE).read_text())
    same(sample(families.load_pipeline(tmp_path / "lora", device="cpu")), wanted)


def test_the_new_one_alone_goes_with_the_old_one(inputs: Inputs, result: Path, wanted: torch.Tensor, tmp_path: Path) -> None:
    assert main(["export", str(result), "--to", "kohya", "--alone", "--out", str(tmp_path / "new.safetensors")]) == 0
    pipe = plain(inputs.base)
    with quietly():
        pipe.load_lora_weights(str(inputs.kohya.parent), weight_name=inputs.kohya.name, adapter_name="old")
        pipe.load_lora_weights(str(tmp_path), weight_name="new.safetensors", adapter_name="new")
        pipe.set_adapters(["old", "new"])
    same(sample(pipe), wanted)
    assert main(["export", str(result), "--alone", "--out", str(tmp_path / "again")]) == 0
    same(sample(families.load_pipeline(tmp_path / "again", device="cpu")), wanted)


def test_both_are_merged_into_the_whole_model(inputs: Inputs, result: Path, wanted: torch.Tensor, tmp_path: Path) -> None:
    assert main(["export", str(result), "--merge", "--out", str(tmp_path / "whole")]) == 0
    same(sample(plain(tmp_path / "whole")), wanted)
    one = tmp_path / "one.safetensors"
    assert main(["export", str(result), "--to", "single-file", "--out", str(one)]) == 0
    with quietly():
        pipe = StableDiffusionPipeline.from_single_file(
            str(one), config=str(inputs.base), local_files_only=True, safety_checker=None
        )
    same(sample(pipe), wanted)
    assert main(["export", str(result), "--merge", "--alone", "--out", str(tmp_path / "no")]) == 2


def test_an_adapter_that_matters_does_not_matter_to_make(inputs: Inputs) -> None:
    family = families.load_family(inputs.base, base_lora=inputs.kohya)
    family.attach_lora(rank=2)
    before = digest(families.load_family(inputs.base, base_lora=inputs.kohya).network)
    make_adapter_matter(family)
    family.detach_lora()
    assert digest(family.network) == before
