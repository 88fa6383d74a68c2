"""Checkpoints of every family bind exactly, and every way in which one may not fit is named."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from snello.errors import SnelloError, Unsupported
from snello.models import load
from snello.models.checkpoint import CheckpointWeights, bind
from snello.models.families import FAMILIES
from snello.models.families.convolutions import convolving_layers
from snello.models.families.family import Family
from snello.models.families.resolve import spec_from_config
from snello.models.model import StoredTensor
from snello.models.parameters import parameter_shapes
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.checkpoints import DECODER, ENCODER, MIXTURES, VARIANTS, make_checkpoint

Tensors = dict[str, torch.Tensor]


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrites the weights of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def configure(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_binds_every_parameter(variant: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", variant)
    model = load(folder)
    original = getattr(transformers, VARIANTS[variant][0]).from_pretrained(folder)
    assert model.num_parameters == original.num_parameters()
    held = [np.sort(model.weights.values(name).ravel()) for name in model.weights.names()]
    expected = [np.sort(p.detach().numpy().ravel()) for p in original.parameters()]
    family = FAMILIES[model.spec.family]
    if (
        family.fused or family.experts or convolving_layers(model.spec)
    ):  # the same numbers, each exactly once; else the same tensors
        held, expected = [np.sort(np.concatenate(held))], [np.sort(np.concatenate(expected))]
    assert sorted(values.tobytes() for values in held) == sorted(values.tobytes() for values in expected)
    assert {name: model.weights.shape(name) for name in model.weights.names()} == parameter_shapes(model.spec)


# One name of each kind, written out by hand, so that two that have the same shape cannot be swapped.
PLACES: dict[str, dict[str, str]] = {
    "qwen3": {
        "layers.1.attention.q.weight": "model.layers.1.self_attn.q_proj.weight",
        "layers.1.attention.k.weight": "model.layers.1.self_attn.k_proj.weight",
        "layers.1.attention.v.weight": "model.layers.1.self_attn.v_proj.weight",
        "layers.2.attention.q_norm.weight": "model.layers.2.self_attn.q_norm.weight",
        "layers.2.attention.k_norm.weight": "model.layers.2.self_attn.k_norm.weight",
        "layers.0.attention.norm.weight": "model.layers.0.input_layernorm.weight",
        "layers.0.ffn.norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "layers.0.ffn.gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "layers.0.ffn.up.weight": "model.layers.0.mlp.up_proj.weight",
    },
    "qwen2": {
        "layers.1.attention.k.bias": "model.layers.1.self_attn.k_proj.bias",
        "layers.1.attention.v.bias": "model.layers.1.self_attn.v_proj.bias",
        "head.weight": "lm_head.weight",
    },
    "mixtral": {
        "layers.1.ffn.router.weight": "model.layers.1.block_sparse_moe.gate.weight",
        "layers.1.ffn.experts.4.gate.weight": "model.layers.1.block_sparse_moe.experts.4.w1.weight",
        "layers.1.ffn.experts.4.up.weight": "model.layers.1.block_sparse_moe.experts.4.w3.weight",
        "layers.0.ffn.experts.1.down.weight": "model.layers.0.block_sparse_moe.experts.1.w2.weight",
    },
    "qwen3-moe": {
        "layers.0.ffn.router.weight": "model.layers.0.mlp.gate.weight",
        "layers.2.ffn.experts.6.gate.weight": "model.layers.2.mlp.experts.6.gate_proj.weight",
        "layers.2.ffn.experts.6.up.weight": "model.layers.2.mlp.experts.6.up_proj.weight",
        "layers.1.ffn.gate.weight": "model.layers.1.mlp.gate_proj.weight",
    },
    "opt": {
        "layers.1.attention.norm.bias": "model.decoder.layers.1.self_attn_layer_norm.bias",
        "layers.1.ffn.norm.bias": "model.decoder.layers.1.final_layer_norm.bias",
        "norm.bias": "model.decoder.final_layer_norm.bias",
        "layers.0.attention.k.weight": "model.decoder.layers.0.self_attn.k_proj.weight",
    },
    "gemma3": {
        "layers.1.attention.norm.weight": "model.layers.1.input_layernorm.weight",
        "layers.1.attention.post_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "layers.1.ffn.norm.weight": "model.layers.1.pre_feedforward_layernorm.weight",
        "layers.1.ffn.post_norm.weight": "model.layers.1.post_feedforward_layernorm.weight",
        "layers.1.attention.k_norm.weight": "model.layers.1.self_attn.k_norm.weight",
    },
    "bert-mlm": {
        "layers.1.attention.o.bias": "bert.encoder.layer.1.attention.output.dense.bias",
        "layers.1.attention.norm.bias": "bert.encoder.layer.1.attention.output.LayerNorm.bias",
        "layers.1.ffn.norm.bias": "bert.encoder.layer.1.output.LayerNorm.bias",
        "head.bias": "cls.predictions.bias",
        "head.transform.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    },
    "bert-classify": {"head.pooler.bias": "bert.pooler.dense.bias", "head.bias": "classifier.bias"},
    "distilbert-mlm": {
        "layers.1.attention.norm.weight": "distilbert.transformer.layer.1.sa_layer_norm.weight",
        "layers.1.ffn.norm.weight": "distilbert.transformer.layer.1.output_layer_norm.weight",
        "head.transform.bias": "vocab_transform.bias",
        "head.bias": "vocab_projector.bias",
    },
}


@pytest.mark.parametrize("variant", PLACES)
def test_names_go_where_they_belong(variant: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", variant)
    model, stored = load(folder), load_file(folder / "model.safetensors")
    for canonical, name in PLACES[variant].items():
        np.testing.assert_array_equal(model.weights.values(canonical), stored[name].numpy(), err_msg=canonical)


def test_gpt2_is_stored_the_other_way_round(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "gpt2", dtype=torch.bfloat16)
    model, stored = load(folder), load_file(folder / "model.safetensors")
    fused, bias = (stored[f"transformer.h.1.attn.c_attn.{suffix}"].float().numpy() for suffix in ("weight", "bias"))
    for index, part in enumerate("qkv"):
        columns = slice(96 * index, 96 * (index + 1))
        np.testing.assert_array_equal(model.weights.values(f"layers.1.attention.{part}.weight"), fused[:, columns].T)
        np.testing.assert_array_equal(model.weights.values(f"layers.1.attention.{part}.bias"), bias[columns])
    up = stored["transformer.h.0.mlp.c_fc.weight"].float().numpy()
    np.testing.assert_array_equal(model.weights.values("layers.0.ffn.up.weight"), up.T)
    assert model.spec.default_format.weights == "bf16"
    change(folder, lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(200, 96)}))
    with pytest.raises(SnelloError, match=r"c_fc.weight has shape \[200, 96\], expected \[96, 200\]"):
        load(folder)


def test_one_part_of_a_fused_matrix_takes_no_more_than_itself(tmp_path: Path) -> None:
    for variant in ("gpt2", "gpt-neox", "phi3"):
        weights = load(make_checkpoint(tmp_path / variant, variant)).weights
        assert isinstance(weights, CheckpointWeights)
        tracemalloc.start()
        part = weights.stored("layers.1.attention.k.weight")
        assert tracemalloc.get_traced_memory()[1] < part.data.nbytes + 8192, variant
        tracemalloc.stop()


def test_gpt_neox_deals_heads(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "gpt-neox")
    model, stored = load(folder), load_file(folder / "model.safetensors")
    fused = stored["gpt_neox.layers.1.attention.query_key_value.weight"].numpy().reshape(4, 3, 24, 96)
    for index, part in enumerate("qkv"):
        values = model.weights.values(f"layers.1.attention.{part}.weight").reshape(4, 24, 96)
        np.testing.assert_array_equal(values, fused[:, index])


@pytest.mark.parametrize(("variant", "base"), [("gpt2", "transformer."), ("gpt-neox", ""), ("opt", "model.")])
def test_names_that_older_gpt_files_have(variant: str, base: str, tmp_path: Path) -> None:
    """GPT-2 and OPT were published without their base, and with tables that are no weights."""
    folder = make_checkpoint(tmp_path / "m", variant)
    expected = load(folder)

    def age(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(base).replace("embed_out", "lm_head")] = tensors.pop(name)
        for index in range(2) if variant == "gpt2" else ():
            tensors[f"h.{index}.attn.bias"] = torch.ones(1, 1, 8, 8)
            tensors[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)

    change(folder, age)
    for name in expected.weights.names():
        np.testing.assert_array_equal(load(folder).weights.values(name), expected.weights.values(name), err_msg=name)


@pytest.mark.parametrize(("dtype", "format"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_an_original_keeps_its_number_type(dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama", dtype=dtype)
    model = load(folder)
    assert (model.spec.default_format.weights, model.spec.cache_format, model.spec.formats) == (format, format, ())
    expected = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(model.weights.values("layers.0.ffn.up.weight"), expected)


def test_the_files_say_the_type_and_a_matrix_may_differ(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16)
    configure(folder, dtype="float32")
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].float()}))
    spec = load(folder).spec
    assert (spec.default_format.weights, spec.format("head").weights) == ("bf16", "fp32")
    assert [name for name, _ in spec.formats] == ["head"]


def test_shards(tmp_path: Path) -> None:
    whole = load(make_checkpoint(tmp_path / "whole", "qwen3"))
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 3
    sharded = load(tmp_path / "m")
    assert sharded.files == tuple(shards) and sharded.spec == whole.spec
    for name in whole.weights.names():
        np.testing.assert_array_equal(sharded.weights.values(name), whole.weights.values(name))
    shards[1].unlink()
    shards[2].unlink()
    with pytest.raises(SnelloError, match=rf"lacks 2 of {len(shards)} weight files: {shards[1].name}"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON table"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"ghost": "one.safetensors"}}', "lists tensors that no file holds: ghost"),
    ],
)
def test_a_broken_index(index: str, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SnelloError, match=message):
        load(folder)


def test_all_faults_come_in_one_error(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")

    def damage(tensors: Tensors) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(7, 96)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(320, 96, dtype=torch.int8)
        tensors["model.extra.weight"] = torch.zeros(1)

    change(folder, damage)
    with pytest.raises(SnelloError, match="in 4 places") as caught:
        load(folder)
    assert "missing model.norm.weight" in caught.value.message
    assert "model.layers.1.mlp.up_proj.weight has shape [7, 96], expected [200, 96]" in caught.value.message
    assert "model.layers.0.self_attn.q_proj.weight holds I8 numbers" in caught.value.message
    assert "unexpected model.extra.weight" in caught.value.message and "\n" not in caught.value.message


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    configure(folder, num_hidden_layers=2)
    with pytest.raises(SnelloError, match="in 9 places"):
        load(folder)
    configure(folder, num_hidden_layers=6)
    with pytest.raises(SnelloError, match="in 27 places.* and 15 more"):
        load(folder)


def test_a_tied_copy_must_be_equal(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama-tied-bias")
    expected = load(folder).weights.values("embedding.tokens.weight")
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "head.weight" not in load(folder).weights.names()
    np.testing.assert_array_equal(load(folder).weights.values("embedding.tokens.weight"), expected)
    change(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(SnelloError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(folder)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama-tied-bias")
    configure(folder, tie_word_embeddings=False)
    with pytest.raises(SnelloError, match="missing lm_head.weight"):
        load(folder)


def test_tables_that_are_recomputed_are_ignored_by_exact_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    inv_freq = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    change(folder, lambda t: t.update({inv_freq.format(i): torch.ones(40) for i in range(3)}))
    assert load(folder).num_parameters > 0
    change(folder, lambda t: t.update({inv_freq.format(3): torch.ones(40)}))
    with pytest.raises(SnelloError, match=r"unexpected model.layers.3.self_attn.rotary_emb.inv_freq"):
        load(folder)


def test_a_headless_save_leaves_out_the_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**ENCODER))
    model.save_pretrained(tmp_path / "m")
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "m" / "model.safetensors")
    loaded = load(tmp_path / "m")
    assert (loaded.spec.task, loaded.spec.head.kind, loaded.spec.head.pooling) == ("embedding", "embed", "mean")
    expected = model.encoder.layer[1].output.dense.weight.detach().numpy()
    np.testing.assert_array_equal(loaded.weights.values("layers.1.ffn.down.weight"), expected)


@pytest.mark.parametrize("variant", ["bert-mlm", "bert-classify", "distilbert-mlm"])
def test_an_encoder_can_be_loaded_for_embedding(variant: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", variant)
    model = load(folder, task="embedding")
    assert model.spec.task == "embedding"
    assert not [name for name in model.weights.names() if name.startswith("head")]
    with pytest.raises(SnelloError, match="missing"):
        load(folder, task="sequence-classification" if variant != "bert-classify" else "masked-lm")


def test_names_of_old_bert_checkpoints(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "bert-mlm")
    expected = load(folder)

    def age(tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["bert.pooler.dense.weight"], tensors["bert.pooler.dense.bias"] = torch.ones(96, 96), torch.ones(96)
        tensors["cls.seq_relationship.weight"] = torch.ones(2, 96)
        tensors["bert.embeddings.position_ids"] = torch.arange(128)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()

    change(folder, age)
    for name in expected.weights.names():
        np.testing.assert_array_equal(load(folder).weights.values(name), expected.weights.values(name))
    change(folder, lambda t: t.update({"cls.predictions.decoder.bias": t["cls.predictions.bias"] + 1}))
    with pytest.raises(SnelloError, match="cls.predictions.decoder.bias differs from cls.predictions.bias"):
        load(folder)


@pytest.mark.parametrize("variant", MIXTURES)
def test_experts_in_one_tensor_are_the_same_model(variant: str, tmp_path: Path) -> None:
    """As Transformers 5 holds them: its own state dict, written as it is."""
    folder = make_checkpoint(tmp_path / "m", variant)
    apart = load(folder)
    original = getattr(transformers, VARIANTS[variant][0]).from_pretrained(folder)
    own = {name: values.contiguous() for name, values in original.state_dict().items() if name != "lm_head.weight"}
    if not apart.spec.head.tied:
        own["lm_head.weight"] = original.state_dict()["lm_head.weight"].contiguous()
    assert "model.layers.0.mlp.experts.gate_up_proj" in own
    save_file(own, folder / "model.safetensors")
    fused = load(folder)
    assert fused.spec == apart.spec
    for name in apart.weights.names():
        np.testing.assert_array_equal(fused.weights.values(name), apart.weights.values(name), err_msg=name)
    own["model.layers.0.mlp.experts.down_proj"] = own["model.layers.0.mlp.experts.down_proj"][1:].contiguous()
    save_file(own, folder / "model.safetensors")
    with pytest.raises(SnelloError, match=r"model.layers.0.mlp.experts.down_proj has shape \[\d, 96, \d+\], expected"):
        load(folder)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "mixtral")
    change(folder, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    with pytest.raises(SnelloError, match=r"missing model.layers.1.block_sparse_moe.experts.3.w2.weight"):
        load(folder)


def test_a_router_in_another_type_keeps_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "mixtral", dtype=torch.bfloat16)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    change(folder, lambda tensors: tensors.update({router: tensors[router].float()}))
    model = load(folder)
    assert model.spec.format("layers.0.ffn.router").weights == "fp32"
    lean = Quantize().apply(model, Context(output=tmp_path / "lean"))
    np.testing.assert_array_equal(
        lean.weights.values("layers.0.ffn.router.weight"), model.weights.values("layers.0.ffn.router.weight")
    )


def test_fused_matrices_are_views_of_their_rows(tmp_path: Path) -> None:
    """A family that stacks q, k, v and gate, up, as data alone."""
    llama = FAMILIES["llama"]
    apart = {"q", "k", "v", "gate", "up"}
    fused = Family(
        name="fused",
        architectures=llama.architectures,
        spec=llama.spec,
        stems={stem: name for stem, name in llama.stems.items() if stem.rpartition(".")[2] not in apart},
        heads=llama.heads,
        fused={
            "model.layers.{i}.self_attn.qkv_proj": tuple(f"layers.{{i}}.attention.{part}" for part in "qkv"),
            "model.layers.{i}.mlp.gate_up_proj": ("layers.{i}.ffn.gate", "layers.{i}.ffn.up"),
        },
        base="model.",
    )
    spec = spec_from_config(
        {**DECODER, "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "attention_bias": True}
        | {"hidden_act": "silu"}
    )
    rng = np.random.default_rng(0)
    plain = {name: rng.standard_normal(shape, np.float32) for name, shape in parameter_shapes(spec).items()}
    stored: dict[str, StoredTensor] = {}
    for name, values in plain.items():
        stem, _, suffix = name.rpartition(".")
        layer = stem.split(".")[1] if stem.startswith("layers") else ""
        if stem.rpartition(".")[2] not in apart:
            template = {**fused.stems, "head": "lm_head"}[stem.replace(f"layers.{layer}.", "layers.{i}.")]
            stored[f"{template.replace('{i}', layer)}.{suffix}"] = StoredTensor.of(values)
    for index in range(3):
        for suffix in ("weight", "bias"):
            parts = [plain[f"layers.{index}.attention.{part}.{suffix}"] for part in "qkv"]
            stored[f"model.layers.{index}.self_attn.qkv_proj.{suffix}"] = StoredTensor.of(np.concatenate(parts))
        parts = [plain[f"layers.{index}.ffn.{part}.weight"] for part in ("gate", "up")]
        stored[f"model.layers.{index}.mlp.gate_up_proj.weight"] = StoredTensor.of(np.concatenate(parts))
    _, weights = bind(fused, spec, stored, tmp_path)
    for name, values in plain.items():
        np.testing.assert_array_equal(weights.values(name), values, err_msg=name)
    whole = stored["model.layers.2.self_attn.qkv_proj.weight"].data
    assert isinstance(weights, CheckpointWeights)
    assert np.shares_memory(weights.stored("layers.2.attention.v.weight").data, whole)
    stored["model.layers.0.self_attn.qkv_proj.weight"] = StoredTensor.of(np.zeros((4, 96), np.float32))
    with pytest.raises(SnelloError, match=r"qkv_proj.weight has shape \[4, 96\], expected \[640, 96\]") as caught:
        bind(fused, spec, stored, tmp_path)
    assert caught.value.message.count("qkv_proj") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "only pickled weights"),
        ("model.pt", "only pickled weights"),
        ("model.pth", "only pickled weights"),
        ("model.gguf", "GGUF file"),
        ("model.onnx", "ONNX file"),
        ("notes.txt", "holds no model.safetensors"),
    ],
)
def test_weights_of_another_kind(name: str, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(SnelloError, match=message) as caught:
        load(folder)
    assert caught.value.hint


def test_a_quantized_checkpoint_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    (folder / "model.safetensors").unlink()
    with pytest.raises(Unsupported, match="bitsandbytes, 4 bits"):
        load(folder)


def test_the_digest_follows_weights_and_spec(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    first = load(folder).digest
    assert first == load(folder).digest == load(make_checkpoint(tmp_path / "same", "llama")).digest
    change(folder, lambda t: t["model.norm.weight"].add_(1))
    assert load(folder).digest != first
    make_checkpoint(folder, "llama")
    configure(folder, rms_norm_eps=1e-3)
    assert load(folder).digest != first
