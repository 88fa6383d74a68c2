"""Encoders that learn labels: three methods, the gate, stock classifiers, PEFT's files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from snello.cli import main
from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.models import load
from snello.models.adapter import CONFIG, OWN, TENSORS, read_adapter
from snello.models.classifier import as_classifier
from snello.models.model import Model
from snello.models.reference import Reference
from snello.models.spec import Deployment
from snello.optimize.adapt import Adapted, adapt
from snello.optimize.adapt_classifier import encoded
from snello.optimize.adapt_data import Example, labelled
from snello.techniques.adapt import Adapt, Method
from snello.techniques.adapt.classify import Labelled, learner, score, teach
from snello.techniques.adapt.merge import merge
from snello.techniques.attention import CheaperAttention
from snello.techniques.base import Context, silent
from tests.checkpoints import make_checkpoint
from tests.optimize.test_adapt import sentence, write

METHODS: tuple[Method, ...] = ("lora", "head", "full")
RATES = {"lora": 1e-2, "head": 1e-2, "full": 1e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_checkpoint(tmp_path_factory.mktemp("base") / "bert", "bert-mlm"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a label is shows in the first letter."""
    rows: list[dict[str, object]] = [
        {"text": ("X " if n % 2 else "e ") + sentence(n), "label": "good" if n % 2 else "bad"} for n in range(120)
    ]
    return write(tmp_path_factory.mktemp("data") / "d.jsonl", rows)


def options_of(method: Method) -> Adapt:
    return Adapt(method=method, rank=4, rate=RATES[method], epochs=8, batch=8)


