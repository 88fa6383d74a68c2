"""Exports load elsewhere with the same numbers, and what would not is refused before anything is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from snello.errors import SnelloError, Unsupported
from snello.interop import huggingface
from snello.interop.huggingface import export, hf_config, hf_names, hf_tensors
from snello.models import load
from snello.models.model import Model
from snello.models.tensor_writer import narrow, plan_shards, widen
from tests.checkpoints import VARIANTS, make_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for name in VARIANTS:
        make_checkpoint(root / name, name)
    return root


def without_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "round_trip", lambda *_: "not asked")


def same_values(one: Model, other: Model) -> bool:
    names = one.weights.names()
    return sorted(names) == sorted(other.weights.names()) and all(
        np.array_equal(one.weights.values(name), other.weights.values(name)) for name in names
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_what_goes_out_comes_in_again(
    name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_round_trip(monkeypatch)
    model = load(folders / name)
    export(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert same_values(model, again)
    assert again.spec == model.spec


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3"])
def test_fused_matrices_go_back_as_they_were(name: str, folders: Path) -> None:
    shapes, values = hf_tensors(load(folders / name))
    stored = load_file(folders / name / "model.safetensors")
    assert shapes == {tensor: array.shape for tensor, array in stored.items()}
    assert all(np.array_equal(values(tensor), array) for tensor, array in stored.items())


@pytest.mark.parametrize("name", ["llama-tied-bias", "bert-classify"])
def test_the_round_trip_runs_in_a_fresh_process_and_asks_transformers(name: str, folders: Path, tmp_path: Path) -> None:
    exported = export(load(folders / name), tmp_path / "out")
    assert "fresh process" in exported.proof and "as in Transformers" in exported.proof
    assert exported.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) - header(
        tmp_path / "out" / "model.safetensors"
    )


def test_experts_of_an_odd_width_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, options = VARIANTS["mixtral"]
    monkeypatch.setitem(VARIANTS, "odd", (architecture, options | {"intermediate_size": 71}))
    exported = export(load(make_checkpoint(tmp_path / "odd", "odd")), tmp_path / "out")
    assert "as in Transformers" in exported.proof


def header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_lean_model_is_dequantized(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snello.techniques.base import Context
    from snello.techniques.quantize import Quantize

    without_round_trip(monkeypatch)
    lean = Quantize(weights="int8").apply(load(folders / "llama"), Context(output=tmp_path / "lean"))
    export(lean, tmp_path / "out")
    assert same_values(lean, load(tmp_path / "out"))


def test_an_embedding_model_stays_one(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_round_trip(monkeypatch)
    model = load(folders / "bert-mlm", task="embedding")
    head = dataclasses.replace(model.spec.head, pooling="cls", normalize=True)
    model = dataclasses.replace(model, spec=dataclasses.replace(model.spec, head=head))
    export(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.spec.head == head
    assert same_values(model, again)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_exports_round_to_nearest(
    dtype: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_round_trip(monkeypatch)
    model = load(folders / "qwen3")
    export(model, tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]
    again = load(tmp_path / "out")
    name = "layers.0.ffn.up.weight"
    values = model.weights.values(name)
    assert np.array_equal(again.weights.values(name), widen(narrow(name, values, dtype), dtype))  # type: ignore[arg-type]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] in ("bfloat16", "float16")


def test_bf16_rounds_as_torch_does() -> None:
    import torch

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:4] = [1.00390625, 1.01171875, -0.0, 3.3e38]
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(widen(narrow("x", values, "bf16"), "bf16"), expected)


@pytest.mark.parametrize("value", [70000.0, float("nan"), float("inf")])
def test_numbers_that_do_not_fit_are_named(value: float) -> None:
    with pytest.raises(SnelloError, match="the weight holds"):
        narrow("the weight", np.array([1.0, value], np.float32), "fp16")


def test_large_models_are_sharded(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_round_trip(monkeypatch)
    model = load(folders / "llama")
    export(model, tmp_path / "out", shard_bytes=200_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert same_values(model, load(tmp_path / "out"))


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    shards = plan_shards({"a": (10,), "b": (1000,), "c": (10,), "d": (10,)}, "fp32", 400)
    assert [shard.tensors for shard in shards] == [("a",), ("b",), ("c", "d")]
    assert shards[0].name == "model-00001-of-00003.safetensors"


def test_what_no_config_can_say_is_refused(folders: Path, tmp_path: Path) -> None:
    model = load(folders / "llama")
    fewer = dataclasses.replace(model, spec=dataclasses.replace(model.spec, layers=model.spec.layers[:-1]))
    with pytest.raises(Unsupported, match="cannot say") as caught:
        hf_config(fewer, "fp32")
    assert caught.value.hint is not None and "layers" in caught.value.hint


def test_a_folder_is_whole_or_absent(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise SnelloError("it differs", "a hint")

    monkeypatch.setattr(huggingface, "round_trip", fail)
    with pytest.raises(SnelloError, match="it differs"):
        export(load(folders / "llama"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten_unasked(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_round_trip(monkeypatch)
    (tmp_path / "out").mkdir()
    with pytest.raises(SnelloError, match="there already"):
        export(load(folders / "llama"), tmp_path / "out")
    export(load(folders / "llama"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_damaged_export_is_found(folders: Path, tmp_path: Path) -> None:
    from snello.interop.round_trip import compare_values

    model = load(folders / "llama")
    other = load(make_checkpoint(tmp_path / "other", "llama", seed=1))
    fault = compare_values(other, model, "fp32")
    assert fault is not None and fault.endswith("differs")


def test_names_are_the_inverse_of_reading(folders: Path) -> None:
    model = load(folders / "bert-mlm")
    shapes, values = hf_tensors(model)
    assert set(shapes) <= {name for source in hf_names(model.spec).sources.values() for name in source.names}
    assert values("bert.embeddings.word_embeddings.weight").shape == shapes["bert.embeddings.word_embeddings.weight"]


def test_an_export_replaces_nothing_that_is_not_a_folder_of_its_own(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders / "llama")
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path, said in (
        (notes, "is a file"),
        (Path("."), "not a folder of its own"),
        (Path(".."), "not a folder of its own"),
        (tmp_path, "would replace"),
        (folders / "llama", "would replace"),
    ):
        with pytest.raises(SnelloError, match=said):
            export(model, path, overwrite=True)
    assert notes.read_text() == "mine" and not list(tmp_path.glob(".*.partial"))
