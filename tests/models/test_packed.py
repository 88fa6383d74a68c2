"""The packed file: valid safetensors, exact both ways, checked when opened, never half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from snello.errors import SnelloError
from snello.models.families.resolve import spec_from_config
from snello.models.model import StoredTensor
from snello.models.packed import PackedWeights, layouts, packed_bytes
from snello.models.packed_writer import PackedWriter
from snello.models.parameters import matrix_names, parameter_shapes
from snello.models.spec import Format, Spec, input_name, linear_names
from snello.native import core

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 307,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 80,
    "intermediate_size": 200,
    "hidden_act": "silu",
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
INT4 = Format(weights="int4", group_size=32, activations="int8", rotate=True, equalize=True)
INT8 = Format(weights="int8", activations="int8", rotate=True, equalize=True)


def float_spec(weights: str = "float32", **settings: Any) -> Spec:
    return spec_from_config(CONFIG | {"dtype": weights} | settings)


def integer_spec(body: Format = INT4, head: Format = INT8, **settings: Any) -> Spec:
    spec = float_spec(**settings)
    formats = {linear: head if linear == "head" else body for linear in linear_names(spec)}
    return spec.with_formats(formats if spec.head.tied else {**formats, "embedding": Format(weights="int8")})


def random_values(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in parameter_shapes(spec).items()}


def write_floats(path: Path, spec: Spec, values: dict[str, np.ndarray]) -> PackedWeights:
    matrices = set(matrix_names(spec))
    with PackedWriter(path, spec) as writer:
        for name, value in values.items():
            if name in matrices:
                writer.add_float(name, value, spec.default_format.weights)  # type: ignore[arg-type]
            else:
                writer.add_vector(name, value)
    return PackedWeights(path, spec)


@pytest.fixture
def spec() -> Spec:
    return float_spec()


@pytest.fixture
def path(tmp_path: Path, spec: Spec) -> Path:
    write_floats(tmp_path / "model.safetensors", spec, random_values(spec))
    return tmp_path / "model.safetensors"


# ---- float matrices


@pytest.mark.parametrize("tied", [True, False])
def test_floats_come_back_to_the_bit(tied: bool, tmp_path: Path) -> None:
    spec = float_spec(tie_word_embeddings=tied)
    values = random_values(spec)
    weights = write_floats(tmp_path / "x", spec, values)
    assert weights.names() == list(parameter_shapes(spec))
    for name, value in values.items():
        np.testing.assert_array_equal(weights.values(name), value, err_msg=name)
        assert weights.shape(name) == value.shape
    weights.values("norm.weight")[:] = 0  # a fresh array
    np.testing.assert_array_equal(weights.vector("norm.weight"), values["norm.weight"])
    weights.verify()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_are_kept_as_they_are(dtype: str, tmp_path: Path) -> None:
    import torch

    spec = float_spec(dtype)
    short = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    values = {name: torch.tensor(value).to(getattr(torch, dtype)) for name, value in random_values(spec).items()}
    with PackedWriter(tmp_path / "x", spec) as writer:
        for name, value in values.items():
            raw = np.frombuffer(value.contiguous().view(torch.uint8).numpy().tobytes(), np.uint8)
            stored = StoredTensor(short, tuple(value.shape), raw)
            if name in matrix_names(spec):
                writer.add_float(name, stored, spec.default_format.weights)  # type: ignore[arg-type]
            else:
                writer.add_vector(name, stored.float32())
    weights = PackedWeights(tmp_path / "x", spec)
    for name, value in values.items():
        np.testing.assert_array_equal(weights.values(name), value.float().numpy(), err_msg=name)


def test_what_meets_bf16_inputs_has_nothing_next_to_zero(tmp_path: Path) -> None:
    """Of both signs, below 2^-56 and from there on; NaN is nobody's to hide."""
    spec = float_spec("bfloat16")
    values = random_values(spec)
    least = np.float32(2.0**-56)
    some = np.array([least, -least, least * 0.999, least / 2, -least / 2, 1e-40, -0.0, 0.0, np.nan], np.float32)
    values["layers.0.ffn.up.weight"][3, : len(some)] = some
    kept = write_floats(tmp_path / "x", spec, values).values("layers.0.ffn.up.weight")[3, : len(some)]
    np.testing.assert_array_equal(kept, [least, -least, least, 0, 0, 0, 0, 0, np.nan])
    exact = dataclasses.replace(spec, default_format=Format(weights="bf16"))
    kept = write_floats(tmp_path / "y", exact, values).values("layers.0.ffn.up.weight")[3, : len(some)]
    assert kept[3] == least / 2 and kept[5] > 0


