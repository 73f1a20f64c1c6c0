"""Writers: found, loaded, trained, saved, and found again; and what is said to people who err."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_writer_material import CHATML, model, tokenizer, writer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from diffalign.errors import UserError
from diffalign.likelihood import token_log_probs
from diffalign.protocols import TextPolicy
from diffalign.types import Texts
from pipelines.families._names import NOTE_FILE
from pipelines.writers import load_writer
from pipelines.writers._sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_FILE
from pipelines.writers.sampling import Decoding, candidates
from pipelines.writers.writer import Writer

KINDS = ("gpt2", "llama", "qwen2")
TOKENS = torch.tensor([[5, 9, 40, 41, 80, 7], [60, 8, 8, 120, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()


def stir(written: Writer, seed: int = 0) -> Writer:
    """What training would have done to the trainable parameters, and more."""
    torch.manual_seed(seed)
    for parameter in written.trainable_parameters():
        nn.init.normal_(parameter, std=0.2)
    return written


@torch.no_grad()
def logits(written: Writer) -> Tensor:
    with written.writing():
        return written(TOKENS, MASK)[MASK]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("writers") / "base"
    writer("llama", template="Better: {prompt} ->").save(path)
    return path


@pytest.fixture
def lora(folder: Path, tmp_path: Path) -> Path:
    """The folder of a LoRA on ``folder``."""
    made = Writer.load(folder)
    made.attach_lora(rank=4)
    stir(made).save_adapter(tmp_path / "lora")
    return tmp_path / "lora"


# -------------------------------------------------------------------------------------------------------- as a text policy


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_whatever_the_padding(kind: str) -> None:
    made = writer(kind)
    assert isinstance(made, TextPolicy)
    with torch.no_grad():
        found = made(TOKENS, MASK)
        alone = made.model(TOKENS[1:, :4]).logits
    assert found.shape == (2, 6, made.model.config.vocab_size)
    torch.testing.assert_close(found[1:, :4], alone, atol=1e-5, rtol=1e-5)
    shown = TOKENS.clone()
    shown[1, 4:] = 99  # nobody looks at padding
    torch.testing.assert_close(made(shown, MASK)[MASK], found[MASK], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_positions_can_be_had_alone(kind: str) -> None:
    made = writer(kind)
    asked: list[int] = []
    made.model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: asked.append(inputs[0].shape[1]))
    torch.testing.assert_close(made(TOKENS, MASK, 3), made(TOKENS, MASK)[:, -3:])
    assert asked == [3, 6]  # and are not computed first
    made._takes_last = False  # an architecture that cannot
    torch.testing.assert_close(made(TOKENS, MASK, 3), made(TOKENS, MASK)[:, -3:])


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_transformers(kind: str) -> None:
    """Ids from the encoding, through the core's likelihood; against the loss that the model itself computes on the same ids."""
    made = writer(kind, begin=True)
    encoding = made.encoding()
    prompt, rewrite = encoding.prompt("a cat"), encoding.rewrite("a cat", "a fluffy cat")
    other = encoding.rewrite("a cat", "a cat, soft light, highly detailed")
    ours = token_log_probs(made, Texts.of([prompt, prompt], [rewrite, other])).sum(dim=1)
    for row, ids in enumerate((rewrite, other)):
        labels = torch.tensor([[-100] * len(prompt) + ids])
        theirs = made.model(torch.tensor([prompt + ids]), labels=labels).loss
        torch.testing.assert_close(ours[row], -theirs.double() * len(ids), atol=1e-4, rtol=1e-5)


def test_logits_come_in_the_models_dtype(folder: Path) -> None:
    made = Writer.load(folder, dtype="bfloat16")
    made.attach_lora()
    assert made(TOKENS, MASK).dtype == torch.bfloat16
    assert {p.dtype for p in made.trainable_parameters()} == {torch.float32}


