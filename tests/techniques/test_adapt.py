"""Adapters: they begin as nothing, learn, survive files and interruptions, and merge to the same answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from snello.engine.adapters import Adapters
from snello.errors import SnelloError, Unsupported
from snello.models import load
from snello.models.adapter import CONFIG, TENSORS, Adapter, read_adapter, write_adapter
from snello.models.model import Model
from snello.models.reference import Reference
from snello.techniques.adapt import Adapt
from snello.techniques.adapt.lora import factors, magnitudes, with_corrections
from snello.techniques.adapt.merge import merge
from snello.techniques.adapt.train import Answer, score, teach
from snello.techniques.base import silent
from snello.training.loop import Trained
from tests.checkpoints import make_checkpoint

OPTIONS = Adapt(rank=4, epochs=3, batch=8, dropout=0.1)


def learned(base: Model, answers: list[Answer], work: Path, progress: Any = silent) -> tuple[Any, Trained]:
    module = with_corrections(base, OPTIONS, 0)
    where: dict[str, Any] = {"base": base.digest, "seed": 0, "threads": 1, "work_dir": work}
    return module, teach(module, answers, OPTIONS, progress=progress, **where)


@pytest.fixture(scope="module")
def taught(base: Model, answers: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Trained]:
    return learned(base, answers, tmp_path_factory.mktemp("work"))


def adapter_of(module: Any, base: Model) -> Adapter:
    own = {"factors": factors(module), "magnitudes": magnitudes(module)}
    return Adapter(**own, rank=4, alpha=16.0, scale=4.0, base=base.digest)


def losses(module: Any, answers: list[Answer]) -> np.ndarray:
    return np.concatenate(score(module, answers))


def test_it_begins_as_the_base_and_learns_answers(base: Model, answers: list[Answer], taught: Any) -> None:
    plain = losses(with_corrections(base, OPTIONS, 0), answers)
    assert np.array_equal(plain, losses(with_corrections(base, Adapt(targets="q"), 5), answers))
    assert losses(taught[0], answers).mean() < plain.mean() - 0.1
    assert len(plain) == sum(len(answer.tokens) - answer.start for answer in answers)


def test_prompts_do_not_count(base: Model) -> None:
    module = with_corrections(base, OPTIONS, 0)
    tokens = np.arange(10, dtype=np.int32)
    whole, part = score(module, [Answer(tokens, 1), Answer(tokens, 7)])
    assert len(whole) == 9 and np.allclose(whole[6:], part, atol=1e-5)


def test_interrupted_and_resumed_gives_the_same_bytes(
    base: Model, answers: list[Answer], taught: Any, tmp_path: Path
) -> None:
    def stop(message: str, fraction: float) -> None:
        if fraction > 0.3:
            raise KeyboardInterrupt

    import snello.training.loop as loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "TELL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            learned(base, answers, tmp_path, stop)
    again = learned(base, answers, tmp_path)[1]
    assert 0 < again.resumed_from < again.steps
    assert again.digest == taught[1].digest


def test_a_checkpoint_of_another_base_is_refused(base: Model, answers: list[Answer], tmp_path: Path) -> None:
    module = with_corrections(base, OPTIONS, 0)

    def stop(message: str, fraction: float) -> None:
        if "step" in message:
            raise KeyboardInterrupt

    import snello.training.loop as loop

    where: dict[str, Any] = {"seed": 0, "threads": 1, "work_dir": tmp_path}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "TELL_SECONDS", 0.0)
        teach(module, answers, OPTIONS, base="one", progress=stop, **where)
    with pytest.raises(SnelloError, match="another training"):
        teach(with_corrections(base, OPTIONS, 0), answers, OPTIONS, base="two", progress=silent, **where)


def test_files_keep_every_bit_and_merging_gives_the_same_answers(
    base: Model, answers: list[Answer], taught: Any, tmp_path: Path
) -> None:
    adapter = adapter_of(taught[0], base)
    write_adapter(tmp_path / "adapter", adapter, base)
    back = read_adapter(tmp_path / "adapter", base)
    assert back.factors.keys() == adapter.factors.keys() and back.scale == adapter.scale
    for name, (a, b) in adapter.factors.items():
        assert np.array_equal(back.factors[name][0], a) and np.array_equal(back.factors[name][1], b)
    merged = merge(base, back, tmp_path / "merged")
    assert np.allclose(losses(with_corrections(merged, OPTIONS, 0), answers), losses(taught[0], answers), atol=1e-4)
    assert merged.history[-1]["technique"] == "adapt"


def logits_of(module: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        found = module(torch.from_numpy(tokens.astype(np.int64))[None])
    values: np.ndarray = getattr(found, "logits", found)[0].numpy()
    return values


def plain(base: Model) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base.path)


@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_reads_what_is_written(
    base: Model, answers: list[Answer], taught: Any, tmp_path: Path, stabilized: bool
) -> None:
    peft = pytest.importorskip("peft")
    scale = Adapt(rank=4, alpha=16.0, rank_stabilized=stabilized).scale
    adapter = dataclasses.replace(adapter_of(taught[0], base), scale=scale)
    write_adapter(tmp_path / "adapter", adapter, base)
    assert read_adapter(tmp_path / "adapter", base).scale == scale == (8.0 if stabilized else 4.0)
    theirs = peft.PeftModel.from_pretrained(plain(base), str(tmp_path / "adapter"))
    merged = Reference.from_model(merge(base, adapter, tmp_path / "merged"))
    found, expected = logits_of(merged, answers[0].tokens), logits_of(theirs, answers[0].tokens)
    assert np.abs(found - expected).max() < 1e-3 < np.abs(logits_of(plain(base), answers[0].tokens) - expected).max()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "lora_alpha": 7},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": r".*layers\.1\..*(v_proj|o_proj|gate_proj)", "lora_dropout": 0.1},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["k_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
)
def test_what_peft_writes_gives_its_logits(base: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    import torch

    theirs = peft.get_peft_model(plain(base), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **settings)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = Reference.from_model(merge(base, read_adapter(tmp_path / "theirs", base), tmp_path / "merged"))
    tokens = np.arange(5, 25)
    found, expected = logits_of(ours, tokens), logits_of(theirs, tokens)
    assert np.abs(found - expected).max() < 1e-3 < np.abs(logits_of(plain(base), tokens) - expected).max()


@pytest.fixture(scope="module")
def turned(base: Model, answers: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained correction that learned lengths too."""
    options = dataclasses.replace(OPTIONS, weight_decomposed=True)
    module = with_corrections(base, options, 0)
    where: dict[str, Any] = {"seed": 0, "threads": 1, "work_dir": tmp_path_factory.mktemp("dora")}
    before = losses(module, answers)
    assert np.array_equal(before, losses(with_corrections(base, OPTIONS, 0), answers))  # the base, to the bit
    teach(module, answers, options, base=base.digest, progress=silent, **where)
    assert losses(module, answers).mean() < before.mean() - 0.1
    return module