@pytest.fixture(scope="module")
def made(base: Model, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapted]:
    folder = tmp_path_factory.mktemp("made")
    return {
        method: adapt(base, data, options_of(method), folder / method, merged=True, threads=1) for method in METHODS
    }


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.from_numpy(tokens.astype(np.int64))[None])
    values: np.ndarray = getattr(found, "logits", found)[0].numpy()
    return values


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_stock_classifier(base: Model, made: dict[str, Adapted], method: str) -> None:
    import transformers

    path = made[method].path
    assert made[method].verdict.gain.low > 0 and made[method].verdict.after > 0.9
    model = load(path)
    assert model.spec.task == "sequence-classification" and model.spec.head.labels == ("bad", "good")
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert stock.config.id2label == {0: "bad", 1: "good"}
    tokens = np.array(model.tokenizer.encode("X amber birch, cedar"), np.int32)
    expected = logits_of(stock, tokens)
    with NativeExecutor(model, Deployment(threads=1)) as executor:
        assert np.abs(executor.encode(tokens) - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.allclose(logits_of(Reference.from_model(model), tokens), expected, atol=1e-4)
    assert model.history[-1]["technique"] == "adapt" and np.ptp(expected) > 0.1
    kept = np.array_equal(
        model.weights.values("embedding.tokens.weight"), base.weights.values("embedding.tokens.weight")
    )
    assert kept == (method != "full")


def longformer(folder: Path) -> Path:
    bert = load(make_checkpoint(folder / "bert", "bert-mlm"))
    return CheaperAttention(window=32, positions=256).apply(bert, Context(output=folder / "long")).path


@pytest.mark.parametrize("kind", ["distilbert", "longformer"])
def test_other_families(tmp_path: Path, data: Path, kind: str) -> None:
    import transformers

    path = longformer(tmp_path) if kind == "longformer" else make_checkpoint(tmp_path / kind, "distilbert-mlm")
    base = load(path)
    adapt(base, data, options_of("lora"), tmp_path / "adapter", threads=1)
    merged = merge(base, read_adapter(tmp_path / "adapter", base), tmp_path / "merged")
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(merged.path).eval()
    tokens = np.array(base.tokenizer.encode("X amber birch, cedar"), np.int32)
    expected = logits_of(stock, tokens)
    with NativeExecutor(merged, Deployment(threads=1)) as executor:
        assert np.abs(executor.encode(tokens) - expected).max() < 1e-3 < np.ptp(expected)


def test_what_learns_is_counted(base: Model, made: dict[str, Adapted]) -> None:
    assert made["head"].parameters == 96 * 96 + 96 + 2 * 96 + 2
    assert made["full"].parameters == load(made["full"].path).num_parameters
    attention, ffn = 4 * (96 + 96) * 4, 2 * (96 + 200) * 4
    assert made["lora"].parameters == 2 * (attention + ffn) + made["head"].parameters  # nobody trained the pooler


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_gives_the_same_bytes(base: Model, tmp_path: Path, method: Method) -> None:
    random = np.random.default_rng(0)
    texts = [Labelled(random.integers(0, 300, 4 + place % 7).astype(np.int32), place % 2) for place in range(40)]
    classifier, options = as_classifier(base, ["bad", "good"]), options_of(method)

    def learned(work: Path, progress: Any = silent) -> Any:
        where: dict[str, Any] = {"base": "base", "seed": 0, "threads": 1, "work_dir": work}
        return teach(learner(classifier, options, 0), texts, options, progress=progress, **where)

    def stop(message: str, fraction: float) -> None:
        if fraction > 0.3:
            raise KeyboardInterrupt

    import snello.training.loop as loop

    whole = learned(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "TELL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            learned(tmp_path / "cut", stop)
    again = learned(tmp_path / "cut")
    assert 0 < again.resumed_from < again.steps and again.digest == whole.digest


def test_the_same_seed_gives_the_same_classifier(
    base: Model, data: Path, made: dict[str, Adapted], tmp_path: Path
) -> None:
    again = adapt(base, data, options_of("lora"), tmp_path / "again", merged=True, threads=1)
    assert load(again.path).digest == load(made["lora"].path).digest


@pytest.fixture(scope="module")
def adapter(base: Model, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    adapt(base, data, options_of("lora"), path, threads=1)
    return path


def stock_base(base: Model, labels: int) -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=labels).eval()


def test_peft_reads_what_is_written(base: Model, made: dict[str, Adapted], adapter: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(stock_base(base, 2), str(adapter)).eval()
    merged = merge(base, read_adapter(adapter, base), tmp_path / "merged")
    assert merged.spec.head.labels == ("bad", "good") and merged.digest == load(made["lora"].path).digest
    tokens = np.array(base.tokenizer.encode("e cedar, delta"), np.int32)
    found, expected = logits_of(Reference.from_model(merged), tokens), logits_of(theirs, tokens)
    assert np.abs(found - expected).max() < 1e-3 < np.ptp(expected)


@pytest.mark.parametrize("variant", ["bert-mlm", "bert-classify"])
def test_what_peft_writes_gives_its_logits(tmp_path: Path, variant: str) -> None:
    peft = pytest.importorskip("peft")
    base = load(make_checkpoint(tmp_path / "base", variant))
    settings = {"modules_to_save": ["pooler"], "target_modules": ["query", "value"]}  # a pooler that nobody trained
    if variant == "bert-classify":
        settings = {"target_modules": "all-linear"}
    config = peft.LoraConfig(r=3, task_type="SEQ_CLS", lora_alpha=7, **settings)
    theirs = peft.get_peft_model(stock_base(base, 3), config).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = Reference.from_model(merge(base, read_adapter(tmp_path / "theirs", base), tmp_path / "merged"))
    tokens = np.arange(5, 25)
    found, expected = logits_of(ours, tokens), logits_of(theirs, tokens)
    assert np.abs(found - expected).max() < 1e-3 < np.ptp(expected)


def test_an_adapter_of_another_base_is_refused(base: Model, adapter: Path, tmp_path: Path) -> None:
    other = load(make_checkpoint(tmp_path / "other", "bert-mlm", seed=1))
    with pytest.raises(SnelloError, match="another base"):
        read_adapter(adapter, other)
    own = json.loads((adapter / OWN).read_text())
    unknown = shutil.copytree(adapter, tmp_path / "unknown")
    (unknown / OWN).write_text(json.dumps({**own, "base": None}))
    with pytest.raises(Unsupported, match="decoder"):
        read_adapter(unknown, load(make_checkpoint(tmp_path / "llama", "llama")))


def test_an_adapter_without_its_last_layer_is_refused(base: Model, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copyfile(adapter / CONFIG, tmp_path / CONFIG)
    tensors = load_file(adapter / TENSORS)
    save_file({name: each for name, each in tensors.items() if "classifier" not in name}, tmp_path / TENSORS)
    with pytest.raises(SnelloError, match=r"no base_model\.model\.classifier\.weight"):
        read_adapter(tmp_path, base)


def test_what_does_not_beat_the_commonest_label_is_not_written(
    base: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in METHODS:
        words = ["adapt", str(base.path), "--data", str(data), "--method", method, "--rate", "1e-9", "--epochs", "0.1"]
        assert main([*words, "-o", str(tmp_path / method)]) == 3
        assert not list(tmp_path.iterdir())
    assert "does not beat" in capsys.readouterr().err


def test_a_head_that_knows_the_labels_is_what_has_to_be_beaten(
    made: dict[str, Adapted], data: Path, tmp_path: Path
) -> None:
    taught = load(made["full"].path)
    with pytest.raises(SnelloError, match="does not beat") as refused:
        adapt(taught, data, dataclasses.replace(options_of("head"), epochs=1), tmp_path / "again", threads=1)
    assert refused.value.exit_code == 3


def test_the_command_line(base: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapt", str(base.path), "--data", str(data), "--rate", "0.01", "--epochs", "8", "--json"]
    assert main([*words, "-o", str(tmp_path / "adapter")]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["verdict"]["measure"] == "accuracy" and (tmp_path / "adapter" / CONFIG).exists()
    merging = ["adapt", str(base.path), "--adapter", str(tmp_path / "adapter"), "--merge", "-o", str(tmp_path / "m")]
    assert main(merging) == 0 and load(tmp_path / "m").spec.task == "sequence-classification"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--merge", "--quantize", "int8"], "labelled text"), (["--method", "heads"], "heads")],
)
def test_refused_before_training(
    base: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["adapt", str(base.path), "--data", str(data), *words, "-o", str(tmp_path / "out")]) != 0
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": sentence(n), "completion": "x"} for n in range(80)], "no labels"),
        ([{"text": sentence(n), "label": "one"} for n in range(80)], "the label 'one'"),
        ([{"text": sentence(n), "label": "rare" if n == 5 else "one"} for n in range(80)], "rare|beat"),
    ],
)
def test_data_that_teaches_no_labels(base: Model, tmp_path: Path, rows: list[dict[str, object]], said: str) -> None:
    data = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(SnelloError, match=said):
        adapt(base, data, Adapt(epochs=0.1, rate=1e-9), tmp_path / "out", threads=1)


def test_decoders_learn_by_corrections_alone(data: Path, tmp_path: Path) -> None:
    llama = load(make_checkpoint(tmp_path / "llama", "llama"))
    with pytest.raises(Unsupported, match="method=full"):
        adapt(llama, data, Adapt(method="full"), tmp_path / "out")


def test_a_long_text_loses_its_end(base: Model) -> None:
    found = encoded(base, [labelled("e" * 400, "a"), Example(prompt="b", completion="c", label="a")], ["a"])
    assert len(found[0].tokens) == base.spec.max_positions and len(found[1].tokens) == 1


def test_padding_changes_no_answer(base: Model) -> None:
    classifier = as_classifier(base, ["bad", "good"])
    module = learner(classifier, options_of("full"), 0)
    torch.nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(0))
    texts = [Labelled(np.arange(1, 1 + length, dtype=np.int32), 0) for length in (30, 3, 11)]
    for text, row in zip(texts, score(module, texts), strict=True):
        assert np.allclose(logits_of(module, text.tokens), row, atol=1e-4)
