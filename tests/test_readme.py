"""README and docs say what is there: tree, commands, links, figures; recipes load, examples are short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from snello.cli import VERBS, parser_for
from snello.errors import SnelloError
from snello.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def commands() -> list[str]:
    """Every line of the README and the docs that begins with `snello VERB`, without its remark."""
    found = []
    for path in [*DOCS, ROOT / "scripts" / "demo.sh"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.match(r"^\s*(snello [a-z].*)$", line.strip().removeprefix("$ "))
            if match:
                found.append(re.split(r"\s{2,}|\s#|\s\\$", match[1])[0])
    return sorted(set(found))


def test_the_readme_is_one_good_read() -> None:
    assert len(README.splitlines()) <= 120


def test_the_tree_is_the_house() -> None:
    tree = README.split("## The house")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        folder = ROOT / "snello" if line.startswith("  ") else ROOT
        assert (folder / name).exists(), name


def test_every_architecture_is_in_the_docs() -> None:
    named = set(re.findall(r"`(\w+(?:Model|LM|ForPreTraining|ForSequenceClassification))`", MODELS))
    assert named == {name for family in FAMILIES.values() for name in family.architectures}


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    """Words that stand for values are fine; verbs and flags that do not exist are not."""
    words = shlex.split(command)[1:]
    if words[0].isupper():
        return
    parser, rest = parser_for(words)
    try:
        parser.parse_args(rest)
    except SnelloError as error:
        pytest.fail(f"{command}: {error}")


def test_every_verb_is_in_the_readme() -> None:
    for verb in VERBS:
        assert f"snello {verb}" in README, verb


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_figures_come_from_results() -> None:
    done = subprocess.run([sys.executable, "scripts/render_readme.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run: python scripts/render_readme.py"


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in DOCS:
        for target in re.findall(r"`?make ([a-z-]+)`?", path.read_text(encoding="utf-8")):
            if f"make {target}" in path.read_text() and target in (
                "demo",
                "test",
                "check",
                "lock",
                "format",
                "test-slow",
            ):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_load_and_are_short(path: Path) -> None:
    from snello.optimize.recipe import Recipe

    assert Recipe.load(path).stages
    assert len(path.read_text().splitlines()) <= 20


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30
    compile(path.read_text(), str(path), "exec")