def test_learned_lengths_survive_files_merge_and_are_what_peft_computes(
    base: Model, answers: list[Answer], turned: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    adapter = adapter_of(turned, base)
    write_adapter(tmp_path / "adapter", adapter, base)
    back = read_adapter(tmp_path / "adapter", base)
    assert back.magnitudes.keys() == back.factors.keys() == adapter.factors.keys()
    merged = Reference.from_model(merge(base, back, tmp_path / "merged"))
    tokens = answers[0].tokens
    theirs = peft.PeftModel.from_pretrained(plain(base), str(tmp_path / "adapter")).eval()
    found = logits_of(merged, tokens)
    assert np.abs(found - logits_of(theirs, tokens)).max() < 1e-3
    assert np.abs(found - logits_of(turned.eval(), tokens)).max() < 1e-3
    without = dataclasses.replace(back, magnitudes={})
    other = logits_of(Reference.from_model(merge(base, without, tmp_path / "without")), tokens)
    assert np.abs(found - other).max() > 1e-2  # lengths matter


def test_an_adapter_that_changes_lengths_runs_merged_only(base: Model, turned: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", adapter_of(turned, base), base)
    with pytest.raises(Unsupported, match="DoRA"):
        Adapters(base, {"yours": tmp_path / "adapter"})
    file = tmp_path / "adapter" / TENSORS
    stored = load_file(file)
    lengths = sorted(name for name in stored if "magnitude" in name)
    for gone, message in ((lengths, "only a part"), (lengths[:1], "only a part")):
        save_file({name: values for name, values in stored.items() if name not in gone}, file)
        with pytest.raises(SnelloError, match=message):
            read_adapter(tmp_path / "adapter", base)
    save_file({**stored, lengths[0]: stored[lengths[0]][:-1]}, file)
    with pytest.raises(SnelloError, match="lora_magnitude_vector"):
        read_adapter(tmp_path / "adapter", base)


def test_a_row_of_zeros_stays_one() -> None:
    factors = {"layers.0.attention.q": (np.ones((1, 3), np.float32), np.zeros((2, 1), np.float32))}
    lengths = {"layers.0.attention.q": np.array([0.0, 2.0], np.float32)}
    adapter = Adapter(factors=factors, rank=1, alpha=1.0, scale=1.0, magnitudes=lengths)
    found = adapter.merged("layers.0.attention.q", np.array([[0, 0, 0], [3, 4, 0]], np.float32))
    assert np.allclose(found, [[0, 0, 0], [1.2, 1.6, 0]])


def test_a_head_and_trained_modules_of_peft_are_refused(base: Model, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for number, (settings, message) in enumerate(
        [
            ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*lm_head"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
            ({"target_modules": ["lm_head"]}, "no place for"),
        ]
    ):
        how = {"target_modules": ["q_proj"], "r": 2, **settings}
        theirs = peft.get_peft_model(plain(base), peft.LoraConfig(**how))
        theirs.save_pretrained(str(tmp_path / str(number)), save_embedding_layers=False)
        with pytest.raises(SnelloError, match=message):
            read_adapter(tmp_path / str(number), base)


def test_an_adapter_of_another_base_is_refused(base: Model, taught: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", adapter_of(taught[0], base), base)
    other = load(make_checkpoint(tmp_path / "other", "llama", seed=1))
    with pytest.raises(SnelloError, match="another base"):
        read_adapter(tmp_path / "adapter", other)
    with pytest.raises(SnelloError, match="no adapter"):
        read_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"r": 0}, "r=0"),
        ({"use_rslora": "no"}, "use_rslora=no"),
        ({"use_dora": [1]}, r"use_dora=\[1\]"),
        ({"modules_to_save": [["classifier"]], "task_type": "SEQ_CLS"}, "modules_to_save="),
    ],
)
def test_what_cannot_be_meant_is_refused(
    base: Model, taught: Any, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    write_adapter(tmp_path / "adapter", adapter_of(taught[0], base), base)
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(SnelloError, match=message):
        read_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    ("key", "value"),
    [("peft_type", "IA3"), ("use_qalora", True), ("bias", "all"), ("rank_pattern", {"q_proj": 2}), ("later_idea", 3)],
)
def test_what_peft_says_and_is_not_computed_is_refused(
    base: Model, taught: Any, tmp_path: Path, key: str, value: object
) -> None:
    write_adapter(tmp_path / "adapter", adapter_of(taught[0], base), base)
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(Unsupported, match=str(value) if key == "peft_type" else key):
        read_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"targets": "qq"},
        {"dropout": 1.0},
        {"alpha": -1},
        {"batch": True},
        {"rank_stabilized": 1},
        {"weight_decomposed": 1},
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(SnelloError):
        Adapt(**options)


def test_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="masked-lm"):
        Adapt().linears(load(make_checkpoint(tmp_path / "bert", "bert-mlm")).spec)
