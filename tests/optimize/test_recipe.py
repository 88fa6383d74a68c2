"""Recipes are strict, name the nearest key, survive a round trip, and replay to the same artefact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snello.errors import SnelloError
from snello.optimize.recipe import Recipe, Replay, Stage, Step, describe
from snello.optimize.target import Target
from tests.optimize.conftest import Bed


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            '[[steps]]\nuse = "quantize"\ngroupsize = 64\n',
            "steps[0] (quantize): unknown key 'groupsize'",
            "did you mean 'group_size'?",
        ),
        ('[[steps]]\nuse = "quantise"\n', "steps[0]: there is no technique 'quantise'", "did you mean 'quantize'?"),
        ("[[steps]]\nweights = 'int4'\n", "steps[0] has no `use`", "one of: attention, convolution, distill, prune"),
        ("modle = 'x'\n", "recipe: unknown key 'modle'", "did you mean 'model'?"),
        ("[budget]\nmaxloss = 1\n", "[budget]: unknown key 'maxloss'", "did you mean 'max_loss'?"),
        ("[budget]\ngoal = 'latenci'\n", "[budget] goal is 'latenci'", "did you mean 'latency'?"),
        ("seed = 'one'\n", "recipe seed is 'one'", "it must be of type int"),
        ("[budget]\nmax_loss = 2\n", "[budget] max_loss is 2", "more than 0%"),
        ("steps = 3\n", "steps must be a list of tables", "[[steps]]"),
        ("budget = 3\n", "budget must be a table", "[budget]"),
        ("[replay]\nsnello = '1'\n", "[replay] has no model_digest", "decide afresh"),
        ("version = 9\n", "recipe version 9 is not 1", "update"),
        ("version = '1'\n", "recipe version '1' is not 1", "update"),
        ("text = 5\n", "recipe text is 5", "yours.txt"),
        ("text = [1]\n", "recipe text is [1]", "yours.txt"),
        ("[data]\ncalib_tokens = 'many'\n", "[data] calib_tokens is 'many'", "of type int"),
        ("[data]\nproof_tokens = 0\n", "[data] proof_tokens is 0", "at least 1"),
        ('[[steps]]\nuse = ["quantize"]\n', "steps[0] use is ['quantize']", "of type str"),
        ('[[steps]]\nuse = "quantize"\nstage = 3\n', "steps[0] stage is 3", "of type str"),
        ('[[steps]]\nuse = "quantize"\nrotate = "no"\n', "rotate='no' is not an option", "on or off"),
        ('[[steps]]\nuse = "quantize"\nweights = "mixed"\nbudget = "5"\n', "budget='5' is no budget", "5 bits"),
        ("replay = 1\n", "replay must be a table", "decide afresh"),
        ("[replay]\nmodel_digest = 1\n", "[replay] model_digest is 1", "of type str"),
        ("[replay]\nmodel_digest = 'a'\ntext_sha256 = 'b'\ndecisions = [1]\n", "a list of tables", "afresh"),
        (
            "[replay]\nmodel_digest = 'a'\ntext_sha256 = 'b'\ndecisions = [{stage = 's'}]\n",
            "[[replay.decisions]] has no verdict",
            "afresh",
        ),
        ("model = \n", "is not TOML", "recipes"),
    ],
)
def test_errors(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(SnelloError) as error:
        Recipe.load(write(tmp_path, text))
    assert message in error.value.message
    assert error.value.hint is not None and hint in error.value.hint


def test_a_bad_value_names_its_step(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match=r"steps\[1\] \(quantize\): weights='int5'"):
        Recipe.load(write(tmp_path, '[[steps]]\nuse = "quantize"\n[[steps]]\nuse = "quantize"\nweights = "int5"\n'))


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SnelloError, match="is not TOML"):
        Recipe.load(tmp_path / "binary.toml")
    with pytest.raises(SnelloError, match="cannot be read: Is a directory"):
        Recipe.load(tmp_path)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("use", "options", "name"),
    [
        ("quantize", {"weights": "int4", "method": "gptq"}, "quantize int4 gptq"),
        ("quantize", {"weights": "int8", "cache": "int8"}, "quantize int8 cache int8"),
        ("prune", {"ffn": 0.125}, "prune ffn 0.125"),
    ],
)
def test_a_step_is_named_by_what_it_says(use: str, options: dict[str, object], name: str) -> None:
    assert describe(Step(use, options)) == name


def test_reading(tmp_path: Path) -> None:
    recipe = Recipe.load(
        write(
            tmp_path,
            'model = "m"\ntext = "t.txt"\nseed = 3\n[budget]\nmax_loss = "2%"\ntarget = "1.5x"\n'
            '[[steps]]\nstage = "both"\nuse = "quantize"\nweights = "int8"\n'
            '[[steps]]\nstage = "both"\nuse = "quantize"\n[[steps]]\nuse = "quantize"\nmethod = "gptq"\n',
        )
    )
    assert recipe.text == (str(tmp_path / "t.txt"),)
    assert (recipe.max_loss, recipe.target, recipe.seed) == (0.02, Target(1.5), 3)
    assert [(stage.name, len(stage.steps)) for stage in recipe.stages] == [("both", 2), ("quantize gptq", 1)]


def test_round_trip(tmp_path: Path) -> None:
    replay = Replay(
        model_digest="a",
        text_sha256="b",
        artifact_sha256="c",
        snello="0.1",
        decisions=({"stage": "s", "verdict": "kept", "reason": 'says "why"\n'},),
    )
    steps = (Step("quantize", {"weights": "mixed", "budget": "5 bits", "cache": "int8"}),)
    recipe = Recipe(
        model='a "model"',
        text=(str(tmp_path / "ü.txt"),),
        seed=0,
        max_loss=0.01,
        goal="memory",
        target=Target(2.0),
        time_seconds=60.0,
        strict=True,
        metric="score {model}",
        data={"calib_tokens": 5, "select_tokens": 6, "proof_tokens": 7},
        stages=(Stage("mixed", steps),),
        replay=replay,
    )
    again = Recipe.load(write(tmp_path, recipe.to_toml()))
    assert again.to_toml() == recipe.to_toml()
    assert again.replay == replay
    assert again.stages[0].steps[0].resolved() == steps[0].resolved()


def test_a_replay_gives_the_same_artefact(make_bed: Callable[[str], Bed]) -> None:
    first, second = make_bed("first"), make_bed("second")
    original = first.run()
    second.bench.effects = dict.fromkeys(second.bench.effects, (0.003, 0.33))
    second.bench.effects["int4 gptq"] = first.bench.effects["int4 gptq"]
    replayed = second.run(recipe=first.output / "recipe.toml", max_loss=None, text=None)
    assert replayed.artifact_sha256 == original.artifact_sha256
    assert second.bench.applied == ["int4 gptq"]  # only what was kept is applied
    kept = [row for row in replayed.ladder if row.kind == "stage"]
    assert [(row.verdict, row.reason) for row in kept] == [("kept", "as recorded")]


def test_a_replay_on_other_things_is_refused(make_bed: Callable[[str], Bed], tmp_path: Path) -> None:
    first, second = make_bed("first"), make_bed("second")
    first.run()
    recipe = first.output / "recipe.toml"
    from tests.optimize.fakes import write_text

    with pytest.raises(SnelloError, match="recorded on another text"):
        second.run(recipe=recipe, text=write_text(tmp_path / "other.txt", words=36_000, seed=9))
    changed = recipe.read_text().replace('model_digest = "', 'model_digest = "0')
    recipe.write_text(changed)
    with pytest.raises(SnelloError, match="recorded on another model"):
        second.run(recipe=recipe, text=None)


def test_a_replay_that_differs_is_said(make_bed: Callable[[str], Bed]) -> None:
    first, second = make_bed("first"), make_bed("second")
    first.run()
    second.bench.effects["int4 gptq"] = (0.0031, 0.33)  # as another version would round
    with pytest.raises(SnelloError, match="gave another artefact"):
        second.run(recipe=first.output / "recipe.toml", text=None)
    assert not second.output.exists()


def test_nothing_paid_replays_to_nothing(make_bed: Callable[[str], Bed]) -> None:
    first, second = make_bed("first"), make_bed("second")
    for bed in (first, second):
        bed.bench.effects = dict.fromkeys(bed.bench.effects, (0.2, 0.3))
    assert first.run().path is None
    assert second.run(recipe=first.output / "recipe.toml", text=None).path is None
    assert second.bench.applied == []


def test_a_recipe_is_judged_step_by_step(bed: Bed, tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        '[budget]\nmax_loss = 0.04\n[[steps]]\nuse = "quantize"\nweights = "int4"\n'
        '[[steps]]\nuse = "quantize"\nweights = "int8"\n',
    )
    result = bed.run(recipe=recipe, max_loss=None)
    assert bed.verdicts(result)["quantize int4"] == "dropped"
    assert bed.verdicts(result)["quantize int8"] == "kept"
    assert "int8 kv cache" not in bed.verdicts(result)
