"""SD3 without its T5 is shown few of the zeros that stand for T5's states, and answers as if it were shown all."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from miniatures import MINIATURES
from torch import nn

from pipelines import families, sampling
from pipelines.families import _joint_attention
from pipelines.families._joint_attention import JointAttention, few_zeros_while_sampling, logits_of

NAME = "sd3, of 3.5 and without T5"
ZEROS = 256


def busy(pipe: Any) -> Any:
    """With weights large enough for text to matter, in every layer."""
    torch.manual_seed(1)
    for module in pipe.transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(module.in_features))
            nn.init.normal_(module.bias, std=0.5)
    return pipe


@pytest.fixture
def family() -> Any:
    return families.wrap(busy(MINIATURES[NAME].build()))


def asked(family: Any, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(rows, *family.latent_shape(family.resolution), generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(100.0, 900.0, rows), family.encoder.encode_prompts(["a", "two words", "three of them"][:rows])


def tokens_seen(transformer: nn.Module) -> list[int]:
    """Of text, by the first block in each call from here on."""
    seen: list[int] = []

    def note(_: nn.Module, __: object, options: dict[str, torch.Tensor]) -> None:
        seen.append(options["encoder_hidden_states"].shape[1])

    transformer.transformer_blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_answers_and_gradients_are_those_of_all_zeros(family: Any, checkpointing: bool) -> None:
    family.attach_lora(rank=2)
    family.set_gradient_checkpointing(checkpointing)
    whole, answers = replace(family.denoiser, zeros=0), []
    for denoiser in (family.denoiser, whole):
        answer = denoiser(*asked(family))
        gradients = torch.autograd.grad(answer.square().mean(), list(denoiser.trainable_parameters()), allow_unused=True)
        answers.append((answer, [g for g in gradients if g is not None]))
    (few, of_few), (all_, of_all) = answers
    torch.testing.assert_close(few, all_, rtol=1e-4, atol=5e-5)
    for one, other in zip(of_few, of_all, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_network_really_gets_fewer_and_as_they_are_it_would_say_another_thing(family: Any) -> None:
    seen = tokens_seen(family.network)
    x, t, said = asked(family)
    few, whole = family.denoiser(x, t, said), replace(family.denoiser, zeros=0)
    all_ = whole(x, t, said)
    assert seen == [said["encoder_hidden_states"].shape[1] - ZEROS + 2, said["encoder_hidden_states"].shape[1]]
    bare = whole(x, t, {**said, "encoder_hidden_states": said["encoder_hidden_states"][:, : 2 - ZEROS]})
    assert (bare - all_).abs().max() > 100 * (few - all_).abs().max()


def test_large_pictures_are_asked_with_all(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, said = asked(family)
    places = x.shape[-1] * x.shape[-2] // 4
    monkeypatch.setattr(_joint_attention, "WORTH", places / ZEROS)
    whole = replace(family.denoiser, zeros=0)(x, t, said)
    assert torch.equal(family.denoiser(x, t, said), whole)
    monkeypatch.setattr(_joint_attention, "WORTH", places / ZEROS + 0.1)
    assert not torch.equal(family.denoiser(x, t, said), whole)


def test_with_t5_nothing_changes() -> None:
    pipe = MINIATURES["sd3"].build()
    before = [type(one) for one in pipe.transformer.attn_processors.values()]
    family = families.wrap(pipe)
    assert family.denoiser.zeros == 0 and [type(one) for one in pipe.transformer.attn_processors.values()] == before


def test_pictures_are_the_same_and_the_pipeline_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = busy(MINIATURES[NAME].build())
    calls = tokens_seen(pipe.transformer)
    before, hooks = dict(pipe.transformer.attn_processors), len(pipe.transformer._forward_pre_hooks)
    few = sampling.sample(pipe, ["a", "b"], seeds=[0, 1], steps=3)
    assert pipe.transformer.attn_processors == before and len(pipe.transformer._forward_pre_hooks) == hooks
    monkeypatch.setattr(sampling, "_few_zeros", lambda pipe: nullcontext())
    all_ = sampling.sample(pipe, ["a", "b"], seeds=[0, 1], steps=3)
    assert calls[0] == calls[-1] - ZEROS + 2
    for one, other in zip(few, all_, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_attention_of_another_making_stays() -> None:
    class Other(JointAttention):
        pass

    network = MINIATURES[NAME].build().transformer
    network.set_attn_processor(Other())
    with few_zeros_while_sampling(network, ZEROS):
        assert all(type(one) is Other for one in network.attn_processors.values()) and not network._forward_pre_hooks


@pytest.mark.parametrize("zeros", [0, ZEROS])
def test_norms_in_float32_are_no_trouble_to_attention_in_half_precision(zeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast leaves a norm's answer in float32, and kernels of GPUs want one precision."""
    family, seen = families.wrap(busy(MINIATURES[NAME].build())), []
    given, attention = asked(family), torch.nn.functional.scaled_dot_product_attention

    def spied(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        seen.append({q.dtype, k.dtype, v.dtype, v.dtype if attn_mask is None else attn_mask.dtype})
        return attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(_joint_attention.F, "scaled_dot_product_attention", spied)
    family.train_fully()
    with torch.autocast("cpu", torch.bfloat16):
        replace(family.denoiser, zeros=zeros)(*given)
    assert seen and all(dtypes == {torch.bfloat16} for dtypes in seen)


@pytest.mark.parametrize("count", [2, 3, 77, 256, 512])
def test_two_tokens_weigh_as_many_even_in_half_precision(count: int) -> None:
    first, second = logits_of(count)
    assert math.exp(first) + math.exp(second) == pytest.approx(count, rel=1e-12)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = torch.tensor([first, second]).to(dtype).double()
        assert rounded.exp().sum().item() == pytest.approx(count, rel=5e-4)