def test_calls_go_through_a_wrapper_and_nothing_else_does(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        calls = 0

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Tensor) -> object:
            Wrapper.calls += 1
            return self.module(**inputs)

    made = writer("llama")
    wrapped = made.with_network(Wrapper(made.model))
    assert torch.equal(wrapped(TOKENS, MASK), made(TOKENS, MASK))
    assert Wrapper.calls == 1
    assert made.network is made.model is wrapped.model and wrapped.network is not made.network
    wrapped.attach_lora()
    with wrapped.adapter_off():
        wrapped(TOKENS, MASK)
    wrapped.save_adapter(tmp_path / "lora")
    assert candidates(wrapped, ["a cat"], 1, Decoding(max_rewrite_tokens=2))
    assert Wrapper.calls == 2


def test_nothing_is_dropped_in_training() -> None:
    """Dropout of the configurations would make policy and reference differ where they are equal."""
    for kind, config in (("gpt2", {}), ("llama", {"attention_dropout": 0.5})):
        raw = model(kind, **config).train()
        assert not torch.equal(raw(TOKENS).logits, raw(TOKENS).logits)
        made = Writer(raw, tokenizer(), writer().template)
        made.train_fully()
        assert made.model.training
        assert torch.equal(made(TOKENS, MASK), made(TOKENS, MASK))
    assert made.model.config.attention_dropout == 0.5  # what is saved says what it said


# ------------------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_starts_as_nothing_and_can_be_switched_off() -> None:
    made = writer("gpt2")
    before = logits(made)
    assert list(made.trainable_parameters()) == [] and not made.has_adapter
    made.attach_lora(rank=4, seed=1)
    assert made.has_adapter and made.model.training
    assert torch.equal(logits(made), before)
    names = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    stir(made)
    assert (logits(made) - before).abs().max() > 0.1
    with made.adapter_off():
        assert torch.equal(logits(made), before)
    with pytest.raises(ValueError, match="adapter already"):
        made.attach_lora()


def test_only_the_adapter_learns() -> None:
    made = writer("qwen2")
    made.attach_lora()
    frozen = {name: p.clone() for name, p in made.model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(made.trainable_parameters(), lr=1.0)
    for _ in range(2):
        made(TOKENS, MASK).logsumexp(dim=2).sum().backward()
        optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in made.model.named_parameters() if name in frozen)
    assert all(p.grad is not None and p.grad.any() for p in made.trainable_parameters())


def test_a_seed_decides_how_an_adapter_begins() -> None:
    def begun(seed: int) -> list[Tensor]:
        made = writer("llama")
        made.attach_lora(seed=seed)
        return list(made.trainable_parameters())

    torch.manual_seed(5)
    first = begun(1)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, begun(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, begun(2), strict=True))
    torch.manual_seed(7)
    expected = torch.rand(1)
    made = writer("llama")
    torch.manual_seed(7)
    made.attach_lora(seed=3)
    assert torch.equal(torch.rand(1), expected)  # nobody else's random numbers change