def test_an_unaligned_source_and_a_wide_one_are_packed_too(tmp_path: Path, spec: Spec) -> None:
    values = random_values(spec)
    with PackedWriter(tmp_path / "x", spec) as writer:
        for name, value in values.items():
            shifted = np.frombuffer(b"x" + value.tobytes(), np.uint8)[1:]
            double = value.astype(np.float64)
            if name == "layers.0.ffn.up.weight":
                writer.add_float(name, StoredTensor("F64", value.shape, double.reshape(-1).view(np.uint8)), "fp32")
            elif name in matrix_names(spec):
                writer.add_float(name, StoredTensor("F32", value.shape, shifted), "fp32")
            else:
                writer.add_vector(name, value)
    for name, value in values.items():
        np.testing.assert_array_equal(PackedWeights(tmp_path / "x", spec).values(name), value)


def test_pieces_are_the_matrix_packed_at_once(tmp_path: Path, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_values(spec)
    whole = write_floats(tmp_path / "whole", spec, values)
    monkeypatch.setattr("snello.models.packed_writer.PIECE_BYTES", 1)  # one panel at a time
    write_floats(tmp_path / "pieces", spec, values)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    at_once = core.pack_float("fp32", values["embedding.tokens.weight"], "fp32")
    np.testing.assert_array_equal(whole.tensor("embedding.tokens.weight").data, at_once.data)


# ---- integer matrices


def padded(values: np.ndarray, fill: float = 0.0) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, -values.shape[1] % 64)), constant_values=fill)


