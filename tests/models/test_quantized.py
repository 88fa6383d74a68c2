"""GPTQ, AWQ and compressed-tensors checkpoints: each read as its definition says, bit for bit, or refused by name."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.interop.huggingface import export
from snello.models import Model, load
from snello.models.families import FAMILIES
from snello.models.families.family import names_for
from snello.models.reference import Reference
from snello.models.spec import Deployment
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from snello.techniques.quantize.rounding import round_grouped
from tests.checkpoints import VARIANTS, make_checkpoint
from tests.models import foreign

SMALL = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4, "vocab_size": 307}
PHI3_SMALL = {key: value for key, value in SMALL.items() if key != "head_dim"}  # it is 64 / 4
VARIANTS = VARIANTS | {  # widths that every layout can pack, and groups of 128 fit once
    "tiny-llama": ("LlamaForCausalLM", VARIANTS["llama"][1] | SMALL | {"num_hidden_layers": 1}),
    "tiny-phi3": ("Phi3ForCausalLM", VARIANTS["phi3"][1] | PHI3_SMALL | {"num_hidden_layers": 1}),
}
CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.checkpoints.VARIANTS", VARIANTS)


def checkpoint(path: Path, variant: str = "tiny-llama") -> Path:
    return make_checkpoint(path, variant, dtype=torch.float16)


def assert_reads_as(model: Model, expected: dict[str, Any]) -> None:
    """Every parameter equals its definition, to the bit."""
    sources = names_for(FAMILIES[model.spec.family], model.spec, has_base=True).sources
    seen = set()
    for name in model.weights.names():
        source = sources[name]
        if source.names[0] in expected:
            whole = expected[source.names[0]].astype(np.float32)
            before = source.stacked[: source.stacked.index(name)] if source.stacked else ()
            first = sum(model.weights.shape(part)[0] for part in before)
            values = model.weights.values(name)
            np.testing.assert_array_equal(values, whole[first : first + len(values)], err_msg=name)
            seen.add(source.names[0])
    assert seen == expected.keys()


def gptq_settings(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, **more}


def ct_settings(format: str, bits: int, size: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "strategy": "channel"}
    weights |= {"strategy": "group", "group_size": size} if size > 0 else {"group_size": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {**CT, "format": format, "config_groups": {"group_0": group | more}}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 64, 128, -1])
@pytest.mark.parametrize(("symmetric", "shuffled", "version"), [(True, False, 1), (False, False, 1), (False, True, 2)])
def test_gptq(bits: int, size: int, symmetric: bool, shuffled: bool, version: int, tmp_path: Path) -> None:
    settings = gptq_settings(bits, size, sym=symmetric, desc_act=shuffled)
    settings |= {"checkpoint_format": "gptq_v2"} if version == 2 else {"damp_percent": 0.01, "static_groups": False}
    module = partial(foreign.gptq, bits=bits, size=size, symmetric=symmetric, shuffled=shuffled, version=version)
    expected = foreign.rewrite(checkpoint(tmp_path), settings, module)
    model = load(tmp_path)
    assert_reads_as(model, expected)
    assert f"GPTQ weights of {bits} bits" in model.note and "read as FP16" in model.note
    assert model.spec.default_format.weights == "fp16" and not model.spec.formats
    assert model.grid == (size if bits == 4 and symmetric and size > 0 else 0)


@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_zeros_are_looked_at_because_files_lie(version: int, tmp_path: Path) -> None:
    module = partial(foreign.gptq, bits=4, size=32, symmetric=True, shuffled=False, version=version)
    expected = foreign.rewrite(checkpoint(tmp_path), gptq_settings(4, 32, checkpoint_format="gptq"), module)
    assert_reads_as(load(tmp_path), expected)


def test_a_zero_that_wrapped_around_is_read_as_it_was_taken(tmp_path: Path) -> None:
    """GPTQModel takes one off whole words, with a borrow; so it is added to whole words."""
    module = partial(foreign.gptq, bits=4, size=32, symmetric=False, shuffled=False, version=2)
    expected = foreign.rewrite(checkpoint(tmp_path), gptq_settings(4, 32, sym=False), module)
    tensors = load_file(tmp_path / "model.safetensors")
    stem = "model.layers.0.mlp.down_proj"
    words = tensors[f"{stem}.qzeros"].numpy().view(np.uint32)
    words[0, 0] &= np.uint32(0xFFFFFFF0)  # the first zero is 0
    scales = tensors[f"{stem}.scales"].float().numpy()
    values = tensors[f"{stem}.qweight"].numpy().view(np.uint32)[:4, 0]  # 32 inputs of the first output
    column = [(int(word) >> (4 * j)) & 15 for word in values for j in range(8)]
    expected[f"{stem}.weight"][0, :32] = (np.array(column) * scales[0, 0]).astype(np.float16)
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):
            numbers = tensor.numpy().view(np.uint32)
            numbers -= np.uint32(0x11111111)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_reads_as(load(tmp_path), expected)


def test_settings_in_a_file_of_their_own_and_biases_of_zeros(tmp_path: Path) -> None:
    module = partial(foreign.gptq, bits=4, size=32, symmetric=True, shuffled=False, version=1)
    expected = foreign.rewrite(checkpoint(tmp_path), {}, module, bias=True)
    with pytest.raises(SnelloError, match="says nothing of how to read") as caught:
        load(tmp_path)
    assert caught.value.hint
    table = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "true_sequential": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(table))
    assert_reads_as(load(tmp_path), expected)


@pytest.mark.parametrize("size", [32, 128, -1])
def test_awq(size: int, tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    expected = foreign.rewrite(checkpoint(tmp_path), settings, partial(foreign.awq, size=size))
    assert_reads_as(load(tmp_path), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(bits: int, size: int, symmetric: bool, tmp_path: Path) -> None:
    module = partial(foreign.compressed, bits=bits, size=size, symmetric=symmetric)
    expected = foreign.rewrite(checkpoint(tmp_path), ct_settings("pack-quantized", bits, size, symmetric), module)
    assert_reads_as(load(tmp_path), expected)


def test_compressed_tensors_out_of_order(tmp_path: Path) -> None:
    module = partial(foreign.compressed, bits=4, size=32, symmetric=False, shuffled=True)
    expected = foreign.rewrite(checkpoint(tmp_path), ct_settings("pack-quantized", 4, 32, False), module)
    assert_reads_as(load(tmp_path), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bit_integers_as_they_are(symmetric: bool, tmp_path: Path) -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    settings = ct_settings("int-quantized", 8, -1, symmetric, input_activations=inputs)
    module = partial(foreign.compressed, bits=8, size=-1, symmetric=symmetric, packed=False)
    expected = foreign.rewrite(checkpoint(tmp_path), settings, module)
    model = load(tmp_path)
    assert_reads_as(model, expected)
    assert "inputs are a matter of the run" in model.note


def test_groups_of_modules_may_differ(tmp_path: Path) -> None:
    first, second = (ct_settings("pack-quantized", bits, 32, True)["config_groups"]["group_0"] for bits in (8, 4))
    first["targets"] = ["re:.*down_proj", "model.layers.0.self_attn.o_proj"]  # the two that are (64, 128)
    settings = {**CT, "format": "pack-quantized", "config_groups": {"group_0": second, "group_1": first}}

    def module(w: np.ndarray) -> foreign.Module:
        return foreign.compressed(w, bits=8 if w.shape == (64, 128) else 4, size=32, symmetric=True)

    expected = foreign.rewrite(checkpoint(tmp_path), settings, module)
    assert_reads_as(load(tmp_path), expected)


def test_a_symmetric_grid_is_found_again(tmp_path: Path) -> None:
    """Without another basis the nearest four-bit integers are the checkpoint's own; only scales are rounded."""
    module = partial(foreign.compressed, bits=4, size=32, symmetric=True)
    foreign.rewrite(checkpoint(tmp_path / "source"), ct_settings("pack-quantized", 4, 32, True), module)
    model = load(tmp_path / "source")
    assert model.grid == 32
    stored = load_file(tmp_path / "source/model.safetensors")
    packed = stored["model.layers.0.mlp.up_proj.weight_packed"].numpy().view(np.uint32)
    theirs = np.stack([(packed >> (4 * j)) & 15 for j in range(8)], -1).reshape(128, 64).astype(int) - 8
    w = torch.from_numpy(model.weights.values("layers.0.ffn.up.weight"))
    ours = round_grouped(w, 32)
    same = (ours.q.numpy() == theirs).mean()
    assert same > 0.97
    assert (ours.values() - w).norm() < 0.04 * w.norm()


