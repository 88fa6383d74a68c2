"""A checkpoint as Hugging Face saves it: safetensors files bound strictly to the parameters of a `Spec`.

Every parameter that the `Spec` implies must be there in the right shape, and nothing may be left over; all faults
come in one error. Pickled, GGUF and ONNX files are refused by name. Nothing is read here but headers and one sample
of tied copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.models.arrangement import PLAIN, Piece, stored_shape
from snello.models.families.family import Family, Names, Source, names_for
from snello.models.families.resolve import with_type
from snello.models.files import read_json
from snello.models.model import FLOAT_FORMATS, Floats, Loadable, StoredTensor
from snello.models.parameters import matrix_names, parameter_shapes
from snello.models.spec import Spec, own_format
from snello.models.tensor_file import open_tensor_file, release_pages

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LISTED_FAULTS = 12
SAMPLED_BLOCKS, SAMPLED_BYTES = 64, 4096

Stored = Mapping[str, Loadable]
Found = Mapping[str, Loadable]


class CheckpointWeights:
    """Parameters of a checkpoint by canonical name, as stored."""

    def __init__(self, tensors: Found) -> None:
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def values(self, name: str) -> Floats:
        stored = self.stored(name)
        values = stored.float32()
        release_pages(stored.data)
        return values

    def stored(self, name: str) -> StoredTensor:
        """The numbers as their file holds them; rows of a fused matrix are a view, another arrangement is undone."""
        return self._tensors[name].load()


# ---- files ----------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order of name; all must be there."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    shards = sorted({folder / str(shard) for shard in _weight_map(folder).values()})
    absent = [shard.name for shard in shards if not shard.exists()]
    if absent:
        raise SnelloError(
            f"{folder} lacks {len(absent)} of {len(shards)} weight files: {_some(absent)}",
            "download the rest of the checkpoint",
        )
    return shards


def read_stored(folder: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    """All tensors of a checkpoint by the names they were saved under, and the files that hold them."""
    files, tensors = weight_files(folder), dict[str, StoredTensor]()
    for path in files:
        for name, tensor in open_tensor_file(path).tensors.items():
            if name in tensors:
                raise SnelloError(f"{folder}: tensor {name} is in more than one file", "download the checkpoint again")
            tensors[name] = tensor
    if (folder / INDEX).exists() and files != [folder / WEIGHTS]:
        absent = sorted(set(_weight_map(folder)) - set(tensors))
        if absent:
            message = f"{folder}: {INDEX} lists tensors that no file holds: {_some(absent)}"
            raise SnelloError(message, "download the checkpoint again")
    return tensors, files


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise SnelloError(f"{folder / INDEX} has no weight_map", "download the checkpoint again")
    escaping = [shard for shard in index.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if escaping:
        message = f"{folder / INDEX} names a file outside its folder: {escaping[0]}"
        raise SnelloError(message, "download the checkpoint again")
    return index


def _no_weights(folder: Path) -> SnelloError:
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickled = [name for name in found if name.endswith(PICKLED)]
    if pickled:
        return Unsupported(
            f"{folder} holds only pickled weights ({_some(pickled)}), which can run code when they are read",
            "save it once with Transformers: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)",
        )
    for ending, kind in ((".gguf", "GGUF"), (".onnx", "ONNX")):
        foreign = [name for name in found if name.endswith(ending)]
        if foreign:
            return foreign_format(folder / foreign[0], kind)
    return SnelloError(f"{folder} holds no {WEIGHTS}", "is the download complete?")


def foreign_format(path: Path, kind: str) -> SnelloError:
    return Unsupported(
        f"{path} is a {kind} file, which Snello does not read", "give the Hugging Face folder it was made from"
    )


def _some(names: list[str], limit: int = LISTED_FAULTS) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---- binding --------------------------------------------------------------------------------------------------------


def bind(
    family: Family, spec: Spec, stored: Stored, folder: Path, spare: Set[str] = frozenset()
) -> tuple[Spec, CheckpointWeights]:
    """Finds every parameter of the `Spec`, and gives the `Spec` with the number types as stored.

    `spare` are tensors that may be left over.

    Raises:
        SnelloError: parameters are missing, left over or of the wrong shape; all of them are named at once.
    """
    has_base = any(name.startswith(family.base) for name in stored)
    names = names_for(family, spec, has_base=has_base, fused_experts=_fused_experts(family, stored))
    found: dict[str, Loadable] = {}
    faults: list[str] = []
    used: set[str] = set()
    shapes = parameter_shapes(spec)
    for canonical, shape in shapes.items():
        source = names.sources[canonical]
        name = next((name for name in source.names if name in stored), None)
        if name is None:
            faults.append(f"missing {source.names[0]}")
            continue
        used.add(name)
        fault, tensor = _locate(canonical, shape, source, stored[name], shapes)
        faults += [f"{name} {fault}"] if fault else []
        if tensor is not None:
            found[canonical] = tensor
    left = [name for name in sorted(stored) if name not in used | names.ignored | spare]
    copies = [name for name in left if name in names.copies and names.copies[name] in found]
    faults += [f"unexpected {name}" for name in left if name not in copies]
    faults += _differing(copies, names, stored, found)
    if faults:
        places = f"{len(faults)} place{'s' * (len(faults) != 1)}"
        raise SnelloError(
            f"{folder}: weights and config.json disagree in {places}: {_some(list(dict.fromkeys(faults)))}",
            "do config.json and the weights come from the same model?",
        )
    return _with_stored_types(spec, found), CheckpointWeights(found)


def _fused_experts(family: Family, stored: Stored) -> bool:
    """Whether all experts of a layer lie in one tensor."""
    if family.experts is None:
        return False
    endings = tuple(name.partition("{i}")[2] for name in family.experts.fused)
    return any(name.endswith(endings) for name in stored)


def _locate(
    canonical: str, shape: tuple[int, ...], source: Source, tensor: Loadable, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str | None, Loadable | None]:
    """A fault or the tensor; of a fused or transposed tensor, its piece."""
    parts = [shapes[part] for part in source.stacked] or [shape]
    expected = stored_shape(parts, source.arrangement)
    if tensor.dtype not in FLOAT_FORMATS and tensor.dtype != "F64":
        return f"holds {tensor.dtype} numbers, not a float type", None
    if tensor.shape != expected:
        return f"has shape {list(tensor.shape)}, expected {list(expected)}", None
    if not source.stacked and source.arrangement == PLAIN:
        return None, tensor
    index = source.stacked.index(canonical) if source.stacked else 0
    return None, Piece(tensor, tuple(part[0] for part in parts), index, source.arrangement)


def _differing(copies: list[str], names: Names, stored: Stored, found: Found) -> list[str]:
    """Tied copies that are not equal: such a model is not tied, whatever its config says."""
    return [
        f"{name} differs from {names.sources[names.copies[name]].names[0]}, which config.json says it repeats"
        for name in copies
        if not _same(stored[name], found[names.copies[name]])
    ]


def _same(first: Loadable, second: Loadable) -> bool:
    """Equality on evenly spaced blocks: cheap, and a matrix trained apart differs in every one of them."""
    one, other = first.load(), second.load()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    last = max(one.data.size - SAMPLED_BYTES, 0)
    starts = np.linspace(0, last, SAMPLED_BLOCKS, dtype=np.int64)
    return all(
        np.array_equal(one.data[start : start + SAMPLED_BYTES], other.data[start : start + SAMPLED_BYTES])
        for start in starts
    )


def _with_stored_types(spec: Spec, found: Found) -> Spec:
    """An original runs in its own number type: the embedding's is the default, matrices that differ are named."""
    types = {name: FLOAT_FORMATS.get(found[name].dtype, "fp32") for name in matrix_names(spec)}
    typed = with_type(spec, types.pop("embedding.tokens.weight"))
    linears = {
        name.removesuffix(".weight"): own_format(weights)
        for name, weights in types.items()
        if not name.startswith("embedding.") and weights != typed.default_format.weights
    }
    return typed.with_formats(linears)
