"""Distill: students learn, resume to the same bytes, load everywhere, and what does not fit is refused first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from snello.errors import SnelloError, Unsupported
from snello.models import Model, load
from snello.models.reference import Reference
from snello.techniques.base import Context, Trains, wanted_tokens
from snello.techniques.convolution import Convolution
from snello.techniques.distill import Distill
from snello.techniques.distill.apply import train_options, training_rows
from snello.techniques.distill.pair import overlapping
from snello.techniques.prune import Prune
from snello.techniques.quantize import Quantize
from tests.checkpoints import VARIANTS, make_checkpoint
from tests.techniques import real

SMALL: dict[str, Any] = {"tokens": 600, "batch_tokens": 64, "rate": 1e-3}


def windows(count: int = 6, length: int = 32, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(1, 60, length).astype(np.int32) for _ in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> Model:
    return load(make_checkpoint(tmp_path / "source", "llama"))


@pytest.fixture
def narrow(source: Model, tmp_path: Path) -> Model:
    options: dict[str, Any] = {"ffn": 0.5, "width": 0.25, "heads": 0.5}
    return Prune(**options).apply(source, Context(output=tmp_path / "narrow", windows=windows()))


def healed(student: Model, teacher: Model, path: Path, **options: Any) -> Model:
    context = Context(output=path, windows=windows(), original=teacher)
    return Distill(**SMALL | options).apply(student, context)


@torch.inference_mode()
def divergence(model: Model, teacher: Model) -> float:
    tokens = torch.from_numpy(np.stack(windows())).long()
    p, q = (Reference.from_model(one)(tokens).log_softmax(-1) for one in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("loss", ["forward", "reverse", "jensen", "text", "forward:1,relations:1"])
def test_healing_brings_the_student_nearer(loss: str, source: Model, narrow: Model, tmp_path: Path) -> None:
    made = healed(narrow, source, tmp_path / "out", loss=loss, tokens=1500)
    assert made.spec == narrow.spec
    if loss != "text":
        assert divergence(made, source) < 0.7 * divergence(narrow, source)
    entry = made.history[-1]
    assert [step["technique"] for step in made.history] == ["prune", "distill"]
    assert entry["tokens"] == 23 * 64 and entry["text_tokens"] == 192
    assert entry["teacher"] == (None if loss == "text" else source.digest)
    assert not (tmp_path / ".out.training").exists()


@pytest.mark.parametrize("loss", ["cosine", "mse", "forward:1,cosine:1,mse:0.1"])
def test_hidden_rows_teach_where_widths_agree(loss: str, source: Model, narrow: Model, tmp_path: Path) -> None:
    shallow = Distill(**SMALL | {"student": "alternate", "loss": loss, "tokens": 1500})
    made = shallow.apply(source, Context(output=tmp_path / "out", windows=windows()))
    least = Distill(**SMALL | {"student": "alternate", "loss": loss, "tokens": 64, "rate": 1e-9})
    begin = least.apply(source, Context(output=tmp_path / "begin", windows=windows()))
    assert made.history[-1]["loss"] < 0.9 * begin.history[-1]["loss"]
    with pytest.raises(Unsupported, match="hidden rows of 96 and 80 dimensions"):
        healed(narrow, source, tmp_path / "no", loss=loss)


def cut_short(narrow: Model, source: Model, tmp_path: Path, monkeypatch: Any) -> Context:
    """What a training had that was interrupted half-way, with its checkpoint there."""
    monkeypatch.setattr("snello.training.loop.TELL_SECONDS", 0.0)

    def stop(message: str, fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    context = Context(output=tmp_path / "cut", windows=windows(), original=source, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        Distill(**SMALL).apply(narrow, context)
    return context


def test_same_seed_same_bytes_and_interruptions_do_not_show(
    source: Model, narrow: Model, tmp_path: Path, monkeypatch: Any
) -> None:
    one, other = (healed(narrow, source, tmp_path / name) for name in ("one", "other"))
    assert one.digest == other.digest != narrow.digest
    context = cut_short(narrow, source, tmp_path, monkeypatch)
    assert (tmp_path / ".cut.training").is_dir() and not (tmp_path / "cut").exists()
    heard: list[str] = []
    quiet = dataclasses.replace(context, progress=lambda message, _: heard.append(message))
    assert Distill(**SMALL).apply(narrow, quiet).digest == one.digest
    assert "going on from step 5" in heard[1] and heard[0] == "distill: 3.1 passes over 192 tokens of text"


@pytest.mark.parametrize(
    "change", [{"loss": "reverse"}, {"loss": "forward:1,text:1"}, {"loss": "text"}, {"temperature": 2.0}, {"top_k": 4}]
)
def test_what_was_taught_otherwise_is_not_gone_on_with(
    change: dict[str, Any], source: Model, narrow: Model, tmp_path: Path, monkeypatch: Any
) -> None:
    context = cut_short(narrow, source, tmp_path, monkeypatch)
    with pytest.raises(SnelloError, match="another training, which came to step 5"):
        Distill(**SMALL | change).apply(narrow, context)
    teacher = Prune(ffn=0.25).apply(source, Context(output=tmp_path / "teacher", windows=windows()))
    with pytest.raises(SnelloError, match="another training"):
        Distill(**SMALL | {"teacher": str(teacher.path)}).apply(narrow, context)
    same = dataclasses.replace(context, progress=lambda message, fraction: None)
    Distill(**SMALL | {"teacher": str(source.path), "recompute": True}).apply(narrow, same)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gpt2", "bert-mlm", "distilbert-mlm", "bert-classify"])
def test_every_other_layer_loads_in_transformers(variant: str, tmp_path: Path) -> None:
    teacher = load(make_checkpoint(tmp_path / "source", variant))
    technique = Distill(**SMALL | {"student": "alternate", "tokens": 128})
    made = technique.apply(teacher, Context(output=tmp_path / "out", windows=windows()))
    assert made.spec == technique.plan(teacher.spec) and len(made.spec.layers) == (len(teacher.spec.layers) + 1) // 2
    kind = getattr(transformers, VARIANTS[variant][0])
    theirs, report = kind.from_pretrained(made.path, output_loading_info=True, dtype=torch.float32)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.from_numpy(np.stack(windows(2))).long()
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs.eval()(tokens).logits, Reference.from_model(made)(tokens), atol=2e-5, rtol=1e-4
        )


def test_before_training_alternate_is_every_other_layer(source: Model, tmp_path: Path) -> None:
    still = Distill(**SMALL | {"student": "alternate", "tokens": 64, "rate": 1e-12})
    made = still.apply(source, Context(output=tmp_path / "out", windows=windows()))
    for new, old in ((0, 0), (1, 2)):
        ours, theirs = (m.weights.values(f"layers.{i}.ffn.up.weight") for m, i in ((made, new), (source, old)))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_bf16_stays_bf16_on_disk(tmp_path: Path) -> None:
    teacher = load(make_checkpoint(tmp_path / "source", "qwen3", dtype=torch.bfloat16))
    small = Prune(ffn=0.3).apply(teacher, Context(output=tmp_path / "small", windows=windows()))
    made = healed(small, teacher, tmp_path / "out")
    assert made.spec == small.spec and made.spec.default_format.weights == "bf16"


def with_tokenizer(path: Path, variant: str, *, mask: bool) -> Model:
    """Its last made-up word is taken away, and is the mask token if so wished."""
    make_checkpoint(path, variant)
    table = json.loads((path / "tokenizer.json").read_text())
    left, right = table["model"]["merges"][-1]
    while [left, right] in table["model"]["merges"]:
        table["model"]["merges"].remove([left, right])
    number = table["model"]["vocab"].pop(left + right)
    (path / "tokenizer.json").write_text(json.dumps(table))
    if mask:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.add_special_tokens(["[MASK]"])
        assert tokenizer.token_to_id("[MASK]") == number
        tokenizer.save(str(path / "tokenizer.json"))
    return load(path)


def test_masked_words(tmp_path: Path) -> None:
    teacher = with_tokenizer(tmp_path / "source", "bert-mlm", mask=True)
    context = Context(output=tmp_path / "out", windows=windows())
    options = Distill(**SMALL | {"student": "alternate", "loss": "forward:5,text:2,cosine:1", "tokens": 1500})
    batch = training_rows(options, teacher, context).at(0)
    assert (batch["tokens"] == teacher.tokenizer.mask_token).any() and (batch["targets"] != -100).any()
    made = options.apply(teacher, context)
    assert made.history[-1]["loss"] > 0 and made.spec.task == "masked-lm"
    bare = load(make_checkpoint(tmp_path / "bare", "bert-mlm"))
    with pytest.raises(Unsupported, match="has no mask token"):
        options.apply(bare, dataclasses.replace(context, output=tmp_path / "none"))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kl"},
        {"student": "half"},
        {"temperature": 0},
        {"top_k": -1},
        {"tokens": 0},
        {"tokens": 1.5},
        {"rate": -1},
        {"batch_tokens": True},
        {"recompute": "yes"},
        {"teacher": 3},
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SnelloError) as caught:
        Distill(**options)
    assert caught.value.hint


def test_nobody_teaches_himself(source: Model, tmp_path: Path) -> None:
    alone = Context(output=tmp_path / "out", windows=windows())
    with pytest.raises(SnelloError, match="has no teacher") as caught:
        Distill(**SMALL).apply(source, alone)
    assert "--teacher" in str(caught.value.hint)
    with pytest.raises(Unsupported, match="is its own teacher"):
        healed(source, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_refused(source: Model, narrow: Model, tmp_path: Path) -> None:
    changed = with_tokenizer(tmp_path / "other", "llama", mask=False)
    assert changed.tokenizer.digest != source.tokenizer.digest == narrow.tokenizer.digest
    with pytest.raises(Unsupported, match="different vocabularies"):
        Distill(**SMALL | {"teacher": str(changed.path)}).apply(
            narrow, Context(output=tmp_path / "out", windows=windows())
        )


def test_relations_need_attention_on_both_sides(source: Model, tmp_path: Path) -> None:
    last = Convolution(layers=str(len(source.spec.layers) - 1))
    convolving = last.apply(source, Context(output=tmp_path / "convolving", windows=windows()))
    with pytest.raises(Unsupported, match="the last layer of convolving convolves"):
        healed(source, convolving, tmp_path / "no", loss="forward,relations")
    with pytest.raises(Unsupported, match="the last layer convolves"):
        healed(convolving, source, tmp_path / "no", loss="forward,relations")
    assert healed(source, convolving, tmp_path / "out").history[-1]["teacher"] == convolving.digest


def test_another_task_is_refused(narrow: Model, tmp_path: Path) -> None:
    encoder = make_checkpoint(tmp_path / "encoder", "bert-mlm")
    with pytest.raises(Unsupported, match="masked-lm model"):
        Distill(**SMALL | {"teacher": str(encoder)}).apply(narrow, Context(output=tmp_path / "o", windows=windows()))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "this trains on text, and none was given"),
        ([np.ones(600, np.int32)], "a window of 600 tokens"),
        ([np.full(9, 307, np.int32)], "token 307"),
        ([np.ones(1, np.int32)], "a single token"),
    ],
    ids=["none", "long", "alien", "single"],
)
def test_text_is_needed_and_must_fit(texts: Any, message: str, source: Model, tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match=message) as caught:
        Distill(**SMALL | {"student": "alternate"}).apply(source, Context(output=tmp_path / "out", windows=texts))
    assert caught.value.hint


def test_text_that_judges_is_not_trained_on(source: Model, tmp_path: Path) -> None:
    texts = windows()
    proof = [np.concatenate((texts[2][:13], windows(seed=9)[0]))]
    assert overlapping(texts, proof) == 1 and overlapping(texts, [texts[2][:12]]) == 0
    context = Context(output=tmp_path / "out", windows=texts, held_out=proof)
    with pytest.raises(SnelloError, match="1 of 6 training windows share 13 tokens in a row with the proof"):
        Distill(**SMALL | {"student": "alternate"}).apply(source, context)


def test_lean_models_and_classifiers_without_labels_are_refused(source: Model, tmp_path: Path) -> None:
    lean = Quantize(weights="int8").apply(source, Context(output=tmp_path / "lean"))
    with pytest.raises(Unsupported, match="mixes number formats"):
        Distill().plan(lean.spec)
    classifier = load(make_checkpoint(tmp_path / "classifier", "bert-classify")).spec
    with pytest.raises(Unsupported, match="no labels"):
        Distill(loss="text").plan(classifier)
    assert Distill().control(classifier) is None


def test_half_of_one_layer_is_refused_by_its_reason(source: Model) -> None:
    with pytest.raises(Unsupported, match="which has one") as caught:
        Distill(student="alternate").plan(dataclasses.replace(source.spec, layers=source.spec.layers[:1]))
    assert caught.value.hint == "leave student out: given"


def test_it_trains_and_names_its_control(source: Model) -> None:
    technique = Distill(loss="forward:5,relations:1", student="alternate", teacher="x", tokens=77, rate=1e-4)
    assert isinstance(technique, Trains) and wanted_tokens(technique) == 77 and wanted_tokens(Prune()) == 0
    assert technique.control(source.spec) == Distill(loss="text", tokens=77, rate=1e-4)


def test_large_vocabularies_are_cut_into_pieces(source: Model, tmp_path: Path) -> None:
    rows = training_rows(Distill(batch_tokens=192), source, Context(output=tmp_path, windows=windows()))
    wide = dataclasses.replace(source.spec, vocab_size=400_000)
    context = Context(output=tmp_path)
    assert train_options(Distill(tokens=19_200), source.spec, rows, context).accumulate == 1
    assert train_options(Distill(tokens=19_200), wide, rows, context).accumulate == 3
    assert train_options(Distill(tokens=19_200), wide, rows, context).steps == 100


@pytest.mark.slow
def test_healing_a_real_model_beats_pruning_alone(tmp_path: Path) -> None:
    novels, texts, held = real.novels(), real.windows("train", 200), real.windows("valid", 12)
    small = Prune(ffn=0.5).apply(novels, Context(output=tmp_path / "small", windows=texts[:40]))
    context = Context(output=tmp_path / "out", windows=texts, held_out=held, original=novels)
    made = Distill(tokens=60_000, batch_tokens=2048, rate=4e-4).apply(small, context)
    base, before, after = (real.loss(Reference.from_model(m), held) for m in (novels, small, made))
    assert base < after < before - 0.1 * (before - base)  # 0.15 of it, measured: least squares repaired most before
