"""`load`: from a name to a `Model`, whatever kind of thing the name stands for.

A path that exists wins over a Hub name. A folder is a lean one (snello.json), an original with its draft
(deployment.json), a sentence-transformers one (modules.json) or a plain checkpoint (config.json); everything else is
refused in one line that says what it is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from snello.errors import SnelloError, Unsupported
from snello.models import hub
from snello.models.checkpoint import PICKLED, bind, foreign_format, read_stored
from snello.models.families import FAMILIES
from snello.models.families.resolve import resolve
from snello.models.families.sentence import is_sentence_folder, read_sentence_folder
from snello.models.files import read_json
from snello.models.generation import read_generation
from snello.models.lean import LEAN, load_lean
from snello.models.model import Model
from snello.models.pair import PAIR, read_pair
from snello.models.plain_folder import read_history
from snello.models.quantized import expand
from snello.models.spec import Spec, Task, linear_names
from snello.models.stories import is_stories_file, load_stories

DEMO = Path(__file__).parent / "demo"


def load(name: str | Path, *, task: Task | None = None) -> Model:
    """Opens a model; weights are mapped, not read.

    Args:
        name: a folder, a llama2.c file, a Hub name such as "Qwen/Qwen3-0.6B", or "demo".
        task: load a checkpoint for another task than it was saved for (an encoder for "embedding").
    """
    if str(name) == "demo":
        return _load_demo(task)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, path.resolve().name, task)
    if path.exists():
        return _load_file(path, task)
    if isinstance(name, str) and hub.is_hub_name(name):
        return _load_folder(hub.fetch(name), name, task)
    raise SnelloError(f"{name} does not exist", "give a model folder, or a Hub name such as Qwen/Qwen3-0.6B")


def no_vectors(model: Model, name: str) -> SnelloError:
    """Why this model gives no vectors of texts, and what gives them: most models can, where they are loaded for it."""
    family = FAMILIES.get(model.spec.family)
    says = f'whose config.json says "architectures": ["{family.embedding}"]' if family and family.embedding else ""
    hint = "give another model"
    if (model.path / LEAN).exists() and says:
        hint = f"make it again of an original {says}"
    elif (model.path / "config.json").exists() and not (model.path / LEAN).exists():
        hint = (f"give a folder {says}, or " if says else "") + 'load it in Python with task="embedding"'
    return SnelloError(f"{name} gives no vectors of texts: it was opened for {model.spec.task}", hint)


def _load_demo(task: Task | None) -> Model:
    if not any((DEMO / marker).exists() for marker in (LEAN, "config.json")):
        raise SnelloError(f"this installation has no demo model in {DEMO}", "give a model folder or a Hub name")
    return _load_folder(DEMO, "demo", task)


def _load_folder(folder: Path, name: str, task: Task | None) -> Model:
    if (folder / PAIR).exists():
        return _load_pair(folder, name, task)
    if (folder / LEAN).exists():
        model = load_lean(folder, name)
        if task not in (None, model.spec.task):
            hint = "make it again of an original that was loaded for it"
            raise Unsupported(f"{folder} was made for {model.spec.task}, not for {task}", hint)
        return model
    if is_sentence_folder(folder) and task in (None, "embedding"):
        return _load_sentence(folder, name)
    if not (folder / "config.json").exists():
        raise _not_a_model(folder)
    return _load_checkpoint(folder, name, task)


def _load_pair(folder: Path, name: str, task: Task | None) -> Model:
    """The original, which knows who drafts for it."""
    original, draft = read_pair(folder)
    return dataclasses.replace(load(original, task=task), name=name, draft=draft)


def _load_checkpoint(folder: Path, name: str, task: Task | None) -> Model:
    config, generation = read_json(folder / "config.json"), read_generation(folder)
    family, spec = resolve(config, task=task, generation=generation)
    stored, files = read_stored(folder)
    found = expand(config, folder, stored)
    if found.note and family.transposed:
        raise Unsupported(f"quantized {family.name} checkpoints are not read", "give the original checkpoint")
    spec, weights = bind(family, spec, found.tensors, folder, found.spare)
    return Model(
        spec=spec,
        weights=weights,
        path=folder,
        name=name,
        generation=generation,
        history=read_history(folder),
        files=tuple(files),
        note=_said(found.note, spec),
        grid=found.grid,
    )


def _said(note: str, spec: Spec) -> str:
    """What became of integers that others chose."""
    kind = spec.format(linear_names(spec)[0]).weights.upper()
    return f"{note}: read as {kind} numbers, as stock engines multiply them" if note else ""


def _load_sentence(folder: Path, name: str) -> Model:
    sentence = read_sentence_folder(folder)
    model = _load_checkpoint(sentence.encoder, name, "embedding")
    return dataclasses.replace(model, spec=sentence.applied(model.spec))


def _load_file(path: Path, task: Task | None) -> Model:
    if path.suffix == ".gguf":
        raise foreign_format(path, "GGUF")
    if path.suffix == ".onnx":
        raise foreign_format(path, "ONNX")
    if is_stories_file(path):
        if task not in (None, "causal-lm"):
            raise Unsupported(f"{path} is a llama2.c file, which loads for causal-lm alone", "give a folder")
        return load_stories(path)
    if path.name.endswith(PICKLED):
        raise Unsupported(f"{path} is a pickled file, which can run code when it is read", "give a safetensors folder")
    if path.suffix == ".safetensors":
        raise SnelloError(f"{path} is only the weights of a model", f"give its folder: {path.parent}")
    raise Unsupported(f"{path} is not a model", "give a model folder or a Hub name")


def _not_a_model(folder: Path) -> SnelloError:
    found = sorted(path.name for path in folder.iterdir())
    for ending, kind in ((".gguf", "GGUF"), (".onnx", "ONNX")):
        for name in found:
            if name.endswith(ending):
                return foreign_format(folder / name, kind)
    if "adapter_config.json" in found:
        return Unsupported(f"{folder} is an adapter, not a model", "give the model that it was trained on")
    return SnelloError(f"{folder} is not a model folder: it holds no config.json", "give the folder of a checkpoint")
