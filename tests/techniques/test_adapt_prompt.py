"""Prompts that learn: they begin as words, learn, survive files and interruptions, and are what PEFT computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.models import load
from snello.models.adapter import CONFIG, TENSORS, Adapter, read_adapter, write_adapter
from snello.models.model import Model
from snello.models.soft_prompt import TENSOR
from snello.techniques.adapt import Adapt
from snello.techniques.adapt.merge import merge
from snello.techniques.adapt.prompt import behind, ids_of, rows_of, with_prompt
from snello.techniques.adapt.train import Answer, score, teach
from snello.techniques.base import silent
from snello.training.loop import Trained
from tests.checkpoints import make_checkpoint

COUNT = 6
OPTIONS = Adapt(method="prompt", virtual_tokens=COUNT, epochs=6, batch=8, rate=0.03)


def learned(base: Model, answers: list[Answer], work: Path, progress: Any = silent) -> tuple[Any, Trained]:
    module = with_prompt(base, OPTIONS, answers, 0)
    where: dict[str, Any] = {"base": base.digest, "seed": 0, "threads": 1, "work_dir": work}
    return module, teach(module, behind(ids_of(base.spec, COUNT), answers), OPTIONS, progress=progress, **where)


@pytest.fixture(scope="module")
def taught(base: Model, answers: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Trained]:
    return learned(base, answers, tmp_path_factory.mktemp("work"))


def losses(module: Any, answers: list[Answer]) -> np.ndarray:
    return np.concatenate(score(module, answers))


def test_it_begins_as_words_and_learns(base: Model, answers: list[Answer], taught: Any) -> None:
    """A text with the prompt is read as the words that it begins as before the text; without, as the base reads it."""
    options = Adapt(method="prompt", virtual_tokens=COUNT, beginning="ab")
    module, ids = with_prompt(base, options, answers, 0), ids_of(base.spec, COUNT)
    words = np.resize(base.tokenizer.encode("ab", add_special=False), COUNT).astype(np.int32)
    with_words = losses(module, behind(words, answers))
    assert np.array_equal(losses(module, behind(ids, answers)), with_words)
    assert np.array_equal(losses(module, answers), losses(taught[0], answers))  # what is learned stands in the prompt
    untaught = losses(with_prompt(base, OPTIONS, answers, 0), behind(ids, answers))
    assert losses(taught[0], behind(ids, answers)).mean() < untaught.mean() - 0.05


def test_interrupted_and_resumed_gives_the_same_bytes(
    base: Model, answers: list[Answer], taught: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(message: str, fraction: float) -> None:
        if fraction > 0.3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("snello.training.loop.TELL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            learned(base, answers, tmp_path, stop)
    module, again = learned(base, answers, tmp_path)
    assert 0 < again.resumed_from < again.steps and again.digest == taught[1].digest
    assert np.array_equal(rows_of(module), rows_of(taught[0]))


def logits_of(module: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = module(torch.from_numpy(tokens.astype(np.int64))[None])
    values: np.ndarray = getattr(found, "logits", found)[0].numpy()
    return values


def with_it(model: Model, folder: Path, tokens: np.ndarray) -> np.ndarray:
    with NativeExecutor(model, adapters={"it": folder}) as executor:
        return executor.logits(tokens, adapter="it")


@pytest.mark.parametrize("variant", ["llama", "gemma3", "qwen3", "gpt2"])
def test_peft_reads_what_is_written_and_is_read(tmp_path: Path, variant: str) -> None:
    """The same logits both ways, whatever a family does to its embeddings and positions."""
    peft = pytest.importorskip("peft")
    import transformers

    model = load(make_checkpoint(tmp_path / variant, variant))
    rows = np.random.default_rng(0).normal(0, 0.5, (COUNT, model.spec.hidden_size)).astype(np.float32)
    write_adapter(tmp_path / "ours", Adapter(prompt=rows, base=model.digest, facts={"seed": 3}), model)
    back, tokens = read_adapter(tmp_path / "ours", model), np.arange(5, 25)
    assert back.prompt is not None and np.array_equal(back.prompt, rows) and back.facts == {"seed": 3}
    plain = transformers.AutoModelForCausalLM.from_pretrained(model.path).eval()
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "ours")).eval()
    expected = logits_of(theirs, tokens)[-len(tokens) :]
    assert np.abs(with_it(model, tmp_path / "ours", tokens) - expected).max() < 2e-3
    plain = transformers.AutoModelForCausalLM.from_pretrained(model.path).eval()
    how = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made = peft.get_peft_model(plain, how).eval()
    made.save_pretrained(str(tmp_path / "theirs"))
    expected = logits_of(made, tokens)[-len(tokens) :]
    assert np.abs(with_it(model, tmp_path / "theirs", tokens) - expected).max() < 2e-3


def test_it_is_not_merged(base: Model, tmp_path: Path) -> None:
    rows = np.zeros((2, base.spec.hidden_size), np.float32)
    with pytest.raises(Unsupported, match="cannot be merged"):
        merge(base, Adapter(prompt=rows, base=base.digest), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_damaged_files_and_other_bases_are_refused(base: Model, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    write_adapter(folder, Adapter(prompt=np.zeros((2, base.spec.hidden_size), np.float32), base=base.digest), base)
    other = load(make_checkpoint(tmp_path / "other", "llama", seed=1))
    with pytest.raises(SnelloError, match="another base"):
        read_adapter(folder, other)
    config, stored = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    for change, message in (
        ({"num_virtual_tokens": 3}, r"\(2, \d+\), not \(3, "),
        ({"later_idea": 1}, "later_idea=1"),
        ({"task_type": "SEQ_CLS"}, "prompt for SEQ_CLS"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        (folder / CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(SnelloError, match=message):
            read_adapter(folder, base)
    (folder / CONFIG).write_text(json.dumps(config))
    for tensors in ({"else": stored[TENSOR]}, {**stored, "else": stored[TENSOR]}):
        save_file(tensors, folder / TENSORS)
        with pytest.raises(SnelloError, match=f"not {TENSOR} alone"):
            read_adapter(folder, base)


def test_options_that_mean_nothing(base: Model, answers: list[Answer], tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="virtual_tokens=0"):
        Adapt(virtual_tokens=0)
    encoder = load(make_checkpoint(tmp_path / "bert", "bert-classify"))
    with pytest.raises(Unsupported, match="method=prompt of an encoder"):
        Adapt(method="prompt").linears(encoder.spec)
