"""The reference of full fine-tuning in half precision: half as large as the policy, the same answers before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_runs import PROMPTS, on_disk, run, write_pairs
from miniatures import MINIATURES, PIXELS
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pipelines import families
from pipelines.families._frozen import frozen_copy

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frozen")


@torch.no_grad()
@pytest.mark.parametrize("name", MINIATURES)
def test_under_autocast_it_answers_as_the_trained_network_does(name: str, folders: Path) -> None:
    family = families.load_family(on_disk(name, folders).folder)
    conditioning = family.encoder.encode_prompts(PROMPTS)
    family.train_fully()
    frozen = family.frozen_copy(BF16)
    x = torch.randn(2, *family.latent_shape(PIXELS), generator=torch.Generator().manual_seed(0))
    t = (
        torch.tensor([333, 700])
        if family.denoiser.schedule.__class__.__name__ == "NoiseSchedule"
        else torch.tensor([333.3, 700.7])
    )
    with torch.autocast("cpu", dtype=BF16):
        expected, found = family.denoiser(x, t, conditioning), frozen(x, t, conditioning)
    assert torch.equal(found, expected)
    assert not any(p.requires_grad for p in frozen.network.parameters()) and not frozen.network.training
    sizes = [sum(p.nbytes for p in network.parameters()) for network in (frozen.network, family.network)]
    assert sizes[0] < 0.65 * sizes[1]


def test_before_the_first_step_every_margin_is_zero(folders: Path, tmp_path: Path) -> None:
    """FLUX's network rounds the time to the type of what it is given."""
    saved, pairs = on_disk("flux", folders), write_pairs(tmp_path / "pairs")
    for adapter in ("full", "lora"):
        run(saved, pairs, "diffusion-dpo", tmp_path / adapter, steps=1, adapter=adapter, mixed_precision="bf16", beta=5000.0)
        rows = [json.loads(line) for line in (tmp_path / adapter / "metrics.jsonl").read_text().splitlines()]
        before = [row["margin"] for row in rows if row["step"] == 0 or row["kind"] == "train"]
        assert before == [0.0, 0.0], adapter


def test_shared_weights_and_norms_stay_wide() -> None:
    """GPT-2: its embedding is the output layer, too, and its linear layers are Transformers' own."""
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    tokens = torch.arange(10)[None]
    frozen = frozen_copy(network, BF16)
    assert frozen.lm_head.weight is frozen.transformer.wte.weight and frozen.lm_head.weight.dtype == torch.float32
    assert {frozen.transformer.h[0].attn.c_attn.weight.dtype, frozen.transformer.h[0].mlp.c_fc.bias.dtype} == {BF16}
    assert frozen.transformer.ln_f.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        assert torch.equal(frozen(tokens).logits, network(tokens).logits)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_a_plain_copy_and_one_that_is_rounded_throughout() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    plain = frozen_copy(network)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(plain.parameters(), network.parameters()))
    dtypes = [p.dtype for p in frozen_copy(network, BF16, everything=True).parameters()]
    assert dtypes == [torch.float32, torch.float32, BF16, BF16, BF16, BF16]
