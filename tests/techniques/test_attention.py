"""Attention that costs less: everybody reads the same model, wide windows change nothing, nonsense is refused."""

from __future__ import annotations

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
from snello.models.reference import Reference
from snello.models.spec import Attention, Deployment
from snello.native import core
from snello.techniques.attention import CheaperAttention
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.units import layer_numbers
from tests.checkpoints import make_checkpoint

TOKENS = torch.from_numpy(np.random.default_rng(1).integers(1, 307, (1, 90)))
STOCK: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"window": 30}, "MistralForCausalLM"),
    ("mistral-window", {"window": 20}, "MistralForCausalLM"),
    ("qwen2", {"window": 30, "kv_heads": 1}, "Qwen2ForCausalLM"),
    ("qwen3", {"window": 30, "layers": "0,2"}, "Qwen3ForCausalLM"),
    ("phi3", {"window": 20, "kv_heads": 1}, "Phi3ForCausalLM"),
    ("gemma2", {"window": 20}, "Gemma2ForCausalLM"),
    ("gemma3", {"kv_heads": 1}, "Gemma3ForCausalLM"),
    ("bert-mlm", {"window": 20}, "LongformerForMaskedLM"),
    ("bert-classify", {"window": 20, "positions": 300}, "LongformerForSequenceClassification"),
]
OURS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"window": 30, "sinks": 3}),
    ("llama", {"window": 30, "layers": "1"}),
    ("llama-tied-bias", {"window": 20}),
    ("gemma3", {"window": 20}),
    ("gpt2", {"window": 20, "sinks": 2}),
]


def converted(source: Model, path: Path, **options: Any) -> Model:
    return CheaperAttention(**options).apply(source, Context(output=path))


