"""Longformer against Transformers: random configurations, the first token global."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError
from snello.models import load
from snello.models.families.resolve import spec_from_config
from snello.models.reference import Reference
from snello.models.spec import Attention, Deployment

CONFIG: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 402,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LongformerForMaskedLM", {"attention_window": [8, 32, 64]}),
    ("LongformerForMaskedLM", {"attention_window": 600, "type_vocab_size": 1, "pad_token_id": 0}),
    ("LongformerForSequenceClassification", {"attention_window": 16, "num_labels": 3}),
    ("LongformerModel", {"attention_window": [4, 8, 16], "hidden_act": "relu"}),
]


def checkpoint(path: Path, architecture: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.LongformerConfig(**CONFIG | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.2 * parameter.shape[-1] ** -0.5
            parameter.normal_(0, scale) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize(("architecture", "options"), CASES, ids=str)
@torch.inference_mode()
def test_equal_to_transformers(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path, architecture, options)
    model = load(tmp_path)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(3, 307, (1, 333)))
    everywhere = (torch.arange(333) == 0).long()[None]
    expected = theirs(tokens, global_attention_mask=everywhere)[0]
    ours = Reference.from_model(model)(tokens)
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=1e-5)
    pooled = architecture == "LongformerModel"
    with NativeExecutor(model, Deployment(threads=2)) as executor:
        rows = executor.encode(tokens[0].numpy())
    wanted = ours[0].mean(0) if pooled else ours[0]
    np.testing.assert_allclose(rows, wanted.numpy(), atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def test_padding_changes_no_real_row(tmp_path: Path) -> None:
    checkpoint(tmp_path, "LongformerForMaskedLM", {"attention_window": 16})
    reference = Reference.from_model(load(tmp_path))
    tokens = torch.from_numpy(np.random.default_rng(1).integers(3, 307, (1, 300)))
    padded = torch.cat((tokens, torch.ones(1, 90, dtype=torch.long)), dim=1)
    mask = (torch.arange(390) < 300).long()[None]
    torch.testing.assert_close(
        reference(padded, mask=mask)[:, :300], reference(tokens), atol=2e-5, rtol=1e-5
    )  # fmt: skip


def test_configs() -> None:
    config = {**CONFIG, "architectures": ["LongformerForMaskedLM"], "hidden_act": "gelu", "pad_token_id": 1}
    spec = spec_from_config(config)
    mixers = [layer.mixer for layer in spec.layers]
    assert all(isinstance(mixer, Attention) and mixer.window == 257 and mixer.global_rows == 1 for mixer in mixers)
    assert (spec.max_positions, spec.embedding.learned_positions) == (400, 402)
    for odd in (7, 0, [8, 8], "512", [8, 8, 9], [True, 8, 8]):
        with pytest.raises(SnelloError, match="attention_window"):
            spec_from_config(config | {"attention_window": odd})
    with pytest.raises(SnelloError, match="pad_token_id"):
        spec_from_config({key: value for key, value in config.items() if key != "pad_token_id"})