def test_parts_of_a_fused_matrix(tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    expected = foreign.rewrite(checkpoint(tmp_path, "tiny-phi3"), settings, partial(foreign.awq, size=32))
    assert "model.layers.0.self_attn.qkv_proj.weight" in expected
    assert_reads_as(load(tmp_path), expected)


@torch.inference_mode()
def test_it_runs_exports_and_is_quantized_like_any_other(tmp_path: Path) -> None:
    module = partial(foreign.gptq, bits=4, size=32, symmetric=False, shuffled=True, version=2)
    settings = gptq_settings(4, 32, sym=False, desc_act=True, checkpoint_format="gptq_v2")
    foreign.rewrite(checkpoint(tmp_path / "source"), settings, module)
    model = load(tmp_path / "source")
    tokens = np.random.default_rng(0).integers(1, 307, 40).astype(np.int32)
    wanted = Reference.from_model(model)(torch.from_numpy(tokens.astype(np.int64))[None])[0].numpy()
    with NativeExecutor(model, Deployment(threads=1)) as executor:
        np.testing.assert_allclose(executor.logits(tokens), wanted, atol=1e-2, rtol=1e-3)  # keys and values are FP16
    exported = export(model, tmp_path / "plain", dtype="fp16")
    assert "all" in exported.proof and "quantization_config" not in (tmp_path / "plain/config.json").read_text()
    assert load(tmp_path / "plain").note == ""
    lean = Quantize(weights="int8").apply(model, Context(output=tmp_path / "lean"))
    assert lean.spec == Quantize(weights="int8").plan(model.spec)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (gptq_settings(3, 32), "bits 3"),
        (gptq_settings(4, 0), "group_size is 0"),
        (gptq_settings(4, 32, checkpoint_format="marlin"), "marlin"),
        (gptq_settings(4, 32, format="gptq_v2", checkpoint_format="gptq"), "differ"),
        (gptq_settings(4, 32, dynamic={r"+:.*down.*": {"bits": 8}}), "another way"),
        (gptq_settings(4, 32, weight_scale_semantics="inverse"), "weight_scale_semantics"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "backend": "llm-awq"}, "llm-awq"),
        ({"quant_method": "awq", "bits": 4}, "group_size is None"),
        (ct_settings("float-quantized", 8, -1, True), "float-quantized"),
        (ct_settings("pack-quantized", 3, 32, True), "num_bits 3"),
        (ct_settings("pack-quantized", 4, 32, True) | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (ct_settings("pack-quantized", 4, 32, True) | {"transform_config": {"a": 1}}, "transform_config"),
        (ct_settings("pack-quantized", 4, 32, True) | {"sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
        (ct_settings("pack-quantized", 4, 32, True) | {"config_groups": {}}, "config_groups is empty"),
        (ct_settings("int-quantized", 8, -1, True, input_activations={"dynamic": False}), "static"),
        ({"quant_method": []}, "quantized in a way that is not read here"),
        (ct_settings("pack-quantized", 4, 32, True) | {"config_groups": {"a": 1}}, "a is 1, expected a table"),
        (ct_settings("pack-quantized", 4, 32, True) | {"sparsity_config": [1]}, "sparsity_config is .1., expected"),
        (ct_settings("pack-quantized", 4, 32, True, weights="x"), 'weights is "x", expected a table'),
        (ct_settings("pack-quantized", 4, 32, True, weights={"num_bits": 4, "actorder": "x"}), "actorder"),
        (ct_settings("pack-quantized", 4, 32, True, targets=7), "targets are 7, expected a list"),
        (ct_settings("pack-quantized", 4, 32, True, input_activations=7), "input_activations is 7, expected a table"),
        (ct_settings("pack-quantized", 4, 32, True, colour=7), "colour = 7"),
    ],
)
def test_what_is_not_understood_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    module = partial(foreign.gptq, bits=4, size=32, symmetric=True, shuffled=False, version=1)
    foreign.rewrite(checkpoint(tmp_path), settings, module)
    with pytest.raises(SnelloError, match=message):
        load(tmp_path)


LAYOUTS: dict[str, tuple[dict[str, Any], Any]] = {
    "gptq": (
        gptq_settings(4, 32),
        partial(foreign.gptq, bits=4, size=32, symmetric=True, shuffled=False, version=1),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        partial(foreign.awq, size=32),
    ),
    "compressed": (
        ct_settings("pack-quantized", 4, 32, False),
        partial(foreign.compressed, bits=4, size=32, symmetric=False),
    ),
}
ORDERED = {
    "gptq": (gptq_settings(4, 32, desc_act=True), LAYOUTS["gptq"][1]),
    "compressed": (
        ct_settings("pack-quantized", 4, 32, False),
        partial(foreign.compressed, bits=4, size=32, symmetric=False, shuffled=True),
    ),
}
ORDERED["compressed"][0]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
PARTS = [("gptq", part) for part in ("qweight", "qzeros", "scales")] + [("awq", part) for part in ("qzeros", "scales")]
PARTS += [("compressed", part) for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")]


def damaged(folder: Path, layout: str, change: Any) -> None:
    settings, module = LAYOUTS[layout]
    foreign.rewrite(checkpoint(folder), settings, module)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("layout", "part"), PARTS)
def test_a_missing_part_is_named(layout: str, part: str, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.up_proj.{part}"
    damaged(tmp_path, layout, lambda tensors: tensors.pop(name))
    with pytest.raises(SnelloError, match=name) as caught:
        load(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(("layout", "part"), [pair for pair in PARTS if pair[1] != "weight_shape"])
def test_a_part_that_does_not_fit_is_named(layout: str, part: str, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.up_proj.{part}"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    damaged(tmp_path, layout, cut)
    with pytest.raises(SnelloError, match=r"model\.layers\.0\.mlp\.up_proj\..* shape"):
        load(tmp_path)


@pytest.mark.parametrize(("layout", "part"), [("gptq", "g_idx"), ("compressed", "weight_g_idx")])
def test_columns_out_of_order_must_say_their_groups(layout: str, part: str, tmp_path: Path) -> None:
    settings, module = ORDERED[layout]
    expected = foreign.rewrite(checkpoint(tmp_path), settings, module)
    assert_reads_as(load(tmp_path), expected)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(f"model.layers.0.mlp.up_proj.{part}")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SnelloError, match=f"up_proj.{part} is missing"):
        load(tmp_path)


def test_group_sizes_and_zeros_that_cannot_be_are_told(tmp_path: Path) -> None:
    settings, module = LAYOUTS["gptq"]
    foreign.rewrite(checkpoint(tmp_path), settings | {"group_size": 64}, module)
    with pytest.raises(SnelloError, match=r"up_proj\.scales has shape \[2, 128\], expected \[1, 128\]"):
        load(tmp_path)

    def other(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.qzeros"][0, 0] = 0x12345678

    damaged(tmp_path / "zeros", "gptq", other)
    with pytest.raises(SnelloError, match="neither of the constants"):
        load(tmp_path / "zeros")

    def far(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.g_idx"][5] = 2

    damaged(tmp_path / "far", "gptq", far)
    with pytest.raises(SnelloError, match="beyond the 2"):
        load(tmp_path / "far")


def test_biases_that_say_something_are_not_dropped(tmp_path: Path) -> None:
    settings, module = LAYOUTS["gptq"]
    foreign.rewrite(checkpoint(tmp_path), settings, module, bias=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SnelloError, match=r"unexpected model\.layers\.0\.mlp\.up_proj\.bias"):
        load(tmp_path)


def test_transposed_families_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt2", dtype=torch.float16)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc"
    stored, _ = LAYOUTS["gptq"][1](tensors.pop(f"{name}.weight").T.float().numpy())
    tensors |= {f"{name}.{key}": torch.from_numpy(np.ascontiguousarray(value)) for key, value in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": LAYOUTS["gptq"][0]}))
    with pytest.raises(Unsupported, match="quantized gpt2"):
        load(tmp_path)
