"""Short convolutions: the reference beside Transformers' own, the executor beside the reference, folders both ways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from snello.engine.native import NativeExecutor
from snello.engine.pages import STATE_ROWS, Retention, retention_of
from snello.errors import SnelloError, Unsupported
from snello.interop.huggingface import hf_config
from snello.models import load
from snello.models.model import Model
from snello.models.parameters import parameter_shapes
from snello.models.plain_folder import write_plain_folder
from snello.models.reference import Reference
from snello.models.reference_layers import ConvolutionHalf
from snello.models.spec import Deployment, Format, ShortConvolution
from tests.checkpoints import VARIANTS, make_checkpoint
from tests.twins import DictWeights, arrays_of


def convolving(
    folder: Path, *, kernel: int = 3, bias: bool = True, layers: tuple[int, ...] = (0, 2), variant: str = "qwen3"
) -> Model:
    """A random model some of whose layers convolve, in memory, FP32."""
    original = load(folder if folder.exists() else make_checkpoint(folder, variant))
    mixer = ShortConvolution(kernel=kernel, bias=bias)
    changed = tuple(
        dataclasses.replace(layer, mixer=mixer) if index in layers else layer
        for index, layer in enumerate(original.spec.layers)
    )
    fp32 = Format(weights="fp32")
    spec = dataclasses.replace(original.spec, layers=changed, default_format=fp32, cache_format="fp32", formats=())
    random, known, arrays = np.random.default_rng(kernel), arrays_of(original), {}
    for name, shape in parameter_shapes(spec).items():
        fresh = (0.2 * random.standard_normal(shape)).astype(np.float32)
        arrays[name] = known[name] if name in known and known[name].shape == shape else fresh
    return Model(spec=spec, weights=DictWeights(arrays), path=original.path, name="convolving")


@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_is_lfm2s_convolution(tmp_path: Path, bias: bool) -> None:
    from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    model = convolving(tmp_path / "model", bias=bias)
    ours = Reference.from_model(model).layers[0].attention
    assert isinstance(ours, ConvolutionHalf)
    theirs = Lfm2ShortConv(Lfm2Config(hidden_size=96, conv_L_cache=3, conv_bias=bias, num_hidden_layers=1), 0)
    state = {
        "in_proj.weight": torch.cat((ours.b.weight, ours.c.weight, ours.x.weight)),
        "conv.weight": ours.taps.weight.T[:, None],
        "out_proj.weight": ours.o.weight,
    }
    if bias:
        state["in_proj.bias"] = torch.cat((ours.b.bias, ours.c.bias, ours.x.bias))
        assert ours.taps.bias is not None
        state |= {"conv.bias": ours.taps.bias, "out_proj.bias": ours.o.bias}
    theirs.load_state_dict(state)
    y = torch.randn(2, 11, 96)
    with torch.inference_mode():
        assert torch.allclose(ours.project(ours.inner(y, None)), theirs(y), atol=1e-5)


SETTINGS: dict[str, dict[str, Any]] = {
    "biases, a wider kernel": {"conv_bias": True, "conv_L_cache": 5, "tie_word_embeddings": False},
    "indices": {"layer_types": None, "full_attn_idxs": [0, 2]},
    "all attend": {"layer_types": None},
    "a width as it is": {"block_auto_adjust_ff_dim": False},
    "a width by a factor": {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 16},
    "rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "head_dim": 16},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_lfm2(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    architecture, options = VARIANTS["lfm2"]
    monkeypatch.setitem(VARIANTS, "lfm2 too", (architecture, options | SETTINGS[setting]))
    model = load(make_checkpoint(tmp_path / "model", "lfm2 too"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 307, (2, 40)))
    with torch.inference_mode():
        assert torch.allclose(Reference.from_model(model)(ids), stock(ids).logits, atol=1e-4)


@pytest.mark.parametrize("kernel", [1, 2, 3, 8])
def test_the_executor_agrees_in_all_chunks(tmp_path: Path, kernel: int) -> None:
    model = convolving(tmp_path / "model", kernel=kernel, bias=kernel != 2)
    ids = np.random.default_rng(0).integers(1, 307, 300)
    with torch.inference_mode():
        wanted = Reference.from_model(model)(torch.from_numpy(ids)[None])[0].numpy()
    found = set()
    for rows in (1, 2, 15, 17, 128, 300):
        with NativeExecutor(model, Deployment(threads=2, chunk_rows=rows)) as executor:
            logits = executor.logits(ids)
        assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()
        found.add(logits.tobytes())
    assert len(found) == 1


def test_padding_at_the_end_is_not_seen(tmp_path: Path) -> None:
    reference = Reference.from_model(convolving(tmp_path / "model"))
    ids = torch.randint(1, 307, (1, 20))
    with torch.inference_mode():
        alone = reference(ids)
        padded = reference(torch.cat((ids, ids), dim=1))
    assert torch.allclose(alone, padded[:, :20], atol=1e-5)


def test_the_cache_really_shrinks(tmp_path: Path) -> None:
    all_of_it = convolving(tmp_path / "model", layers=())
    with NativeExecutor(all_of_it) as executor:
        full = executor.page_bytes
    with NativeExecutor(convolving(tmp_path / "model")) as executor:
        assert executor.page_bytes == full // 3 + 2 * STATE_ROWS * 96 * 4 < full
        assert executor.retention == Retention(takes_back=STATE_ROWS - 2)


def test_a_window_no_longer_hides_what_a_convolution_reads(tmp_path: Path) -> None:
    spec = convolving(tmp_path / "model", kernel=8).spec
    mixer = dataclasses.replace(spec.layers[1].mixer, window=3, sinks=2)  # type: ignore[call-arg]
    layers = (spec.layers[0], dataclasses.replace(spec.layers[1], mixer=mixer), spec.layers[2])
    near = dataclasses.replace(spec, layers=layers)
    assert retention_of(near) == Retention(window=8, sinks=2, takes_back=STATE_ROWS - 7)


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = convolving(tmp_path / "model")
    write_plain_folder(tmp_path / "plain", model.spec, model, (), model.weights.values)
    return tmp_path / "plain"


def test_a_plain_folder_says_it_and_is_read_again(folder: Path) -> None:
    model = convolving(folder.parent / "model")
    again = load(folder)
    assert again.spec == model.spec
    for name in model.weights.names():
        assert np.array_equal(again.weights.values(name), model.weights.values(name)), name
    write_plain_folder(folder.parent / "copy", again.spec, again, (), again.weights.values)
    assert load(folder.parent / "copy").spec == model.spec


def test_transformers_refuses_it_and_so_does_export(folder: Path) -> None:
    import transformers

    with pytest.raises(ValueError, match="snello_convolutions"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(Unsupported, match="convolves"):
        hf_config(load(folder), "fp32")


@pytest.mark.parametrize("change", [{"layer_types": ["conv"]}, {"layer_types": ["mamba"] * 3}])
def test_layers_that_lfm2_does_not_have_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "lfm2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SnelloError, match="expected full_attention or conv"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"layers": [7]},
        {"layers": [-1]},
        {"layers": "0"},
        {"kernel": 0},
        {"kernel": 99},
        {"kernel": 4},  # the taps are 3
        {"bias": 1},
        {"of": []},
        {"more": 1},
        {"layers": [0]},  # the weights of layer 2 are not attention
    ],
)
def test_a_damaged_statement_is_one_clear_error(folder: Path, change: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["snello_convolutions"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SnelloError) as caught:
        load(folder)
    assert caught.value.hint and "\n" not in caught.value.message


def test_kernels_that_no_page_can_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="kernel of 9"):
        Reference(convolving(tmp_path / "model", kernel=9).spec)