@torch.inference_mode()
def answers(model: Model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    rows: torch.Tensor = Reference.from_model(model)(tokens)
    return rows


def native(model: Model, tokens: torch.Tensor = TOKENS, **deployment: Any) -> np.ndarray:
    with NativeExecutor(model, Deployment(threads=1, **deployment)) as executor:
        ids = tokens[0].numpy().astype(np.int32)
        return executor.logits(ids) if model.spec.causal else executor.encode(ids)


@torch.inference_mode()
def stock(folder: Path, architecture: str) -> torch.Tensor:
    kind = getattr(transformers, architecture)
    theirs, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    everywhere = {"global_attention_mask": (torch.arange(TOKENS.shape[1]) == 0).long()[None]}
    extra = everywhere if architecture.startswith("Longformer") else {}
    rows: torch.Tensor = theirs.eval()(TOKENS, **extra).logits
    return rows


@pytest.mark.parametrize(("variant", "options", "architecture"), STOCK, ids=str)
def test_transformers_reads_the_same_model(
    variant: str, options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    source = load(make_checkpoint(tmp_path / "source", variant))
    result = converted(source, tmp_path / "result", **options)
    assert result.spec == CheaperAttention(**options).plan(source.spec)
    assert json.loads((tmp_path / "result" / "config.json").read_text())["architectures"] == [architecture]
    ours = answers(result)
    torch.testing.assert_close(stock(result.path, architecture), ours, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(native(result), ours[0].numpy(), atol=2e-4, rtol=1e-4)
    assert (answers(source) - ours).abs().max() > 1e-3  # something changed, so the comparisons above say something


@pytest.mark.parametrize(("variant", "options"), OURS, ids=str)
def test_what_no_config_can_say_is_a_lean_folder(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", variant))
    result = converted(source, tmp_path / "result", **options)
    assert (result.path / "snello.json").exists() and "cannot say" in result.history[-1]["note"]
    assert result.spec == CheaperAttention(**options).plan(source.spec)
    ours = answers(result)
    np.testing.assert_allclose(native(result), ours[0].numpy(), atol=2e-4, rtol=1e-4)
    assert (answers(source) - ours).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("variant", "options"), [("llama", {"window": 90}), ("qwen3", {"window": 80, "sinks": 10}), ("bert-mlm", {})]
)
def test_a_window_that_covers_the_text_changes_nothing(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", variant))
    result = converted(source, tmp_path / "result", **(options or {"window": 180, "positions": 512}))
    torch.testing.assert_close(answers(result), answers(source), atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(native(result), native(source), atol=1e-4, rtol=1e-4)


def test_rows_in_blocks_see_what_a_mask_says(tmp_path: Path) -> None:
    """Longer than a block of rows, against the plain T x T formula, padding included."""
    from snello.models.reference_layers import NEAR_ROWS, attend, visible, weigh

    rows = 2 * NEAR_ROWS + 77
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, rows, 16).unbind()
    mask = (torch.arange(rows) < torch.tensor([[rows], [rows - 40]])).long()
    for causal in (True, False):
        mixer = Attention(num_heads=4, num_kv_heads=4, head_dim=16, causal=causal, window=70, sinks=5)
        plain = weigh(mixer, q, k, v, visible(mixer, rows, mask, q.device))
        near = attend(mixer, q, k, v, mask)
        assert not near.isnan().any()
        torch.testing.assert_close(near[0], plain[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(near[1, :, : rows - 40], plain[1, :, : rows - 40], atol=1e-5, rtol=1e-4)


def test_a_long_text_gives_the_same_bytes_on_every_instruction_set(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "bert-mlm"))
    result = converted(source, tmp_path / "result", window=64, positions=1000)
    lean = Quantize(weights="int8", cache="int8").apply(result, Context(output=tmp_path / "lean"))
    tokens = torch.from_numpy(np.random.default_rng(2).integers(1, 307, (1, 700)))
    np.testing.assert_allclose(native(result, tokens), answers(result, tokens)[0].numpy(), atol=2e-4, rtol=1e-4)
    sets = [name for name in core.available_isas() if name != "scalar"]
    rows = [native(lean, tokens[:, :300], isa=name) for name in ("scalar", *sets)]
    assert all(row.tobytes() == rows[0].tobytes() for row in rows)


def test_the_global_row_has_projections_of_its_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = load(make_checkpoint(tmp_path / "source", "bert-mlm"))
    result = converted(source, tmp_path / "result", window=180, positions=512)
    before = answers(result)
    path = tmp_path / "result" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "layer.1" in name and "query_global" in name:  # of the last layer: other rows do not read its first row
            tensor.mul_(-2)
    save_file(tensors, path, metadata={"format": "pt"})
    changed = load(tmp_path / "result")
    ours = answers(changed)
    assert (ours[:, 0] - before[:, 0]).abs().max() > 1e-3
    torch.testing.assert_close(ours[:, 1:], before[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stock(changed.path, "LongformerForMaskedLM"), ours, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(native(changed), ours[0].numpy(), atol=2e-4, rtol=1e-4)


def test_heads_that_are_alike_pool_for_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_checkpoint(tmp_path / "source", "qwen2")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            half = len(tensor) // 2
            tensor[half:] = tensor[:half]
    save_file(tensors, path, metadata={"format": "pt"})
    source = load(tmp_path / "source")
    for pooling in ("mean", "first"):
        result = converted(source, tmp_path / pooling, kv_heads=1, pooling=pooling)
        torch.testing.assert_close(answers(result), answers(source), atol=1e-4, rtol=1e-4)


def test_ways_of_pooling(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "qwen2"))
    old = source.weights.values("layers.1.attention.k.weight").reshape(2, 24, 96)
    made = {way: converted(source, tmp_path / way, kv_heads=1, pooling=way) for way in ("mean", "first", "random")}
    new = {way: model.weights.values("layers.1.attention.k.weight") for way, model in made.items()}
    np.testing.assert_allclose(new["mean"], old.mean(0), atol=1e-6)
    np.testing.assert_array_equal(new["first"], old[0])
    assert abs(np.corrcoef(new["random"].ravel(), old[0].ravel())[0, 1]) < 0.1
    again = converted(source, tmp_path / "again", kv_heads=1, pooling="random")
    assert again.digest == made["random"].digest != made["mean"].digest
    assert made["mean"].num_parameters < source.num_parameters


def test_quantized_afterwards_and_never_before(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    near = converted(source, tmp_path / "near", window=40, sinks=4)
    lean = Quantize(weights="int8").apply(near, Context(output=tmp_path / "lean"))
    assert [entry["technique"] for entry in lean.history] == ["attention", "quantize"]
    mixer = lean.spec.layers[0].mixer
    assert isinstance(mixer, Attention) and (mixer.window, mixer.sinks) == (40, 4)
    assert (answers(lean) - answers(near)).abs().mean() < 0.05 * answers(near).abs().mean()
    with pytest.raises(Unsupported, match="mixes number formats"):
        CheaperAttention(window=20).plan(lean.spec)


def test_longer_texts_are_told_to_the_tokenizer(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "bert-classify"))
    converted(source, tmp_path / "result", window=64, positions=1000)
    assert json.loads((tmp_path / "result" / "tokenizer_config.json").read_text())["model_max_length"] == 1000


def test_layers_by_number() -> None:
    assert layer_numbers("all") is None
    assert layer_numbers("0, 2,5-7") == {0, 2, 5, 6, 7}
    for odd in ("", "every", "1-", "-1", "3-1", "1,,2", "²", "1-99999999999"):
        with pytest.raises(SnelloError) as caught:
            layer_numbers(odd)
        assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"window": -1},
        {"window": 1.5},
        {"window": True},
        {"kv_heads": "2"},
        {"pooling": "sum"},
        {"sinks": 4},
        {"positions": 4096},
        {"layers": "0"},
        {"window": 8, "layers": 3},
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(SnelloError) as caught:
        CheaperAttention(**options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("llama", {}, "change nothing"),
        ("llama", {"window": 512}, "no less than this model's 512"),
        ("llama", {"window": 510, "sinks": 2}, "no less than"),
        ("llama", {"window": 8, "layers": "3"}, "no layer 3"),
        ("llama", {"window": 8, "positions": 1024}, "encoders only"),
        ("llama", {"kv_heads": 1}, "do not merge"),
        ("qwen3", {"kv_heads": 3}, "do not merge"),
        ("mistral-window", {"window": 33}, "already"),
        ("bert-mlm", {"window": 20, "sinks": 1}, "for decoders"),
        ("bert-mlm", {"window": 21}, "window of 21"),
        ("bert-mlm", {"window": 2}, "window of 2"),
        ("bert-mlm", {"window": 128}, "window of 128"),
        ("bert-mlm", {"window": 64, "positions": 100}, "fewer than"),
        ("distilbert-mlm", {"window": 64}, "cannot be made"),
    ],
    ids=str,
)
def test_nonsense_is_refused_before_time_is_spent(
    variant: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    spec = load(make_checkpoint(tmp_path / "source", variant)).spec
    with pytest.raises(Unsupported, match=message) as caught:
        CheaperAttention(**options).plan(spec)
    assert caught.value.hint


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    source = load(make_checkpoint(tmp_path / "source", "llama"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for options in ({"window": 30}, {"window": 30, "sinks": 2}):
        with pytest.raises(SnelloError, match="not empty"):
            converted(source, tmp_path / "mine", **options)
