"""Whole runs on fake models: each verdict, each exit code, what is left behind."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from snello.errors import SnelloError
from snello.measure.interval import Interval
from snello.native.core import NotFinite
from snello.optimize import receipts
from snello.optimize.events import ModelLoaded, Planned, Progress, ProofRead, StageJudged, TextRead, Warned
from snello.optimize.recipe import Recipe
from snello.optimize.run import optimize
from snello.report.write import write_report
from tests.optimize.conftest import Bed


def test_a_run_keeps_what_pays_and_proves_it(bed: Bed) -> None:
    result = bed.run()
    assert result.exit_code == 0 and result.path == bed.output
    assert bed.verdicts(result) == {
        "original": "original",
        "original again (A/A)": "steady",
        "planted fault": "caught",
        "prune ffn 1/6": "not run",
        "quantize int8": "kept",
        "quantize int4, rtn": "dropped",
        "quantize int4, gptq": "kept",
        "quantize int4, awq": "dropped",
        "quantize mixed 5.0 bits": "not run",
        "quantize mixed 6.0 bits": "not run",
        "quantize int3, gptq": "dropped",
        "int8 kv cache": "kept",
    }
    rows = {row.name: row for row in result.ladder}
    assert rows["original again (A/A)"].loss == Interval.exact(0.0)
    assert rows["quantize int4, rtn"].reason == "over 4%"
    assert rows["quantize int4, gptq"].replaces == "quantize int8"
    assert rows["quantize int4, awq"].reason.startswith("costs the same as quantize int4, gptq")
    assert result.speedup is not None and result.speedup.mid == pytest.approx(1 / (0.33 * 0.9), rel=0.02)
    assert result.loss is not None and 0 < result.loss.high <= 0.04
    assert result.sentence.startswith("3.4x faster") or result.sentence.startswith("3.3")
    assert "unseen tokens" in result.sentence
    assert (bed.output / "model.safetensors").exists()
    assert not bed.output.with_name("out.work").exists()


def test_events_are_json_and_progress_never_falls(bed: Bed) -> None:
    bed.run()
    lines = [json.loads(json.dumps(event.to_json())) for event in bed.events]
    assert all(line["schema"] == 1 and line["event"] for line in lines)
    assert lines[-1]["event"] == "result" and lines[-1]["exit"] == 0
    assert lines[0]["event"] == "model_loaded" and lines[0]["resumed"] is False
    done: dict[tuple[str, str], tuple[int, int]] = {}
    for event in bed.events:
        if isinstance(event, Progress):
            before = done.get((event.stage, event.activity), (0, event.total))
            assert event.done >= before[0] and event.total == before[1]
            done[event.stage, event.activity] = (event.done, event.total)


def test_receipts_hold_everything_and_come_back(bed: Bed) -> None:
    result = bed.run()
    found = receipts.read(bed.output)
    assert found.run.text_sha256 and found.run.smallest_provable < 0.04
    assert [step.row for step in found.steps] == list(result.ladder)
    assert [step.index for step in found.steps] == list(range(1, len(found.steps) + 1))
    assert found.proof is not None and found.proof.proved and found.proof.fault_caught
    assert found.proof.again == Interval.exact(0.0)
    assert len(found.proof.worst) == 10
    assert all(len(p.tokens) == len(p.original) == len(p.lean) for p in found.proof.worst)
    assert found.proof.worst[0].difference >= found.proof.worst[-1].difference
    assert found.proof.documents[0].loss >= found.proof.documents[-1].loss
    assert sum(document.tokens for document in found.proof.documents) == found.proof.tokens
    assert found.proof.files["model.safetensors"] == result.artifact_sha256
    kept = next(step for step in found.steps if step.step == "quantize int8")
    assert kept.evidence is not None and kept.evidence.guards.mean_divergence is not None
    assert kept.evidence.weights_only_note == "torch is not installed"
    assert kept.margin and kept.costs and kept.speed is not None
    assert {cost.goal for cost in kept.costs} == {"latency", "throughput", "memory"}
    assert kept.spec_before != kept.spec_after
    front = {point.name: point for point in found.proof.pareto}
    assert front["int8 kv cache"].on_front
    assert not front["quantize int4, rtn"].on_front


@pytest.mark.parametrize(("pace", "why"), [(1.09, "below the 3% that pays"), (1.25, "dropped: latency is 1")])
def test_nothing_paid_keeps_the_model(bed: Bed, pace: float, why: str) -> None:
    bed.bench.effects = dict.fromkeys(bed.bench.effects, (0.001, pace))
    result = bed.run()
    assert result.exit_code == 0 and result.path is None
    assert result.sentence.startswith("keep your model")
    assert why in result.sentence
    assert set(bed.verdicts(result).values()) <= {"original", "steady", "caught", "dropped", "not run"}
    assert (bed.output / "receipts").is_dir() and not (bed.output / "model.safetensors").exists()
    assert receipts.read(bed.output).proof is not None


def test_everything_loses_too_much(bed: Bed) -> None:
    bed.bench.effects = dict.fromkeys(bed.bench.effects, (0.2, 0.3))
    result = bed.run()
    assert result.exit_code == 0 and result.path is None
    assert "over 4%" in result.sentence


def test_a_step_whose_model_overflows_ends_its_stage_not_the_run(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bed.bench.open

    def open_all_but_one(model: Any, **options: Any) -> Any:
        runner = opened(model, **options)
        if '"awq"' in model.content:
            monkeypatch.setattr(runner, "score", overflow)
        return runner

    def overflow(tokens: np.ndarray) -> NoReturn:
        raise NotFinite(3)

    monkeypatch.setattr(bed.bench, "open", open_all_but_one)
    result = bed.run()
    rows = {row.name: row for row in result.ladder}
    assert rows["quantize int4, awq"].verdict == "not run"
    assert "not finite" in rows["quantize int4, awq"].reason
    assert result.exit_code == 0 and rows["quantize int4, gptq"].verdict == "kept"


def test_a_text_that_proves_too_little_is_exit_4(bed: Bed, tmp_path: Path) -> None:
    from tests.optimize.fakes import write_text

    bed.text = write_text(tmp_path / "short.txt", words=14_000)
    result = bed.run(max_loss=0.0005)
    assert result.exit_code == 4 and result.path is None
    assert result.sentence.startswith("this text can prove ")
    assert "you asked for 0.05%: give about" in result.sentence and result.sentence.endswith(" tokens")
    assert not bed.output.exists() and not bed.bench.applied


def test_text_that_was_not_read_for_want_of_time_is_not_asked_for_alone(bed: Bed, tmp_path: Path) -> None:
    from tests.optimize.fakes import write_text

    bed.text = write_text(tmp_path / "long.txt", words=60_000)
    result = bed.run(max_loss=0.0005, time_budget=0.01)
    assert result.exit_code == 4
    assert result.sentence.endswith("tokens, and a longer --time-budget to read them")


def test_a_text_that_nearly_does_is_not_told_to_be_shorter_than_it_is(bed: Bed, tmp_path: Path) -> None:
    from tests.optimize.fakes import write_text

    bed.text = write_text(tmp_path / "short.txt", words=14_000)
    result = bed.run(max_loss="2.5%")
    can, wanted = (result.sentence.split()[place].strip("%,").replace(",", "") for place in (4, -2))
    assert result.exit_code == 4
    assert int(wanted) == pytest.approx(14_000 * float(can) / 2.5, rel=0.1)


def test_a_text_of_which_too_little_is_read_is_told_how_to_read_more(bed: Bed, tmp_path: Path) -> None:
    (tmp_path / "few.toml").write_text("[data]\nselect_tokens = 5000\nproof_tokens = 8000\n")
    few = bed.run(recipe=tmp_path / "few.toml", max_loss="1.5%")
    assert few.exit_code == 4
    said, _, data = few.sentence.partition(", and a recipe with ")
    assert said.startswith("this text can prove ") and ": it takes about " in said
    table = data.removesuffix(" to read them").replace("] ", "]\n").replace(", ", "\n")
    more = Recipe.from_table(tomllib.loads(table)).data
    assert more["select_tokens"] > 5_000 and more["proof_tokens"] > 8_000


def test_a_missed_target_is_exit_3_without_artefact(bed: Bed) -> None:
    result = bed.run(target="5x")
    assert result.exit_code == 3 and result.path is None
    assert result.sentence.startswith("target of 5x missed")
    assert not (bed.output / "model.safetensors").exists()
    assert (bed.output / "receipts").is_dir()


def test_a_failed_proof_is_exit_3(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.optimize.fakes import FakeRunner

    real = FakeRunner.score
    proof_words: set[bytes] = set()

    def score(self: FakeRunner, tokens: Any) -> Any:
        found = real(self, tokens)
        if self.model.loss > 0 and tokens.tobytes() in proof_words:
            found.log_probabilities -= 0.1
        return found

    from snello.optimize import texts

    cut = texts.cut

    def remember(*arguments: Any, **options: Any) -> Any:
        found = cut(*arguments, **options)
        proof_words.update(block.tokens.tobytes() for block in found.blocks("proof"))
        return found

    monkeypatch.setattr(texts, "cut", remember)
    monkeypatch.setattr(FakeRunner, "score", score)
    result = bed.run()
    assert result.exit_code == 3 and result.path is None
    assert result.sentence.startswith("the proof failed")
    assert not (bed.output / "model.safetensors").exists()
    proof = receipts.read(bed.output).proof
    assert proof is not None and not proof.proved and proof.exit_code == 3


def test_a_proof_that_a_guard_fails_says_which(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    from snello.optimize.examine import Examiner

    real = Examiner.guards

    def guards(self: Examiner, *arguments: Any) -> Any:
        found = yield from real(self, *arguments)
        return dataclasses.replace(found, failed=("loops in 9% of answers",)) if arguments[3] == "proof" else found

    monkeypatch.setattr(Examiner, "guards", guards)
    result = bed.run(strict=True)
    assert result.exit_code == 3 and result.path is None
    assert result.sentence == "the proof failed: strict: loops in 9% of answers"


def test_noise_is_cannot_tell(bed: Bed, fake_time: Any) -> None:
    fake_time.noise = 0.6
    bed.bench.effects = dict.fromkeys(bed.bench.effects, (0.001, 0.97))
    bed.bench.cache_pace = 1.0  # twelve quads would show a real gain through this noise
    result = bed.run()
    verdicts = bed.verdicts(result)
    assert verdicts["original again (A/A)"] == "unsteady"
    assert "cannot tell" in verdicts.values()
    assert "kept" not in verdicts.values()
    assert "too noisy to say whether it pays" in result.sentence
    assert "that pays" not in result.sentence and "gains" not in result.sentence


def test_a_stage_of_equal_cost_that_loses_less_takes_the_place(make_bed: Callable[[str], Bed]) -> None:
    bed = make_bed("first")
    bed.bench.effects |= {"int4 rtn": (0.015, 0.33)}
    result = bed.run()
    rows = {row.name: row for row in result.ladder}
    rtn, gptq, awq = (rows[f"quantize int4, {method}"] for method in ("rtn", "gptq", "awq"))
    assert (rtn.verdict, gptq.verdict, awq.verdict) == ("kept", "kept", "dropped")
    assert gptq.reason == "loses less at the same cost" and gptq.replaces == "quantize int4, rtn"
    assert gptq.speedup == rtn.speedup and gptq.gain is None  # the same program is not timed twice
    assert gptq.increment is not None and gptq.increment.high < 0
    found = receipts.read(bed.output)
    step = next(step for step in found.steps if step.step == "quantize int4, gptq")
    assert step.costs == () and "taken below 0" in step.margin
    assert found.proof is not None
    front = {point.name: point.on_front for point in found.proof.pareto}
    assert not front["quantize int4, rtn"]
    chain = Recipe.load(bed.output / "recipe.toml").stages[-1].steps[-1].options
    assert (chain["method"], chain["cache"]) == ("gptq", "int8")
    page = write_report(bed.output).with_suffix(".md").read_text(encoding="utf-8")
    assert "kept: loses less at the same cost, replaces quantize int4, rtn" in page
    again = make_bed("second").run(recipe=bed.output / "recipe.toml", max_loss=None, text=None)
    assert again.artifact_sha256 == result.artifact_sha256


@pytest.mark.parametrize(("minutes", "verdict"), [(29, "kept"), (25, "not run")])
def test_what_may_pay_has_its_time_before_equal_costs(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, minutes: int, verdict: str
) -> None:
    from snello.optimize import planner

    monkeypatch.setattr(planner.Forecast, "stage", lambda *_, timed=True, **__: 600.0 if timed else 1000.0)
    monkeypatch.setattr(planner.Forecast, "learn", lambda *_, **__: None)
    bed.bench.effects |= {"int4 rtn": (0.015, 0.33)}
    verdicts = bed.verdicts(bed.run(time_budget=60.0 * minutes))
    assert verdicts["quantize int4, rtn"] == "kept"
    assert verdicts["quantize int4, gptq"] == verdict
    assert verdicts["int8 kv cache"] == "kept"


def test_the_same_steps_again_are_not_run(bed: Bed, tmp_path: Path) -> None:
    twice = '[[steps]]\nstage = "%s"\nuse = "quantize"\nweights = "int8"\n'
    (tmp_path / "recipe.toml").write_text(twice % "one" + twice % "two")
    result = bed.run(recipe=tmp_path / "recipe.toml")
    assert (result.ladder[-1].verdict, result.ladder[-1].reason) == ("not run", "same as one")


@pytest.mark.parametrize("cut", ["select", "proof"])
def test_a_fault_that_goes_unseen_proves_nothing(bed: Bed, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    from snello.measure import quality

    real = quality.plant

    def plant(ruler: Any, original: Any, blocks: Any, *, max_loss: float, seed: int) -> Any:
        unseen = (seed == 0) == (cut == "select")
        return original if unseen else real(ruler, original, blocks, max_loss=max_loss, seed=seed)

    monkeypatch.setattr(quality, "plant", plant)
    result = bed.run()
    assert result.path is None and not (bed.output / "model.safetensors").exists()
    if cut == "select":
        assert result.exit_code == 4 and "a planted fault goes unseen" in result.sentence
        assert not bed.output.exists() and not bed.bench.applied
    else:
        assert result.exit_code == 3 and "would not have caught a planted fault" in result.sentence


def test_an_engine_that_gives_other_numbers_is_unsteady(bed: Bed) -> None:
    bed.bench.same_bits = False
    result = bed.run()
    again = result.ladder[1]
    assert (again.verdict, again.reason) == ("unsteady", "the same model gave other numbers")


def test_no_stage_starts_that_does_not_fit(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    from snello.optimize import planner

    monkeypatch.setattr(planner.Forecast, "stage", lambda *_, **__: 4000.0)
    result = bed.run()
    assert result.sentence.startswith("nothing was tried: no stage fits into a time budget of 30 min; --time-budget 5")
    assert bed.verdicts(result)["quantize int8"] == "not run"
    assert result.ladder[4].reason.startswith("needs about 67 min")
    assert any(isinstance(event, Warned) and "would take about" in event.message for event in bed.events)


def test_too_little_disk_is_said_before_work(bed: Bed) -> None:
    bed.bench.free = 1000
    with pytest.raises(SnelloError, match="of disk"):
        bed.run()
    assert not bed.bench.applied


def test_strict_gates_the_guards(bed: Bed) -> None:
    bed.bench.effects["int8"] = (0.012, 0.55)
    loose = bed.run(max_loss="5%")
    assert loose.exit_code == 0
    import snello.measure.guards as guards

    guards_before = guards.Strictness.__init__.__defaults__
    assert guards_before is not None
    bed.output = bed.output.with_name("strict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards.Strictness.__init__, "__defaults__", (0.0, *guards_before[1:]))
        strict = bed.run(max_loss="5%", strict=True)
    assert strict.path is None
    reasons = {row.name: row.reason for row in strict.ladder}
    assert "strict: mean divergence" in reasons["quantize int8"]


def test_the_metric_gates(bed: Bed, tmp_path: Path) -> None:
    import sys

    script = tmp_path / "score.py"
    script.write_text(
        "import sys, json, pathlib\n"
        "lean = (pathlib.Path(sys.argv[1]) / 'model.safetensors').exists()\n"
        "print(json.dumps([0.8 if lean and i % 4 == 0 else 1.0 for i in range(400)]))\n"
    )
    result = bed.run(metric=f"{sys.executable} {script} {{model}}")
    assert result.path is None
    assert any(row.reason.startswith("your metric loses up to") for row in result.ladder)


def test_a_dry_run_changes_nothing(bed: Bed) -> None:
    result = bed.run(dry_run=True)
    assert result.exit_code == 0 and "nothing was changed" in result.sentence
    plan = next(event for event in bed.events if isinstance(event, Planned))
    assert next(stage for stage in plan.stages if stage.runs).name == "quantize int8"
    assert all(stage.predicted_seconds > 0 for stage in plan.stages if stage.runs)
    assert not bed.output.exists() and not bed.output.with_name("out.work").exists()
    assert not bed.bench.applied


def test_an_output_that_exists_is_never_written_over(bed: Bed) -> None:
    bed.output.mkdir()
    (bed.output / "precious").write_text("mine")
    with pytest.raises(SnelloError, match="exists") as error:
        bed.run()
    assert error.value.hint is not None and "--overwrite" in error.value.hint
    result = bed.run(overwrite=True)
    assert result.path == bed.output and not (bed.output / "precious").exists()


def test_without_text_the_model_writes_its_own(bed: Bed) -> None:
    result = bed.run(text=None, max_loss="5%")
    text = next(event for event in bed.events if isinstance(event, TextRead))
    assert text.self_written
    assert any(isinstance(event, Warned) and "writes its own" in event.message for event in bed.events)
    assert "on text that the model wrote itself" in result.sentence


@pytest.mark.parametrize(("max_loss", "answers"), [("5%", [384]), ("0.5%", [384, 544])])
def test_a_model_writes_as_much_as_proves_the_loss(max_loss: str, answers: list[int], bed: Bed) -> None:
    """32 prompts, 12 answers to each at first; what came first stays."""
    bed.run(text=None, max_loss=max_loss)
    told = [event.total for event in bed.events if isinstance(event, Progress) and event.activity == "write"]
    text = next(event for event in bed.events if isinstance(event, TextRead))
    assert sorted({*told}) == answers and text.smallest_provable < float(max_loss[:-1]) / 100


def test_several_texts_the_worst_counts(bed: Bed, tmp_path: Path) -> None:
    from tests.optimize.fakes import write_text

    other = write_text(tmp_path / "other.txt", words=36_000, seed=5)
    bed.run(text=[bed.text, other])
    found = receipts.read(bed.output)
    evidence = next(step.evidence for step in found.steps if step.step == "quantize int8")
    assert evidence is not None and len(evidence.sources) == 2
    assert evidence.loss == max((s.loss for s in evidence.sources), key=lambda loss: loss.high)


def test_the_report_hook_writes_into_the_folder_before_it_is_published(bed: Bed) -> None:
    def finish(folder: Path) -> None:
        assert not bed.output.exists()
        assert receipts.read(folder).proof is not None
        (folder / "report.html").write_text("page")

    result = bed.run(finish=finish)
    assert result.report == bed.output / "report.html"


def test_a_classifier_is_judged_by_right_answers(bed: Bed, tmp_path: Path) -> None:
    from tests.optimize import fakes

    bed.bench.base = fakes.encoder_spec("sequence-classification")
    bed.bench.effects = {"int8": (0.002, 0.5), "int4": (0.15, 0.3), "mixed": (0.15, 0.3)}
    words, tokenizer = np.random.default_rng(0).integers(0, 3000, (4000, 8)), fakes.FakeTokenizer()
    texts = [" ".join(f"word{n}" for n in row) for row in words]
    rows = [f"{text}\t{sum(tokenizer.encode(text)) % 2}" for text in texts]
    bed.text = tmp_path / "labelled.tsv"
    bed.text.write_text("\n".join(["sentence\tlabel", *rows]))
    result = bed.run()
    assert result.exit_code == 0 and result.path is not None, result.sentence
    assert bed.verdicts(result)["quantize int8"] == "kept"
    assert bed.verdicts(result)["quantize int4, rtn"] == "dropped"
    assert "less accurate" in result.sentence and "unseen texts" in result.sentence
    found = receipts.read(bed.output)
    assert found.run.measure == "accuracy points" and found.proof is not None and found.proof.fault_caught


def test_an_embedding_model_is_judged_by_cosine(bed: Bed, tmp_path: Path) -> None:
    from tests.optimize import fakes

    bed.bench.base = fakes.encoder_spec("embedding")
    words = np.random.default_rng(0).integers(0, 3000, (600, 8))
    bed.text = tmp_path / "lines.txt"
    bed.text.write_text("\n".join(" ".join(f"word{n}" for n in row) for row in words))
    result = bed.run()
    assert result.exit_code == 0 and result.path is not None, result.sentence
    assert "away by cosine" in result.sentence and "of nearest neighbours the same" in result.sentence
    assert isinstance(bed.events[0], ModelLoaded) and bed.events[0].task == "embedding"
    proof = next(event for event in bed.events if isinstance(event, ProofRead))
    assert proof.unit == "texts"
    steps = {step.step: step for step in receipts.read(bed.output).steps}
    evidence = steps["quantize int8"].evidence
    assert evidence is not None and evidence.measure == "1 - cosine"
    assert evidence.guards.neighbours_kept is not None and 0.5 < evidence.guards.neighbours_kept < 1
    assert evidence.guards.mean_cosine is not None and evidence.guards.mean_cosine > 0.99
    assert [speed.tokens for speed in steps["quantize int8"].sequences] == [16, 128, 256]


def test_an_encoder_has_sequences_a_second(bed: Bed, tmp_path: Path) -> None:
    from tests.optimize import fakes

    bed.bench.base = fakes.encoder_spec("embedding")
    words = np.random.default_rng(0).integers(0, 3000, (600, 8))
    bed.text = tmp_path / "lines.txt"
    bed.text.write_text("\n".join(" ".join(f"word{n}" for n in row) for row in words))
    result = bed.run(goal="throughput")
    assert result.exit_code == 0 and "x more sequences a second (" in result.sentence
    proof = receipts.read(bed.output).proof
    assert proof is not None and len(proof.sequences_lean) == len(proof.sequences_original) == 3
    for before, after in zip(proof.sequences_original, proof.sequences_lean, strict=True):
        assert after.sequences_per_second.mid > 2.5 * before.sequences_per_second.mid
        assert after.ceiling > before.ceiling > 0
    page = write_report(bed.output).with_suffix(".md").read_text(encoding="utf-8")
    assert "sequences a second, of tokens" in page and "throughput: sequences of 16, 128, 256 tokens" in page


@pytest.mark.parametrize("goal", ["throughput", "memory"])
def test_other_goals(bed: Bed, goal: str) -> None:
    result = bed.run(goal=goal)
    assert result.exit_code == 0 and result.path is not None
    word = {"throughput": "more tokens a second", "memory": "less memory"}[goal]
    assert word in result.sentence


def test_judged_rows_come_in_order(bed: Bed) -> None:
    result = bed.run()
    rows = [event.row for event in bed.events if isinstance(event, StageJudged)]
    assert tuple(rows) == result.ladder
    assert [row.index for row in rows] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": "speed"}, "goal is 'speed'"),
        ({"max_loss": 1.5}, "max_loss is 1.5"),
        ({"max_loss": "many"}, "max_loss is 'many'"),
        ({"target": 0.5}, "target is 0.5"),
        ({"time_budget": 0}, "a time budget of 0 seconds"),
        ({"metric": "score {url}"}, "needs a server"),
        ({"text": "/nowhere.txt"}, "there is no text"),
        ({"seed": -1}, "seed is -1"),
        ({"metric": "no-such-program-anywhere {model}"}, "there is no program"),
        ({"metric": ""}, "names no {model}"),
        ({"output": "."}, "is not a folder of its own"),
        ({"output": "/"}, "is not a folder of its own"),
        ({"output": "/proc"}, "is a mount point"),
        ({"output": "/proc/nothing"}, "cannot be (made|written)"),
        ({"output": str(Path.home()), "overwrite": True}, "would replace"),
        ({"output": __file__, "overwrite": True}, "is a file"),
        ({"output": f"{__file__}/x"}, "cannot be written"),
    ],
)
def test_impossible_wishes(bed: Bed, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SnelloError, match=message) as error:
        bed.run(**options)
    assert error.value.hint
    assert {path.name for path in bed.output.parent.iterdir()} == {"text.txt"}  # nothing half-written


def test_an_output_that_holds_the_text_or_the_model_is_refused(bed: Bed) -> None:
    for wish in ({"text": bed.text}, {"text": None, "model": bed.text.parent / "model"}):
        (bed.text.parent / "model").mkdir(exist_ok=True)
        with pytest.raises(SnelloError, match="would replace"):
            list(optimize(wish.pop("model", "fake"), output=bed.text.parent, overwrite=True, **wish))


def test_two_runs_never_share_a_folder(bed: Bed) -> None:
    events = optimize("fake", text=bed.text, max_loss="4%", output=bed.output, workbench=bed.bench)
    next(events)
    with pytest.raises(SnelloError, match="another run is at work"):
        bed.run()
    events.close()  # type: ignore[attr-defined]
    assert bed.run().exit_code == 0


def test_a_text_that_cannot_be_read_leaves_nothing(bed: Bed) -> None:
    bed.text.write_bytes(b"\xff\xfe binary")
    bed.output = bed.output.parent / "new" / "lean"
    with pytest.raises(SnelloError, match="is not UTF-8"):
        bed.run()
    assert not bed.output.parent.exists()


def test_the_package_can_be_called(bed: Bed) -> None:
    import importlib

    package: Any = importlib.import_module("snello.optimize")
    told: list[Any] = []
    result = package("fake", text=bed.text, max_loss="4%", output=bed.output, workbench=bed.bench, on_event=told.append)
    assert result.exit_code == 0 and str(result) == result.sentence and len(told) > 10
