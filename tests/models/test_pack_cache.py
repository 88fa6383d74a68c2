"""The pack cache: made once, found again, made anew when anything changed, bounded, safe between processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from snello.errors import SnelloError
from snello.models import load, pack_cache
from snello.models.families.llama import STEMS
from snello.models.families.resolve import spec_from_config
from snello.models.model import Model
from snello.models.pack_cache import packed
from snello.models.parameters import parameter_shapes
from snello.models.shapes import SHAPES
from tests.checkpoints import VARIANTS, make_checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SNELLO_CACHE_BYTES", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(make_checkpoint(tmp_path / "m", "llama"))


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_and_type_to_the_bit(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "m", variant, dtype=dtype))
    weights = packed(model)
    weights.verify()
    assert weights.names() == model.weights.names()
    for name in model.weights.names():
        np.testing.assert_array_equal(weights.values(name), model.weights.values(name), err_msg=name)


def test_packed_once_and_found_again(model: Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = packed(model)
    assert copies(cache) == [first.path]
    monkeypatch.setattr(pack_cache, "pack", lambda *_: pytest.fail("packed again"))
    again = packed(load(model.path))
    assert again.path == first.path
    own = Model(spec=model.spec, weights=first, path=model.path, name="packed")
    assert packed(own) is first


def test_made_anew_when_anything_changes(model: Model, cache: Path) -> None:
    first = packed(model)
    weights = model.path / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    second = packed(load(model.path))
    shutil.copytree(model.path, model.path.parent / "elsewhere")
    third = packed(load(model.path.parent / "elsewhere"))
    config = model.path / "config.json"
    config.write_text(config.read_text() + "\n")
    fourth = packed(load(model.path))
    assert len({first.path, second.path, third.path, fourth.path}) == 4 == len(copies(cache))


def test_weights_in_memory_are_known_by_their_values(model: Model) -> None:
    class InMemory:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def names(self) -> list[str]:
            return model.weights.names()

        def shape(self, name: str) -> tuple[int, ...]:
            return model.weights.shape(name)

        def values(self, name: str) -> Any:
            return model.weights.values(name) * np.float32(self.factor)

    made = [packed(Model(spec=model.spec, weights=InMemory(f), path=Path("/"), name="m")) for f in (2, 2, 3)]
    assert made[0].path == made[1].path != made[2].path
    np.testing.assert_array_equal(made[2].values("norm.weight"), model.weights.values("norm.weight") * 3)


def test_a_damaged_copy_is_replaced(model: Model) -> None:
    path = packed(model).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert packed(model).path == path and path.read_bytes() == whole


def test_the_least_recently_used_copy_goes(
    model: Model, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = packed(model).path.stat().st_size
    monkeypatch.setenv("SNELLO_CACHE_BYTES", str(int(size * 2.5)))
    others = [load(make_checkpoint(tmp_path / str(seed), "llama", seed=seed)) for seed in (1, 2)]
    second = packed(others[0]).path
    for index, path in enumerate((packed(model).path, second)):
        os.utime(path, (1000 - index, 1000 - index))
    packed(model)  # used now, so the second is the oldest
    third = packed(others[1])
    assert copies(cache) == sorted([packed(model).path, third.path])
    third.verify()


def test_a_model_beyond_the_bound_says_so(model: Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE_BYTES", "1000")
    with pytest.raises(SnelloError, match="is bounded at 0.00 GB") as caught:
        packed(model)
    assert caught.value.hint and "SNELLO_CACHE_BYTES" in caught.value.hint and copies(cache) == []
    monkeypatch.setenv("SNELLO_CACHE_BYTES", "2GB")
    with pytest.raises(SnelloError, match="SNELLO_CACHE_BYTES is '2GB'"):
        packed(model)


def test_the_default_bound(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    for total, expected in ((10**11, 10**10), (10**12, 2 * 10**10)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, total=total: shutil._ntuple_diskusage(total, 0, total))
        assert pack_cache.limit_bytes(cache) == expected


def test_a_full_disk(model: Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**11, 10**11, 0))
    with pytest.raises(SnelloError, match="GB free"):
        packed(model)
    assert copies(cache) == [] and not list(cache.glob("*.partial"))


def test_a_cache_that_cannot_be_written(model: Model, cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file in the way")
    with pytest.raises(SnelloError, match="cannot write") as caught:
        packed(model)
    assert caught.value.hint and "SNELLO_CACHE" in caught.value.hint


def test_half_written_files_of_dead_processes_are_removed(model: Model, cache: Path) -> None:
    cache.mkdir()
    dead, alive = cache / "dead.safetensors.partial", cache / "alive.safetensors.partial"
    dead.write_bytes(b"x")
    alive.write_bytes(b"x")
    code = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(cache / "alive.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        packed(model)
        assert alive.exists() and not dead.exists()
        holder.communicate(b"\n")


def test_two_processes_pack_once(model: Model, cache: Path) -> None:
    code = """
import sys, time
from snello.models import load, pack_cache
pack = pack_cache.pack
def slowly(model, writer):
    print("packing", flush=True)
    time.sleep(1)
    pack(model, writer)
pack_cache.pack = slowly
pack_cache.packed(load(sys.argv[1])).verify()
"""
    command = [sys.executable, "-c", code, str(model.path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(outputs) == ["", "packing\n"] and len(copies(cache)) == 1


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE", "~/packs")
    assert pack_cache.cache_folder() == Path.home() / "packs"
    monkeypatch.delenv("SNELLO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert pack_cache.cache_folder() == Path("/x/snello/packed")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pack_cache.cache_folder() == Path.home() / ".cache/snello/packed"


def test_memory_stays_small_while_packing(tmp_path: Path) -> None:
    """Streamed: the peak grows by far less than the model."""
    config = SHAPES["smollm2-135m"] | {"num_hidden_layers": 6, "vocab_size": 1024, "intermediate_size": 12288}
    tensors = {}
    for name, shape in parameter_shapes(spec_from_config(config)).items():
        stem, _, suffix = name.rpartition(".")
        layer = stem.split(".")[1] if stem.startswith("layers.") else ""
        stored = STEMS[stem.replace(f"layers.{layer}.", "layers.{i}.")].replace("{i}", layer)
        tensors[f"{stored}.{suffix}"] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = """
import sys
from snello.models import load, packed_writer
from snello.models.pack_cache import packed
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
model = load(sys.argv[1])
peak = before = anonymous()
write = packed_writer.zlib.crc32
def watched(piece, *rest):
    global peak
    peak = max(peak, anonymous())
    return write(piece, *rest)
packed_writer.zlib.crc32 = watched
size = packed(model).total_bytes
print(size, peak - before)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    size, grown = map(int, run.stdout.split())
    assert size > 250e6 and 1e6 < grown < 60e6
