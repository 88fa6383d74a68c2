"""Lossless: the pair says what the original says, byte for byte; what pays is judged, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.engine.llm import LLM
from snello.engine.speculate import OFF
from snello.errors import SnelloError
from snello.measure.answers import Answering, Sameness, prompts_of, sameness
from snello.measure.interval import Interval
from snello.measure.memory import peak_while_serving
from snello.measure.text import Block
from snello.measure.timing import Ratio
from snello.models import Model, load
from snello.models.pair import PAIR, write_pair
from snello.optimize import receipts, sentence
from snello.optimize.candidate import Candidate
from snello.optimize.events import Finished, StageJudged
from snello.optimize.lossless import judge_pair
from snello.optimize.request import resolve
from snello.optimize.run import optimize
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.checkpoints import make_checkpoint
from tests.engine.test_engine import AllThatIsGuessed

PROMPTS = ["def area(radius):", "import os\n\nclass", "", "for i in range(", "é ✓ \U0001f600 def", "x" * 200, "# TODO"]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("lean") / "int4"
    return Quantize(weights="int4", method="rtn").apply(load("demo"), Context(output=path))


@pytest.fixture(scope="module")
def pair(lean: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair") / "both"
    write_pair(folder, load("demo"), lean.path)
    return folder


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_identical_answers_greedy_and_sampled(pair: Path, temperature: float) -> None:
    names: dict[str, Any] = {"temperature": temperature, "seed": 11, "max_tokens": 48, "n": 1, "top_p": 0.95}
    with LLM("demo") as original, LLM(pair) as both:
        assert both.drafter is not None and both.drafter.name == "draft"
        both.engine.governor = AllThatIsGuessed()  # the draft is as slow as the original: it would hardly be asked
        expected = original.generate(PROMPTS, **names)
        found = both.generate(PROMPTS, **names)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.text for one in found] == [one.text for one in expected]
        assert both.engine.governor.proposed > 0, "somebody guessed"
        for prompt, one in zip(PROMPTS, expected, strict=True):  # alone, not in a batch
            assert both.generate(prompt, **names).token_ids == one.token_ids


def test_the_folder_holds_each_byte_once(pair: Path, lean: Model) -> None:
    original = load("demo")
    assert os.path.samefile(pair / "original" / "model.safetensors", original.files[0])
    assert os.path.samefile(pair / "draft" / "model.safetensors", lean.files[0])
    model = load(pair)
    assert model.digest == original.digest and model.spec == original.spec and model.name == "both"
    assert model.home == pair and model.draft == pair / "draft"
    with LLM(pair, speculate=OFF) as alone:
        assert alone.drafter is None


def test_a_pair_moves_with_its_folder_and_survives_its_sources(lean: Model, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(load("demo").path, source, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    blob = tmp_path / "blob"
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(blob)  # as a download cache keeps it
    write_pair(tmp_path / "pair", load(source), lean.path)
    shutil.rmtree(source)
    blob.unlink()
    (tmp_path / "pair").rename(tmp_path / "größer ✓")
    with LLM(tmp_path / "größer ✓") as both, LLM("demo") as original:
        names: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
        assert both.generate("def", **names).token_ids == original.generate("def", **names).token_ids


def test_where_links_are_refused_files_are_copied(lean: Model, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    write_pair(tmp_path / "pair", load("demo"), lean.path)
    assert not os.path.samefile(tmp_path / "pair" / "original" / "model.safetensors", load("demo").files[0])
    assert load(tmp_path / "pair").digest == load("demo").digest


def test_damaged_pairs_are_told_in_one_line(pair: Path, tmp_path: Path) -> None:
    def broken(**changes: Any) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(pair, folder)
        table = json.loads((folder / PAIR).read_text()) | changes
        (folder / PAIR).write_text(json.dumps(table))
        return folder

    with pytest.raises(SnelloError, match="not understood"):
        load(broken(version=2))
    with pytest.raises(SnelloError, match="not understood"):
        load(broken(surprise=1))
    with pytest.raises(SnelloError, match="lies outside"):
        load(broken(draft="../../elsewhere"))
    with pytest.raises(SnelloError, match="is the folder itself"):
        load(broken(model="."))
    missing = broken()
    shutil.rmtree(missing / "draft")
    with pytest.raises(SnelloError, match="is missing"):
        load(missing)


def test_a_draft_of_other_words_is_refused(tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "llama")
    write_pair(tmp_path / "pair", load("demo"), other)
    with pytest.raises(SnelloError, match="cannot guess"):
        LLM(tmp_path / "pair")


# ---- the measurement ----


def blocks(count: int, length: int) -> list[Block]:
    random = np.random.default_rng(0)
    tokens = [random.integers(1, 4000, length).astype(np.int32) for _ in range(count)]
    return [
        Block(source="s", document=str(i), cluster=i, start=0, tokens=t, scored_from=1) for i, t in enumerate(tokens)
    ]


def test_prompts_are_of_the_text_and_new_as_long_as_it_lasts() -> None:
    text = blocks(3, 100)
    found = prompts_of(text, 40, 9)
    assert all(len(prompt) == 40 for prompt in found) and len({tuple(p) for p in found}) == 9
    whole = {tuple(block.tokens[s : s + 40].tolist()) for block in text for s in range(61)}
    assert {tuple(p) for p in found} <= whole
    assert [len(p) for p in prompts_of(blocks(2, 10), 40, 3)] == [10, 10, 10]


def test_the_two_sides_are_asked_the_same_and_compared(lean: Model) -> None:
    from snello.engine.draft_model import DraftModel

    groups = [[prompt] for prompt in prompts_of(blocks(2, 60), 20, 4)]
    with LLM("demo", context=128) as llm:
        drafter = DraftModel(lean, llm.executor, max_num_seqs=1)
        one = Answering(llm.executor, llm.tokenizer, groups, 16)
        other = Answering(llm.executor, llm.tokenizer, groups, 16, drafter)
        for _ in range(6):
            assert one.seconds() > 0 and other.seconds() > 0
        assert sameness(one, other) == Sameness(6, 96, 0)
        other.said[2] = ((1, 2, 3),)
        assert sameness(one, other).different == 1
        assert one.said[0] == one.said[4], "greedy, from the same prompt"
        assert one.said[1] != one.said[5], "drawn from another seed"
        drafter.close()


def timed(low: float, high: float, *, steady: bool = True) -> Ratio:
    return Ratio(Interval(low, (low * high) ** 0.5, high), steady, ((1.0, 1.0),) * 6)


def test_the_gate_is_speed_alone() -> None:
    original = Candidate(name="original", model=None)
    even = timed(0.99, 1.01)
    assert judge_pair("latency", timed(0.70, 0.72), even, original).verdict == "kept"
    assert judge_pair("latency", timed(0.97, 0.99), even, original).verdict == "dropped"
    assert judge_pair("latency", timed(0.9, 1.1, steady=False), even, original).verdict == "cannot tell"
    slower = judge_pair("latency", timed(0.70, 0.72), timed(1.04, 1.06), original)
    assert slower.verdict == "dropped" and slower.reason == "throughput is 5% worse"
    best = Candidate(name="quantize int4, rtn", model=None, steps=(None,), speedup=Interval(1.5, 1.6, 1.7))  # type: ignore[arg-type]
    assert judge_pair("latency", timed(0.70, 0.72), even, best).reason == "quantize int4, rtn is faster"
    assert judge_pair("latency", timed(0.50, 0.52), even, best).verdict == "kept"


def test_the_sentence_says_what_is_held() -> None:
    text = sentence.lossless(goal="latency", found=Interval(1.2, 1.3, 1.4), same=Sameness(40, 5120, 0), weights=1.31)
    assert text.startswith("1.3x faster (1.2-1.4), with the original's own answers; loss 0 by construction")
    assert "40 answers of 5,120 tokens" in text and text.endswith("holds both models: 1.3x the weights in memory")


# ---- the command ----


def test_impossible_wishes_are_refused(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="more memory, never less"):
        resolve("demo", lossless=True, goal="memory")
    with pytest.raises(SnelloError, match="has a draft already"):
        list(optimize(pair, lossless=True, output=tmp_path / "out"))
    encoder = make_checkpoint(tmp_path / "bert", "bert-mlm")
    with pytest.raises(SnelloError, match="nothing that could be drafted"):
        list(optimize(encoder, lossless=True, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


RECIPE = """
[budget]
lossless = true
[data]
calib_tokens = 1024
select_tokens = 2000
proof_tokens = 2000
[[steps]]
use = "quantize"
weights = "int4"
method = "rtn"
"""


def test_from_a_model_to_a_folder_that_runs(tmp_path: Path, monkeypatch: Any) -> None:
    """The clock is set, so that a busy machine changes no verdict; everything else is real."""
    import sysconfig

    library = Path(sysconfig.get_paths()["stdlib"])
    (tmp_path / "text").mkdir()
    for number, name in enumerate(
        ("argparse", "ast", "dataclasses", "inspect", "typing", "pathlib", "tarfile", "enum")
    ):
        path = library / f"{name}.py"
        if path.exists():
            (tmp_path / "text" / f"{number}.txt").write_text(path.read_text()[:12_000])
    monkeypatch.setattr("snello.optimize.lossless.ratio", _half_the_time)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    wishes: dict[str, Any] = {"text": tmp_path / "text", "recipe": tmp_path / "recipe.toml"}
    events = list(optimize("demo", output=tmp_path / "out", **wishes))
    last = events[-1]
    assert isinstance(last, Finished)
    result = last.result
    assert result.exit_code == 0, result.sentence
    assert result.sentence.startswith("2.00x faster") and "all the same" in result.sentence
    assert result.loss == Interval.exact(0.0) and result.size_ratio is not None and result.size_ratio < 1
    rows = [event.row for event in events if isinstance(event, StageJudged) and event.row.kind == "stage"]
    assert [(row.verdict, row.loss) for row in rows] == [("kept", Interval.exact(0.0))]
    out = tmp_path / "out"
    assert load(out).digest == load("demo").digest and load(out).draft == out / "draft"
    with LLM(out) as both, LLM("demo") as original:
        names: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 32}
        assert both.generate("class", **names).token_ids == original.generate("class", **names).token_ids
    proof = receipts.read(out).proof
    assert proof is not None and proof.proved and proof.tokens == proof_tokens(proof.sentence)
    assert "lossless = true" in (out / "recipe.toml").read_text()
    assert not (tmp_path / "out.work").exists()
    from snello.report.write import write_report

    write_report(out)
    assert "by construction" in (out / "report.html").read_text()


def proof_tokens(text: str) -> int:
    return int(text.split(" answers of ")[1].split(" tokens")[0].replace(",", ""))


def _half_the_time(a: Any, b: Any, *, most_quads: int, step: Any, **_: Any) -> Ratio:
    """Both sides really answer; the pair is said to take half of the time."""
    for _ in range(3):
        a(), b()
    step(1, 1)
    return Ratio(Interval(0.499, 0.5, 0.501), True, ((1.0, 0.5),) * 6)


def test_memory_of_a_pair_is_of_both(pair: Path) -> None:
    with LLM(pair) as both:
        assert both.drafter is not None
        least = both.executor.weights_bytes + both.drafter.memory_bytes
    assert peak_while_serving(pair, threads=1) > least


def test_a_pair_is_as_any_model_to_what_changes_models(pair: Path, tmp_path: Path) -> None:
    made = Quantize(weights="int8").apply(load(pair), Context(output=tmp_path / "int8"))
    assert made.draft is None and dataclasses.asdict(made.spec) != dataclasses.asdict(load(pair).spec)