@pytest.mark.parametrize(
    "kind, targets, layers",
    [
        ("gpt2", None, {"c_attn"}),
        ("llama", None, {"q_proj", "v_proj"}),
        ("qwen2", ["o_proj"], {"o_proj"}),
        ("qwen2", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", ["all-linear"], {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_targets(kind: str, targets: list[str] | str | None, layers: set[str]) -> None:
    made = writer(kind)
    made.attach_lora(rank=2, targets=targets)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, p in made.model.named_parameters() if p.requires_grad} == layers


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "LoRA needs rank >= 1, alpha > 0 and 0 <= dropout < 1; got rank 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"targets": []}, "LoRA needs at least one target"),
        (
            {"targets": ["to_q"]},
            "LoRA target 'to_q' matches no layer of GPT2LMHeadModel. Names of its linear layers end in: c_attn, c_fc",
        ),
    ],
)
def test_adapters_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        writer("gpt2").attach_lora(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    """Loaded by us, merged; and by PEFT itself, beside its base."""
    from peft import PeftModel

    writer(kind).save(tmp_path / "base")
    made = Writer.load(tmp_path / "base")
    before = logits(made)
    made.attach_lora(rank=4, alpha=12, targets="all-linear")
    trained = logits(stir(made))
    made.save_adapter(tmp_path / "lora")
    loaded = Writer.load(tmp_path / "lora")
    assert not loaded.has_adapter and not list(loaded.trainable_parameters())
    torch.testing.assert_close(logits(loaded), trained, atol=2e-4, rtol=1e-4)
    assert (trained - before).abs().max() > 0.1
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS, attention_mask=MASK.long()).logits[MASK], trained, atol=2e-4, rtol=1e-4)
    config = json.loads((tmp_path / "lora" / ADAPTER_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 12, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["target_modules"] == sorted(config["target_modules"])


def peft_logits(base: Path, *adapters: Path) -> Tensor:
    """Of the model that PEFT and Transformers make of a base and its adapters, each merged before the next."""
    from peft import PeftModel

    theirs = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters:
        theirs = PeftModel.from_pretrained(theirs, adapter).merge_and_unload()
    with torch.no_grad():
        return theirs.eval()(TOKENS, attention_mask=MASK.long()).logits[MASK]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("second_on", ["all-linear", "some"])
def test_an_adapter_on_an_adapter_is_saved_as_one_that_peft_loads(kind: str, second_on: str, tmp_path: Path) -> None:
    """Layers that only one of the two has, other ranks and other scales included; and a third one on top."""
    from peft import AutoPeftModelForCausalLM

    some = {"gpt2": ["c_attn"], "llama": ["o_proj", "up_proj"]}[kind]
    steps = [
        ("sft", {"rank": 4, "alpha": 12, "targets": {"gpt2": ["c_fc", "c_attn"], "llama": ["q_proj", "o_proj"]}[kind]}),
        ("sem", {"rank": 3, "alpha": 3, "targets": some if second_on == "some" else second_on}),
        ("again", {"rank": 2, "alpha": 5, "targets": some}),
    ]
    writer(kind, template="Better: {prompt} ->").save(tmp_path / "base")
    below = "base"
    for name, settings in steps:
        made = Writer.load(tmp_path / below)
        made.attach_lora(**settings)
        trained = logits(stir(made))
        made.save_adapter(tmp_path / name)
        torch.testing.assert_close(peft_logits(tmp_path / "base", tmp_path / name), trained, atol=1e-3, rtol=1e-3)
        with torch.no_grad():
            theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)(TOKENS, attention_mask=MASK.long())
        torch.testing.assert_close(theirs.logits[MASK], trained, atol=1e-3, rtol=1e-3)
        loaded = Writer.load(tmp_path / name)
        torch.testing.assert_close(logits(loaded), trained, atol=1e-3, rtol=1e-3)
        assert loaded.origin.adapters == (str(tmp_path / name),) and loaded.template == made.template
        assert len(AutoTokenizer.from_pretrained(tmp_path / name)) == len(made.tokenizer)
        below = name
    config = json.loads((tmp_path / "sem" / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    with pytest.raises(UserError, match=f"holds what the LoRA {tmp_path / 'sft'} had learnt, too, so its base is a whole model"):
        Writer.load(tmp_path / "sem", base=str(tmp_path / "sft"))
    loaded.save(tmp_path / "whole")
    torch.testing.assert_close(logits(Writer.load(tmp_path / "whole")), trained, atol=1e-3, rtol=1e-3)


def on_top_as_it_once_was(lora: Path, to: Path) -> Tensor:
    """A folder with the upper LoRA alone, whose base is a LoRA; returns what the two are together."""
    below, upper = Writer.load(lora), Writer.load(lora)
    below.save(to.parent / "merged")
    upper = Writer.load(to.parent / "merged")
    upper.attach_lora(rank=2, targets=["o_proj", "v_proj"])
    stir(upper, seed=1).save_adapter(to)
    for file, field in ((ADAPTER_CONFIG, "base_model_name_or_path"), (NOTE_FILE, "base_model")):
        content = json.loads((to / file).read_text())
        content.pop("base_beside", None)
        (to / file).write_text(json.dumps(content | {field: str(lora)}))
    return logits(upper)


def test_adapters_whose_base_is_an_adapter_are_merged_in_order(folder: Path, lora: Path, tmp_path: Path) -> None:
    trained = on_top_as_it_once_was(lora, tmp_path / "upper")
    loaded = Writer.load(tmp_path / "upper")
    torch.testing.assert_close(logits(loaded), trained, atol=2e-4, rtol=1e-4)
    assert loaded.origin.adapters == (str(lora), str(tmp_path / "upper"))
    assert Writer.load(tmp_path / "upper", base=str(lora)).origin.adapters == loaded.origin.adapters  # not its base's base
    loaded.save_adapter(tmp_path / "one")  # and can be written as one
    torch.testing.assert_close(peft_logits(folder, tmp_path / "one"), trained, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"modules_to_save": ["norm"]}], ids=str)
def test_on_top_of_more_than_a_plain_lora_there_is_no_lora(kind: dict, folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], **kind)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).save_pretrained(tmp_path / "more")
    made = Writer.load(tmp_path / "more")  # which can write as ever
    with pytest.raises(UserError, match=r"more than a plain LoRA .*`diffalign export .*more --merge --out FOLDER`"):
        made.attach_lora()
    with pytest.raises(UserError, match="more than a plain LoRA"):
        made.save_adapter(tmp_path / "one")
    made.save(tmp_path / "whole")
    Writer.load(tmp_path / "whole").attach_lora()


