"""From data to a published adapter, or to none: families held out, the gate, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snello.cli import main
from snello.engine.native import NativeExecutor
from snello.errors import SnelloError
from snello.models import load
from snello.optimize.adapt_data import Example, read_examples, split
from snello.optimize.adapt_judge import encode
from tests.checkpoints import make_checkpoint

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "ledge"]


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step + number // 12) % 12] + str(number) for step in range(1, 9))


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama")


def test_phrases_of_one_sentence_stay_together(tmp_path: Path) -> None:
    rows = [{"text": " ".join(sentence(n).split()[cut:]), "label": n % 2} for n in range(60) for cut in range(3)]
    parts = split(read_examples(write(tmp_path / "d.jsonl", rows)), 0)
    ending = {example.prompt.split()[-2] for example in parts.held_out}
    assert parts.held_out and not ending & {example.prompt.split()[-2] for example in parts.train}


def test_too_few_families_judge_nothing(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "a b c", "completion": "d"}] * 100)
    with pytest.raises(SnelloError, match="too few"):
        split(read_examples(data), 0)


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": 1, "completion": "x"}', '{"prompt": "a", "completion": " "}'])
def test_rows_that_are_no_example(tmp_path: Path, line: str) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(SnelloError, match="line 2"):
        read_examples(tmp_path / "d.jsonl")


def test_what_is_learned_is_published_and_merged(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": sentence(n), "completion": " zz zz"} for n in range(60)])
    out = tmp_path / "out"
    assert main(["adapt", str(base), "--data", str(data), "--epochs", "4", "-o", str(out), "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["verdict"]["gain"]["low"] > 0 and not (tmp_path / ".out.training").exists()
    merged = tmp_path / "merged"
    assert main(["adapt", str(base), "--adapter", str(out), "--merge", "-o", str(merged)]) == 0
    assert (merged / "config.json").exists()


def test_a_prompt_is_learned_and_runs_beside_its_base(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": sentence(n), "completion": " zz zz"} for n in range(60)])
    out, words = tmp_path / "out", ["--method", "prompt", "--virtual-tokens", "4", "--rate", "0.05", "--epochs", "6"]
    assert main(["adapt", str(base), "--data", str(data), *words, "-o", str(out), "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = load(base)
    assert done["verdict"]["gain"]["low"] > 0 and done["parameters"] == 4 * model.spec.hidden_size
    assert main(["run", str(base), sentence(70), "--adapter", str(out), "--max-tokens", "2", "--json"]) == 0
    held = encode(model, Example(prompt=sentence(70), completion=" zz zz"))[0]
    with NativeExecutor(model, adapters={"it": out}) as executor:  # who serves reads it as who judged
        plain, own = (executor.score(held.tokens, adapter=name).log_probabilities for name in (None, "it"))
    assert own[held.start - 1 :].mean() > plain[held.start - 1 :].mean() + 0.5 * done["verdict"]["gain"]["low"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--merge"], "cannot be merged"),
        (["--merge", "--quantize", "int8"], "cannot be merged"),
        (["--virtual-tokens", "100000"], "virtual_tokens=100000"),
        (["--virtual-tokens", "0"], "virtual_tokens=0"),
    ],
)
def test_a_prompt_that_cannot_be(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """One line, before anything is trained, and nothing is left."""
    data = write(tmp_path / "d.jsonl", [{"prompt": sentence(n), "completion": " zz zz"} for n in range(60)])
    assert main(["adapt", str(base), "--data", str(data), "--method", "prompt", *words, "-o", str(tmp_path / "o")]) != 0
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl"]


def test_what_does_not_beat_its_base_is_not_written(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": sentence(n), "label": (n * 7919) % 13 % 2} for n in range(60)])
    out = tmp_path / "out"
    words = ["adapt", str(base), "--data", str(data), "--rate", "1e-9", "--epochs", "0.1", "-o", str(out)]
    assert main(words) == 3
    assert not out.exists() and not (tmp_path / ".out.training").exists()


def test_usage(base: Path, tmp_path: Path) -> None:
    assert main(["adapt", str(base), "-o", str(tmp_path / "out")]) == 2
    assert main(["adapt", str(base), "--adapter", "x", "-o", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "d", "--quantize", "int8"],
        ["--adapter", "a", "--merge", "--quantize", "int8"],
        ["--data", "d", "--merge", "--quantize", "int8", "--recipe", "r.toml"],
        ["--data", "d", "--merge", "--max-loss", "2%"],
    ],
)
def test_usage_of_making_it_lean(base: Path, tmp_path: Path, words: list[str]) -> None:
    assert main(["adapt", str(base), *words, "-o", str(tmp_path / "out")]) == 2
