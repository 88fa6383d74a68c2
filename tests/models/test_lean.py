"""Lean folders: written whole or not at all, read strictly, loaded like any other model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.errors import SnelloError, Unsupported
from snello.models import Model, PackedWriter, load, write_lean_folder
from snello.models.packed import PackedWeights
from snello.models.parameters import matrix_names
from tests.checkpoints import make_checkpoint

HISTORY = [{"technique": "quantize", "options": {"weights": "int4"}}]


def copy_all(model: Model) -> Callable[[PackedWriter], None]:
    def fill(writer: PackedWriter) -> None:
        for name in model.weights.names():
            if name in matrix_names(model.spec):
                writer.add_float(name, model.weights.values(name), "fp32")
            else:
                writer.add_vector(name, model.weights.values(name))

    return fill


@pytest.fixture
def source(tmp_path: Path) -> Model:
    folder = make_checkpoint(tmp_path / "source", "llama")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "notes.txt").write_text("not part of a model")
    return load(folder)


@pytest.fixture
def lean(source: Model, tmp_path: Path) -> Path:
    write_lean_folder(tmp_path / "lean", source.spec, source, HISTORY, copy_all(source))
    return tmp_path / "lean"


def test_a_lean_folder_is_a_model(source: Model, lean: Path) -> None:
    model = load(lean)
    assert isinstance(model.weights, PackedWeights)
    assert (model.spec, model.name, list(model.history)) == (source.spec, "lean", HISTORY)
    assert model.generation == {"temperature": 0.5}
    for name in source.weights.names():
        np.testing.assert_array_equal(model.weights.values(name), source.weights.values(name))
    assert model.tokenizer.encode("hello") == source.tokenizer.encode("hello")
    assert model.tokenizer.prompt([{"role": "user", "content": "hi"}]) == "hi"
    assert model.num_parameters == source.num_parameters and model.digest != source.digest
    assert not (lean / "notes.txt").exists()
    assert [path.name for path in lean.parent.iterdir() if "partial" in path.name or "old" in path.name] == []


def test_the_same_work_gives_the_same_bytes(source: Model, lean: Path, tmp_path: Path) -> None:
    write_lean_folder(tmp_path / "again", source.spec, source, HISTORY, copy_all(source))
    for path in lean.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_lean_folder_may_be_the_next_source_and_be_replaced(source: Model, lean: Path) -> None:
    model = load(lean)
    write_lean_folder(lean, model.spec, model, [*model.history, {"technique": "prune"}], copy_all(model))
    again = load(lean)
    assert [step["technique"] for step in again.history] == ["quantize", "prune"]
    np.testing.assert_array_equal(again.weights.values("norm.weight"), source.weights.values("norm.weight"))


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SnelloError("no"), OSError(28, "No space left on device")])
def test_a_failure_leaves_nothing_and_what_was_there_stays(fault: BaseException, source: Model, lean: Path) -> None:
    def fail(writer: PackedWriter) -> None:
        writer.add_vector("norm.weight", np.ones(96, np.float32))
        raise fault

    expected = SnelloError if isinstance(fault, OSError) else type(fault)
    before = sorted(lean.parent.rglob("*"))
    for target in (lean, lean.parent / "new"):
        with pytest.raises(expected):
            write_lean_folder(target, source.spec, source, [], fail)
    assert sorted(lean.parent.rglob("*")) == before
    assert load(lean).history == tuple(HISTORY)


def test_other_peoples_files_are_not_replaced(source: Model, lean: Path, tmp_path: Path) -> None:
    def never(writer: PackedWriter) -> None:
        pytest.fail("should not begin")

    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (lean / "receipts").mkdir()
    for target, message in (
        ("papers", "thesis.tex"),
        ("file", "is a file"),
        ("lean", "receipts"),
        ("source", "not empty"),
    ):
        with pytest.raises(SnelloError, match=message):
            write_lean_folder(tmp_path / target, source.spec, source, [], never)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads((folder / "snello.json").read_text())
    change(table)
    (folder / "snello.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(format_version="1.0"), "format version 1.0, this snello reads 2.0"),
        (lambda table: table.pop("format_version"), "format version None"),
        (lambda table: table.update(colour=1), "unknown key 'colour'"),
        (lambda table: table.pop("history"), "missing key 'history'"),
        (lambda table: table["spec"].update(colour=1), "spec: unknown key 'colour'"),
        (lambda table: table["spec"].update(hidden_size=64), "does not fit its model"),
        (lambda table: table.update(history=3), "history is no list of steps"),
        (lambda table: table.update(history=["quantize"]), "history is no list of steps"),
        (lambda table: table.update(generation=None), "generation is no table of settings"),
        (lambda table: table["generation"].update(top_p=7), "generation: top_p is 7, expected a number above 0"),
    ],
)
def test_what_snello_json_may_not_say(change: Callable[[dict[str, Any]], object], message: str, lean: Path) -> None:
    edit(lean, change)
    with pytest.raises(SnelloError, match=message):
        load(lean)


def test_a_lean_folder_has_one_task(lean: Path) -> None:
    assert load(lean, task="causal-lm").spec.task == "causal-lm"
    with pytest.raises(Unsupported, match="was made for causal-lm, not for embedding"):
        load(lean, task="embedding")


def test_a_llama2c_file_becomes_a_lean_folder_with_its_tokenizer(tmp_path: Path) -> None:
    from tests.models.test_stories import write, write_pieces

    write(tmp_path / "tiny.bin")
    write_pieces(tmp_path / "tiny.tok265.bin")
    source = load(tmp_path / "tiny.bin")
    write_lean_folder(tmp_path / "lean", source.spec, source, [], copy_all(source))
    model = load(tmp_path / "lean")
    assert model.tokenizer.encode("ab é") == source.tokenizer.encode("ab é")
    np.testing.assert_array_equal(
        model.weights.values("layers.1.ffn.down.weight"), source.weights.values("layers.1.ffn.down.weight")
    )