def test_an_adapter_brings_the_template_it_was_trained_with(folder: Path, tmp_path: Path) -> None:
    made = Writer.load(folder, template="rephrase")
    made.attach_lora()
    made.save_adapter(tmp_path / "lora")
    assert Writer.load(tmp_path / "lora").template == made.template != Writer.load(folder).template


def test_merging_is_done_in_float32(lora: Path) -> None:
    """Rounded once, at the end, and not before what is added has been added."""
    half = Writer.load(lora, dtype="bfloat16").model.state_dict()
    full = Writer.load(lora).model.state_dict()
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


def test_an_adapter_of_peft_itself_is_taken(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "lora")
    own = tokenizer(chat=CHATML)
    own.save_pretrained(tmp_path / "lora")
    loaded = Writer.load(tmp_path / "lora", template="auto")
    with torch.no_grad():
        expected = theirs.eval()(TOKENS, attention_mask=MASK.long()).logits[MASK]
    torch.testing.assert_close(logits(loaded), expected, atol=2e-4, rtol=1e-4)
    assert loaded.template.name == "chat"  # by the tokenizer that came with it
    assert Writer.load(tmp_path / "lora").template.name == "own"  # on record


def test_an_adapter_that_was_moved_with_its_base_finds_it(lora: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    writer("llama", seed=3).save(here / "base")
    made = Writer.load(here / "base")
    made.attach_lora(rank=2)
    trained = logits(stir(made))
    made.save_adapter(here / "runs" / "lora")
    here.rename(tmp_path / "there")
    found = Writer.load(tmp_path / "there" / "runs" / "lora")
    assert found.origin.whole == str(tmp_path / "there" / "base")
    torch.testing.assert_close(logits(found), trained, atol=2e-4, rtol=1e-4)
    shutil.copytree(tmp_path / "there" / "runs" / "lora", tmp_path / "alone")
    with pytest.raises(UserError, match=r"is a LoRA on the base model .*/here/base, .* If it was moved, name it \(--base\)"):
        Writer.load(tmp_path / "alone")


def test_an_adapter_finds_its_base_or_is_told(folder: Path, lora: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    for file, field in ((ADAPTER_CONFIG, "base_model_name_or_path"), (NOTE_FILE, "base_model")):
        content = json.loads((lora / file).read_text())
        content.pop("base_beside", None)  # as records once were
        (lora / file).write_text(json.dumps(content | {field: str(tmp_path / "gone")}))
    with pytest.raises(UserError) as error:
        Writer.load(lora)
    assert f"{lora} is a LoRA on the base model {tmp_path / 'gone'}, which cannot be used. There is no writer" in str(error.value)
    assert torch.equal(logits(Writer.load(lora, base=str(moved))), logits(Writer.load(lora, base=str(folder))))


# --------------------------------------------------------------------------------------------------------- full training


def test_full_training_and_its_frozen_reference(folder: Path) -> None:
    made = Writer.load(folder, dtype="bfloat16")
    reference = made.frozen_copy()
    made.train_fully()
    assert {p.dtype for p in made.trainable_parameters()} == {torch.float32}
    assert len(list(made.trainable_parameters())) == len(list(made.model.parameters()))
    before = logits(reference)
    stir(made)
    assert torch.equal(logits(reference), before) and not torch.equal(logits(made).bfloat16(), before)
    assert not list(reference.trainable_parameters()) and not reference.model.training
    with pytest.raises(ValueError, match="no adapter"), made.adapter_off():
        pass


def test_what_makes_no_sense_with_an_adapter(tmp_path: Path) -> None:
    made = writer()
    with pytest.raises(ValueError, match="no adapter to save"):
        made.save_adapter(tmp_path / "lora")
    made.attach_lora()
    for refused in (made.train_fully, made.frozen_copy, lambda: made.save(tmp_path / "whole")):
        with pytest.raises(ValueError, match="adapter"):
            refused()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_recomputes_and_changes_no_gradient(kind: str) -> None:
    made = writer(kind)
    made.attach_lora()
    stir(made)
    block = next(module for name, module in made.model.named_modules() if name.endswith("mlp"))
    calls: list[int] = []
    block.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> list[Tensor]:
        made.model.zero_grad()
        made(TOKENS, MASK)[MASK].logsumexp(dim=1).sum().backward()
        return [p.grad.clone() for p in made.trainable_parameters()]

    plain = gradients()
    assert len(calls) == 1
    made.set_gradient_checkpointing(True)
    again = gradients()
    assert len(calls) == 3
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    short = Decoding(max_rewrite_tokens=5)
    assert candidates(made, ["a cat"], 2, short) == candidates(made, ["a cat"], 2, short)
    made.set_gradient_checkpointing(False)
    calls.clear()
    gradients()
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------------ saving and finding


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_writer_is_the_same_writer(kind: str, tmp_path: Path) -> None:
    made = writer(kind, begin=True, chat=CHATML, template="Better: {prompt}\n", context=100)
    made.model.generation_config.repetition_penalty = 1.5
    made.save(tmp_path / "w")
    loaded = load_writer(tmp_path / "w")
    assert torch.equal(logits(loaded), logits(made))
    assert loaded.template == made.template  # though the tokenizer has a chat template
    assert load_writer(tmp_path / "w", template="chat").template.name == "chat"
    assert loaded.encoding().prompt("a cat") == made.encoding().prompt("a cat")
    assert loaded.model.generation_config.repetition_penalty == 1.5
    assert (loaded.name, loaded.context) == (str(tmp_path / "w"), 100)
    assert not loaded.model.training and not list(loaded.trainable_parameters())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "w"), AutoTokenizer.from_pretrained(tmp_path / "w")
    with torch.no_grad():
        assert torch.equal(theirs[0](TOKENS, attention_mask=MASK.long()).logits[MASK], logits(made))
    assert theirs[1]("a cat").input_ids == made.tokenizer("a cat").input_ids


def test_a_fingerprint_tells_writers_apart(folder: Path) -> None:
    made = Writer.load(folder)
    first = made.fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert Writer.load(folder).fingerprint() == first
    others = [
        Writer.load(folder, template="rephrase"),
        Writer.load(folder, dtype="bfloat16"),
        writer("llama", seed=1, template="Better: {prompt} ->"),
        writer("llama", begin=True, template="Better: {prompt} ->"),
    ]
    assert all(other.fingerprint() != first for other in others)
    made.attach_lora()
    with_adapter = made.fingerprint()
    assert stir(made).fingerprint() != with_adapter != first
    other = Writer.load(folder)
    other.attach_lora(alpha=16)  # the same tensors, with another scale
    assert other.fingerprint()["model"] == with_adapter["model"] and other.fingerprint() != with_adapter


def test_a_folder_holds_a_model_or_an_adapter(folder: Path, lora: Path) -> None:
    made = Writer.load(folder)
    with pytest.raises(UserError, match="holds a LoRA; a whole model beside it would be confused with it. Name another folder"):
        made.save(lora)
    made.attach_lora()
    with pytest.raises(UserError, match="holds a whole model; a LoRA beside it would be confused"):
        made.save_adapter(folder)


def in_hub_cache(source: Path, name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ``name`` had been downloaded."""
    from huggingface_hub import constants
    from transformers.utils import hub

    place, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    shutil.copytree(source, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))


def test_a_pad_token_that_the_model_does_not_know_is_no_hindrance(folder: Path, tmp_path: Path) -> None:
    """Many add one to the tokenizer and leave the model as it is."""
    made = broken(folder, tmp_path / "padded")
    words = tokenizer()
    words.add_special_tokens({"pad_token": "[PAD]"})
    words.save_pretrained(made)
    found = Writer.load(made)
    assert found.tokenizer.pad_token_id >= found.model.get_input_embeddings().weight.shape[0]
    assert found.encoding().pad == found.encoding().end
    prompts, options = ["a cat", "two small green squares"], {"n": 2, "decoding": Decoding(max_rewrite_tokens=6)}
    assert candidates(found, prompts, **options) == candidates(Writer.load(folder), prompts, **options)
    found.attach_lora(rank=2)
    found.save_adapter(tmp_path / "lora")
    assert candidates(Writer.load(tmp_path / "lora"), prompts, **options) == candidates(found, prompts, **options)


def test_models_of_the_hub_come_from_its_cache(folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, field in ((ADAPTER_CONFIG, "base_model_name_or_path"), (NOTE_FILE, "base_model")):
        content = json.loads((lora / file).read_text())
        (lora / file).write_text(json.dumps(content | {field: "tinylm"}))
    in_hub_cache(folder, "tinylm", tmp_path / "hub", monkeypatch)
    in_hub_cache(lora, "someone/tiny-lora", tmp_path / "hub", monkeypatch)
    base = Writer.load("tinylm", template="rephrase")
    assert base.name == "tinylm" and torch.equal(logits(base), logits(Writer.load(folder)))
    found = Writer.load("someone/tiny-lora")
    assert found.name == "someone/tiny-lora"
    torch.testing.assert_close(logits(found), logits(Writer.load(lora, base=str(folder))))


def test_a_hub_model_that_is_not_here_says_how_to_get_it() -> None:
    for name in ("gpt2", "Qwen/Qwen2.5-1.5B"):
        with pytest.raises(UserError) as error:
            Writer.load(name)
        assert f"There is no folder {name} here" in str(error.value)
        assert "neither in the local hub cache nor could the hub be reached" in str(error.value)
        assert f"`hf download {name}`" in str(error.value)


# ------------------------------------------------------------------------------------------------------------ what goes wrong


def test_what_is_no_writer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        UserError, match=r"neither a config.json \(a whole model\) nor an adapter_config.json .* It holds: notes.txt"
    ):
        Writer.load(tmp_path)
    with pytest.raises(UserError, match=r"notes.txt is a file; a writer is a folder that save_pretrained"):
        Writer.load(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"There is no writer .*/nothing: a writer is .* or 'tiny'"):
        Writer.load(tmp_path / "nothing")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="is an image model, which cannot write"):
        Writer.load(tmp_path)
    (tmp_path / "model_index.json").rename(tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="is a LoRA of an image model, which cannot write"):
        Writer.load(tmp_path)
    with pytest.raises(UserError, match="dtype 'int8' is not known"):
        Writer.load(folder, dtype="int8")


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_other_language_models_are_refused(kind: str, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 300,
        "num_hidden_layers": 1,
        "num_layers": 1,
        "hidden_size": 16,
        "d_model": 16,
        "num_attention_heads": 2,
    }
    made = T5ForConditionalGeneration(T5Config(**sizes)) if kind == "t5" else BertLMHeadModel(BertConfig(**sizes))
    made.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"model of the type {kind}, which is no causal language model. A writer is one, like gpt2"
    ):
        Writer.load(tmp_path)


def broken(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_broken_folders(folder: Path, tmp_path: Path) -> None:
    lacking = broken(folder, tmp_path / "lacking") / "model.safetensors"
    weights = load_file(lacking)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is incomplete: its files lack weights .* for example model.layers.1.mlp.up_proj.weight"):
        Writer.load(lacking.parent)

    cut = broken(folder, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut could not be loaded as a language model"):
        Writer.load(cut.parent)

    wordless = broken(folder, tmp_path / "wordless")
    (wordless / "tokenizer.json").unlink()
    (wordless / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="wordless has no tokenizer that could be loaded"):
        Writer.load(wordless)

    foreign = broken(folder, tmp_path / "foreign")
    words = tokenizer()
    words.add_tokens([f"word{i}" for i in range(5)])
    words.save_pretrained(foreign)
    with pytest.raises(
        UserError, match=r"the tokenizer knows \d+ tokens and the model has \d+ embeddings, so they do not belong"
    ):
        Writer.load(foreign)

    endless = broken(folder, tmp_path / "endless")
    tokenizer(end=None).save_pretrained(endless)
    with pytest.raises(UserError, match="has no end mark"):
        Writer.load(endless)


def test_broken_adapters(lora: Path, tmp_path: Path) -> None:
    config = json.loads((lora / ADAPTER_CONFIG).read_text())

    def refused(message: str, **changes: object) -> None:
        (lora / ADAPTER_CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            Writer.load(lora)

    refused("holds an adapter of the type PROMPT_TUNING; a writer's can only be LORA", peft_type="PROMPT_TUNING")
    refused("does not fit its base .* or cannot be read", target_modules=["nothing"])
    refused("does not fit its base", r=5)
    refused("is incomplete: it lacks weights for layers", target_modules=["q_proj", "v_proj", "o_proj"])
    (lora / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(UserError, match="adapter_config.json is not valid JSON"):
        Writer.load(lora)
    (lora / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    (lora / NOTE_FILE).unlink()
    with pytest.raises(UserError, match="does not say on which model: name its base"):
        Writer.load(lora)
    (lora / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(lora)}))
    with pytest.raises(UserError, match="is a LoRA that is, in the end, its own base"):
        Writer.load(lora)
    (lora / ADAPTER_CONFIG).write_text(json.dumps(config))
    (lora / ADAPTER_WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(UserError, match="or cannot be read"):
        Writer.load(lora)


def test_a_model_with_an_adapter_in_it_is_not_taken() -> None:
    made = writer()
    made.attach_lora()
    with pytest.raises(ValueError, match="without adapters"):
        Writer(made.model, made.tokenizer, made.template)


def test_a_record_that_is_none(folder: Path, tmp_path: Path) -> None:
    other = broken(folder, tmp_path / "other")
    note = json.loads((other / NOTE_FILE).read_text())
    (other / NOTE_FILE).write_text(json.dumps(note | {"template": {"text": "{prompt}"}}))
    with pytest.raises(UserError, match="The template on record is not one that diffalign wrote"):
        Writer.load(other)
    assert Writer.load(other, template="rephrase").template.name == "rephrase"
    assert (other / CONFIG_FILE).is_file()
