"""Prune: shapes shrink for everybody alike, what is useless goes for nothing, same text same bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.models import Model, load
from snello.models.plain_folder import HEADS_APART
from snello.models.reference import Reference, build_block, build_embedding
from snello.models.spec import Attention, Deployment
from snello.techniques.base import Context
from snello.techniques.prune import Prune
from snello.techniques.prune.select import compensated, heads, top
from snello.techniques.prune.shapes import fewer, fewer_heads, step
from snello.techniques.quantize import Quantize
from tests.checkpoints import DENSE, VARIANTS, make_checkpoint

TOKENS = torch.from_numpy(np.random.default_rng(1).integers(1, 307, (1, 70)))
ALL: dict[str, Any] = {"ffn": 0.3, "heads": 0.5, "width": 0.25, "layers": 0.34}
TIED: dict[str, Any] = {"ffn": 0.3, "layers": 0.5}  # where a config ties heads to the hidden size
ALIKE = [variant for variant in sorted(DENSE) if not variant.startswith("gemma")]  # whose layers are equal


def windows(count: int = 4, length: int = 64) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, 307, length).astype(np.int32) for _ in range(count)]


def pruned(source: Model, path: Path, **options: Any) -> Model:
    return Prune(**options).apply(source, Context(output=path, windows=windows()))


@torch.inference_mode()
def logits(model: Model) -> torch.Tensor:
    rows: torch.Tensor = Reference.from_model(model)(TOKENS)
    return rows


@torch.inference_mode()
def stock(model: Model, variant: str) -> torch.Tensor:
    """What Transformers says about the folder; it must find every tensor, and each in its shape."""
    kind = getattr(transformers, VARIANTS[variant][0])
    theirs, report = kind.from_pretrained(model.path, output_loading_info=True, dtype=torch.float32)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[fault], report
    rows: torch.Tensor = theirs.eval()(TOKENS).logits
    return rows


@pytest.mark.parametrize("variant", ALIKE)
def test_everybody_reads_the_same_model(variant: str, tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", variant))
    options = ALL if source.spec.family in HEADS_APART else TIED
    result = pruned(source, tmp_path / "result", **options)
    assert result.spec == Prune(**options).plan(source.spec)
    assert result.num_parameters < source.num_parameters
    ours = logits(result)
    torch.testing.assert_close(stock(result, variant), ours, atol=2e-5, rtol=1e-5)
    assert (logits(source) - ours).abs().max() > 1e-3  # something was lost, so the comparison above says something
    if source.spec.head.kind == "lm":
        with NativeExecutor(result, Deployment(threads=1)) as executor:
            rows = executor.logits(TOKENS[0].numpy().astype(np.int32))
        np.testing.assert_allclose(rows, ours[0].numpy(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"ffn": 0.3}, {"ffn": 0, "heads": 0.5}, {"ffn": 0, "layers": 0.34}], ids=str)
def test_bf16_stays_bf16(options: dict[str, Any], tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "qwen3", dtype=torch.bfloat16))
    result = pruned(source, tmp_path / "result", **options)
    assert result.spec == Prune(**options).plan(source.spec) and result.spec.default_format.weights == "bf16"


def edited(path: Path, variant: str, change: Any) -> Model:
    """A checkpoint in which `change` has been done to the parameters by their stored names."""
    from safetensors.torch import load_file, save_file

    make_checkpoint(path, variant)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return load(path)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_useless_channels_go_for_nothing(variant: str, compensate: bool, tmp_path: Path) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                tensor[torch.arange(0, 200, 4)] = 0

    source = edited(tmp_path / "source", variant, silence)
    result = pruned(source, tmp_path / "result", ffn=0.25, compensate=compensate)
    assert result.spec.layers[0].feed_forward.width == 152
    torch.testing.assert_close(logits(result), logits(source), atol=1e-4, rtol=1e-4)


def test_useless_queries_of_a_group_go_for_nothing(tmp_path: Path) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("o_proj.weight"):
                tensor[:, 80:240] = 0  # the second and third of the four that share one key-value head

    source = edited(tmp_path / "source", "llama", silence)
    before = source.spec.layers[0].mixer
    assert isinstance(before, Attention)
    result = pruned(source, tmp_path / "result", ffn=0, heads=0.5)
    assert result.spec.layers[0].mixer == dataclasses.replace(before, num_heads=2, num_kv_heads=1)
    torch.testing.assert_close(logits(result), logits(source), atol=1e-4, rtol=1e-4)


def test_heads_leave_evenly_by_group() -> None:
    kept, groups = heads(torch.tensor([3.0, 0, 0, 2]), 2, 2, 1)
    assert kept.tolist() == [0, 3] and groups.tolist() == [0, 1]
    kept, groups = heads(torch.tensor([3.0, 0, 0, 4]), 2, 1, 2)
    assert kept.tolist() == [2, 3] and groups.tolist() == [1]


def test_useless_group_goes_for_nothing(tmp_path: Path) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("o_proj.weight"):
                tensor[:, :160] = 0

    source = edited(tmp_path / "source", "qwen3", silence)
    result = pruned(source, tmp_path / "result", ffn=0, heads=0.5)
    torch.testing.assert_close(logits(result), logits(source), atol=1e-4, rtol=1e-4)


def test_useless_dimensions_go_for_nothing(tmp_path: Path) -> None:
    """With tied embeddings too: dimensions that nobody writes, embedding included."""
    silent = torch.arange(1, 96, 4)

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                tensor[silent] = 0
            if name.endswith("embed_tokens.weight"):
                tensor[:, silent] = 0

    source = edited(tmp_path / "source", "llama-tied-bias", silence)
    result = pruned(source, tmp_path / "result", ffn=0, width=0.25)
    assert result.spec.hidden_size == 80
    assert result.spec.head.tied and result.weights.shape("embedding.tokens.weight") == (307, result.spec.hidden_size)
    torch.testing.assert_close(logits(result), logits(source), atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_layers_of_least_influence_leave(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    texts = windows()
    naive = np.zeros(3)
    for text in texts:
        x = build_embedding(source.spec, source.weights)(torch.from_numpy(text.astype(np.int64))[None])
        for index in range(3):
            y = build_block(source.spec, index, source.weights)(x)
            cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            naive[index] += float(1 - cosine.mean()) / len(texts)
            x = y
    result = pruned(source, tmp_path / "result", ffn=0, layers=0.34)
    entry = result.history[-1]
    np.testing.assert_allclose(entry["influence"], naive, rtol=2e-3)
    kept = sorted(int(index) for index in np.argsort(-naive)[:2])
    assert entry["layers_kept"] == kept
    for new, old in enumerate(kept):
        same = [f"layers.{i}.ffn.down.weight" for i in (new, old)]
        np.testing.assert_array_equal(result.weights.values(same[0]), source.weights.values(same[1]))


def test_compensation_is_ridge_regression_towards_the_kept_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64, generator=generator)
    x[:, 5] = x[:, 0] - 2 * x[:, 1]  # what leaves can be told from what stays
    weight, kept = torch.randn(4, 6, generator=generator), torch.arange(5)
    plain = x @ weight.double().T - x[:, kept] @ weight[:, kept].double().T
    better = x @ weight.double().T - x[:, kept] @ compensated(weight, x.T @ x / 500, kept).double().T
    assert better.norm() < 0.05 * plain.norm()


def test_same_seed_same_bytes_and_another_digest(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "qwen3"))
    one, other = (pruned(source, tmp_path / name, **ALL) for name in ("one", "other"))
    assert one.digest == other.digest and one.digest != source.digest and one.spec.digest != source.spec.digest
    again = pruned(source, tmp_path / "one", **ALL)  # a folder of ours may be replaced
    assert again.digest == one.digest


def test_prune_then_quantize_then_not_prune(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    small = pruned(source, tmp_path / "small", **ALL)
    lean = Quantize(weights="int8").apply(small, Context(output=tmp_path / "lean"))
    assert [entry["technique"] for entry in lean.history] == ["prune", "quantize"]
    assert lean.history[0]["options"]["width"] == 0.25
    expected, found = logits(small), logits(lean)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    with pytest.raises(Unsupported, match="mixes number formats") as caught:
        Prune().plan(lean.spec)
    assert "first" in str(caught.value.hint)


@pytest.mark.parametrize(
    "options",
    [{"ffn": -0.1}, {"ffn": 0.95}, {"heads": "half"}, {"layers": True}, {"ffn": 0}, {"compensate": 1}],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SnelloError) as caught:
        Prune(**options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("llama", {"ffn": 0.01}, "too little to remove anything of 200"),
        ("qwen2", {"heads": 0.2}, "too little to remove anything of 4"),
        ("llama", {"heads": 0.5, "width": 0.5, "ffn": 0.5, "layers": 0.2}, "too little to remove anything of 3"),
        ("llama", {"heads": 0.25, "width": 0.3}, "cannot say hidden size 80 with 3 attention heads"),
        ("llama", {"layers": 0.2}, "too little to remove anything of 3"),
        ("bert-mlm", {"heads": 0.5}, "ties hidden size"),
        ("distilbert-mlm", {"width": 0.5}, "ties hidden size"),
    ],
)
def test_what_cannot_be_is_refused_by_the_plan(
    variant: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    spec = load(make_checkpoint(tmp_path / "source", variant)).spec
    with pytest.raises(Unsupported, match=message) as caught:
        Prune(**options).plan(spec)
    assert caught.value.hint


def test_the_hint_of_too_little_works(tmp_path: Path) -> None:
    spec = load(make_checkpoint(tmp_path / "source", "qwen2")).spec
    for option in ("ffn", "heads", "width", "layers"):
        little: dict[str, Any] = {"ffn": 0, option: 0.01}
        with pytest.raises(Unsupported) as caught:
            Prune(**little).plan(spec)
        key, _, value = str(caught.value.hint).partition(" ")[0].partition("=")
        enough: dict[str, Any] = {"ffn": 0, key: float(value)}
        Prune(**enough).plan(spec)


def test_heads_that_divide_the_hidden_size_are_named(tmp_path: Path) -> None:
    spec = load(make_checkpoint(tmp_path / "source", "llama")).spec
    with pytest.raises(Unsupported, match="hidden size 80 with 3 attention heads") as caught:
        Prune(heads=0.25, width=0.3).plan(spec)
    assert "1, 2, 4 heads do" in str(caught.value.hint)


def test_text_is_needed_and_must_fit(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    long, alien = np.ones(600, np.int32), np.full(20, 307, np.int32)
    for texts, message in (([], "none was given"), ([long], "600 tokens"), ([alien], "token 307")):
        with pytest.raises(SnelloError, match=message):
            Prune().apply(source, Context(output=tmp_path / "result", windows=texts))
    assert not (tmp_path / "result").exists()


def test_a_foreign_folder_is_not_replaced(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    with pytest.raises(SnelloError, match="not empty"):
        pruned(source, tmp_path / "source")


def test_differing_layers_are_refused(tmp_path: Path) -> None:
    spec = load(make_checkpoint(tmp_path / "source", "llama")).spec
    first = spec.layers[0]
    assert isinstance(first.mixer, Attention)
    windowed = dataclasses.replace(first, mixer=dataclasses.replace(first.mixer, window=8))
    with pytest.raises(Unsupported, match="layers of this model differ"):
        Prune().plan(dataclasses.replace(spec, layers=(first, windowed)))


def test_counts_that_run_well() -> None:
    assert [step(count) for count in (1024, 896, 384, 200, 96, 7)] == [64, 64, 64, 8, 16, 1]
    assert [fewer("ffn", count, 0.25) for count in (1024, 896, 200)] == [768, 704, 152]
    assert fewer("ffn", 10240, 0.3) == 7168  # not one step more for the rounding of 1 - 0.3
    assert fewer_heads(2, 3, 0.34) == (2, 2) and fewer_heads(2, 3, 0.5) == (1, 3) and fewer_heads(6, 1, 0.34) == (4, 1)
    assert top(torch.tensor([1.0, 3, 3, 1]), 3).tolist() == [0, 1, 2]


def sentence_folder(path: Path, encoder: str = "") -> Path:
    make_checkpoint(path / encoder, "bert-mlm")
    modules = [(encoder, "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"idx": i, "path": p, "type": f"sentence_transformers.models.{t}"} for i, (p, t) in enumerate(modules)]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (path / encoder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 100}))
    return path


def test_an_embedding_model_keeps_its_pooling(tmp_path: Path) -> None:
    source = load(sentence_folder(tmp_path / "source"))
    result = pruned(source, tmp_path / "pruned", ffn=0.3, layers=0.5)
    head = result.spec.head
    assert (head.kind, head.pooling, head.normalize, result.spec.max_positions) == ("embed", "cls", True, 100)
    assert len(result.spec.layers) < len(source.spec.layers) and load(tmp_path / "pruned").spec == result.spec
    again = pruned(result, tmp_path / "again", ffn=0.3)  # a pruned one is an ordinary folder too
    with NativeExecutor(result, Deployment()) as one, NativeExecutor(again, Deployment()) as other:
        vectors = [executor.encode(TOKENS[0].numpy()) for executor in (one, other)]
    assert float(np.dot(*vectors)) > 0.9


def test_an_encoder_in_a_folder_of_its_own_is_refused(tmp_path: Path) -> None:
    source = load(sentence_folder(tmp_path / "source", encoder="0_Transformer"))
    with pytest.raises(Unsupported, match="cannot say"):
        pruned(source, tmp_path / "pruned", ffn=0.3)