def rotation(columns: int) -> np.ndarray:
    """Block-diagonal Hadamard, orthonormal, in double: stated apart from the code under test."""
    block = 128 if columns % 128 == 0 else 64
    small = np.array([[1.0]])
    while len(small) < block:
        small = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), small)
    return np.kron(np.eye(columns // block), small / math.sqrt(block))


def write_integers(path: Path, spec: Spec) -> dict[str, np.ndarray]:
    """Random integers in every linear; returns the effective matrices, worked out in double."""
    rng, shapes, effective = np.random.default_rng(1), parameter_shapes(spec), dict[str, np.ndarray]()
    scales = {
        name: np.exp2(rng.integers(-3, 4, layout.shape[0])).astype(np.float32)
        for name, layout in layouts(spec).items()
        if name.startswith("inputs.")
    }
    with PackedWriter(path, spec) as writer:
        for name, scale in scales.items():
            writer.add_vector(name, scale)
        for name, shape in shapes.items():
            if name not in matrix_names(spec):
                effective[name] = rng.standard_normal(shape, np.float32)
                writer.add_vector(name, effective[name])
                continue
            linear = "head" if name == "embedding.tokens.weight" and spec.head.tied else name.removesuffix(".weight")
            fmt = spec.format("embedding" if linear.startswith("embedding") else linear)
            rows, columns = shape[0], -(-shape[1] // 64) * 64
            row_scale = np.exp2(rng.integers(-9, -3, rows)).astype(np.float32)
            if fmt.weights == "int8":
                q = rng.integers(-127, 128, shape, np.int8)
                writer.add_int8(name, q, row_scale)
                stored = row_scale[:, None] * padded(q.astype(np.float64))
            else:
                zero = 8 if fmt.weights == "int4" else 4
                q = rng.integers(0, 2 * zero, (rows, columns), np.uint8)
                group_scale = rng.integers(1, 16, (rows, -(-columns // fmt.group_size)), np.int8)
                if fmt.weights == "int3":
                    group_scale[::2] *= -1
                writer.add_grouped(name, fmt.weights, q, group_scale, row_scale, fmt.group_size)
                spread = np.repeat(group_scale, fmt.group_size, axis=1)[:, :columns]
                stored = row_scale[:, None] * spread.astype(np.float64) * (q.astype(np.float64) - zero)
            if fmt.rotate:
                stored = stored @ rotation(columns)
            if fmt.equalize:
                stored = stored / scales[f"inputs.{input_name(linear)}.scale"]
            effective[name] = stored[:, : shape[1]]
    return effective


FORMATS = {
    "int4": integer_spec(),
    "int4, untied": integer_spec(tie_word_embeddings=False),
    "int4 in groups of 128": integer_spec(dataclasses.replace(INT4, group_size=128)),
    "int3": integer_spec(dataclasses.replace(INT4, weights="int3")),
    "int3 in groups of 128": integer_spec(dataclasses.replace(INT4, weights="int3", group_size=128)),
    "plain basis": integer_spec(Format(weights="int4", group_size=64), Format(weights="int8")),
    "rotated only": integer_spec(dataclasses.replace(INT8, equalize=False), INT8),
    "equalized only": integer_spec(dataclasses.replace(INT4, rotate=False), dataclasses.replace(INT8, rotate=False)),
    "blocks of 128": integer_spec(hidden_size=128, intermediate_size=256),
}


@pytest.mark.parametrize("case", FORMATS)
def test_values_undo_scales_rotation_and_padding(case: str, tmp_path: Path) -> None:
    spec = FORMATS[case]
    effective = write_integers(tmp_path / "x", spec)
    weights = PackedWeights(tmp_path / "x", spec)
    for name, expected in effective.items():
        got = weights.values(name)
        assert got.shape == expected.shape and got.dtype == np.float32 and got.flags.c_contiguous
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    assert not [name for name in weights.names() if name.startswith("inputs.")]


def test_input_scales_are_there_for_equalized_inputs_only(tmp_path: Path) -> None:
    spec = FORMATS["int4"]
    write_integers(tmp_path / "x", spec)
    weights = PackedWeights(tmp_path / "x", spec)
    scale = weights.input_scale("layers.1.ffn.hidden")
    assert scale is not None and scale.shape == (256,)
    plain = FORMATS["plain basis"]
    write_integers(tmp_path / "y", plain)
    assert PackedWeights(tmp_path / "y", plain).input_scale("layers.1.ffn.hidden") is None


def test_packed_tensors_go_over_as_they_are(tmp_path: Path) -> None:
    spec = FORMATS["int4"]
    write_integers(tmp_path / "x", spec)
    first = PackedWeights(tmp_path / "x", spec)
    with PackedWriter(tmp_path / "y", spec) as writer:
        for name, layout in sorted(layouts(spec).items(), key=lambda item: not item[0].startswith("inputs.")):
            if layout.format == "vector":
                writer.add_vector(name, first.vector(name))
            else:
                writer.add_packed(name, first.tensor(name))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_bytes_are_counted(tmp_path: Path) -> None:
    spec = FORMATS["int4, untied"]
    write_integers(tmp_path / "x", spec)
    weights = PackedWeights(tmp_path / "x", spec)
    linears = [weights.tensor(f"{linear}.weight").data.nbytes for linear in linear_names(spec)]
    assert weights.linear_bytes == sum(linears)
    assert weights.total_bytes == packed_bytes(spec) > weights.linear_bytes
    assert (tmp_path / "x").stat().st_size == weights.total_bytes + 65536


# ---- the file


def test_the_library_reads_it_and_everything_is_aligned(path: Path, spec: Spec) -> None:
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + length) % 65536 == 0
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert all(entry["data_offsets"][0] % 64 == 0 for name, entry in header.items() if name != "__metadata__")
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == sorted(parameter_shapes(spec))
        table = json.loads(metadata["tensors"])
        assert (metadata["format_version"], metadata["spec"]) == ("2.0", spec.digest)
        for name in file.keys():  # noqa: SIM118 - not a dict
            assert table[name]["crc32"] == f"{zlib.crc32(file.get_tensor(name).tobytes()):08x}"
        assert table["layers.0.ffn.up.weight"] | {"crc32": ""} == {
            "format": "fp32", "shape": [200, 96], "group_size": 0, "crc32": "",
        }  # fmt: skip


def test_a_flipped_bit_is_found_and_named(path: Path, spec: Spec) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SnelloError, match="1 tensors are damaged: norm.weight|1 tensors are damaged: ") as caught:
        PackedWeights(path, spec).verify()
    assert caught.value.message.count("weight") == 1


def test_a_cut_file_is_refused_before_it_is_mapped(path: Path, spec: Spec) -> None:
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(SnelloError, match="describes .* bytes, the file has"):
        PackedWeights(path, spec)


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header and keeps the data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    path.write_bytes(raw[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + raw[8 + length :])


def in_table(edit: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        table = json.loads(header["__metadata__"]["tensors"])
        edit(table)
        header["__metadata__"]["tensors"] = json.dumps(table, separators=(",", ":"))

    return change


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda header: header["__metadata__"].update(format_version="1.0"),
            "format version 1.0, this snello reads 2.0",
        ),
        (lambda header: header["__metadata__"].pop("format_version"), "is not a packed snello file"),
        (lambda header: header["__metadata__"].update(tensors="["), "table of tensors is broken"),
        (in_table(lambda table: table["norm.weight"].pop("shape")), "table of tensors is broken"),
        (in_table(lambda table: table["norm.weight"].update(shape=7)), "table of tensors is broken"),
        (in_table(lambda table: table["norm.weight"].update(crc32="xyz")), "table of tensors is broken"),
        (in_table(lambda table: table.pop("norm.weight")), "in 1 places: missing norm.weight"),
        (in_table(lambda table: table["norm.weight"].update(shape=[97])), r"norm.weight is .*97.*, expected .*96"),
        (lambda header: header.update(odd=header.pop("norm.weight")), "missing norm.weight; unexpected odd"),
    ],
)
def test_a_header_that_does_not_fit(
    edit: Callable[[dict[str, Any]], object], message: str, path: Path, spec: Spec
) -> None:
    rewrite(path, edit)
    with pytest.raises(SnelloError, match=message):
        PackedWeights(path, spec)


def test_a_newer_minor_version_is_read(path: Path, spec: Spec) -> None:
    rewrite(path, lambda header: header["__metadata__"].update(format_version="2.7"))
    PackedWeights(path, spec).verify()


def test_a_file_of_another_model_is_refused(path: Path) -> None:
    with pytest.raises(SnelloError, match="does not fit its model in") as caught:
        PackedWeights(path, float_spec(num_hidden_layers=4))
    assert "missing layers.2.attention.norm.weight" in caught.value.message and " more" in caught.value.message


# ---- writing


def test_what_is_added_wrongly_is_a_bug_and_leaves_nothing(tmp_path: Path, spec: Spec) -> None:
    def write(add: Callable[[PackedWriter], object]) -> None:
        with PackedWriter(tmp_path / "x", spec) as writer:
            add(writer)

    ones = np.ones(96, np.float32)
    for add, message in [
        (lambda writer: writer.add_vector("nothing", ones), "no tensor of this model"),
        (lambda writer: [writer.add_vector("norm.weight", ones) for _ in "ab"], "there already"),
        (lambda writer: writer.add_vector("norm.weight", ones[:5]), "has shape"),
        (lambda writer: writer.add_float("layers.0.ffn.up.weight", np.ones((200, 96), np.float32), "bf16"), "bf16"),
        (lambda writer: writer.add_vector("norm.weight", ones), "never added"),
    ]:
        with pytest.raises(AssertionError, match=message):
            write(add)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_and_an_old_file_stays(path: Path, spec: Spec) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), PackedWriter(path, spec) as writer:
        writer.add_vector("norm.weight", np.ones(96, np.float32))
        raise KeyboardInterrupt
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_seen_before_any_work(tmp_path: Path, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(SnelloError, match="has 0.00 GB free, x needs") as caught, PackedWriter(tmp_path / "x", spec):
        pytest.fail("should not begin")
    assert caught.value.hint and list(tmp_path.iterdir()) == []


class FullFile:
    """A file on a disk that takes `room` bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= memoryview(data).nbytes
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0], ids=["at once", "half-way", "on the header"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(
    part: float, tmp_path: Path, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = Path.open, int(packed_bytes(spec) * part)
    monkeypatch.setattr(Path, "open", lambda self, *rest, **more: FullFile(real(self, *rest, **more), room))
    with pytest.raises(SnelloError, match=r"the disk of .* is full: x needs"):
        write_floats(tmp_path / "x", spec, random_values(spec))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, spec: Spec) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SnelloError, match="cannot write") as caught, PackedWriter(tmp_path / "file" / "x", spec):
        pytest.fail("should not begin")
    assert caught.value.hint
