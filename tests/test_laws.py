"""The laws of the house, read from the source: layers, lazy imports, sizes, errors with hints, a base without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "snello"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)

LAYERS = {  # a module imports from lower layers, and from its own part
    "errors": 0,
    "native": 1,
    "models": 2,
    "techniques": 3,
    "engine": 3,
    "training": 3,
    "measure": 4,
    "optimize": 4,
    "serve": 5,
    "interop": 5,
    "report": 5,
    "terminal": 6,
    "cli": 6,
    "__main__": 7,
    "__init__": 7,
}
ACROSS = {  # the same layer, one direction
    ("optimize", "measure"),
    ("cli", "terminal"),
    ("serve", "report"),
    ("techniques", "training"),
    ("techniques", "engine"),
}
HEAVY = {"torch", "transformers", "accelerate"}
# Whole files that are about torch; everywhere else it is imported inside the function that needs it.
ABOUT_TORCH = (
    "measure/peers/inside/engine_transformers.py",
    "techniques/",
    "training/",
    "models/reference",
    "engine/torch",
    "measure/reference",
    "report/verify_template",
)
SHARED = ("base", "calibration", "curvature", "units")  # what techniques may import from beside them
LONGEST_FILE = 600
HINTS_OF_THEIR_OWN = {
    "RequestError": "OpenAI's error has one field for words: its message says what to do",
    "NotFinite": "its hint is its own, whatever the row",
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    """All imported module names with their nodes; `from snello import x` counts as snello.x."""
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            names = [f"snello.{alias.name}" for alias in node.names] if node.module == "snello" else [node.module]
            found += [(name, node) for name in names]
    return found


def typing_only(tree: ast.Module) -> set[int]:
    """Lines under `if TYPE_CHECKING`."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.body:
                lines |= set(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    return lines


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_layers_below(path: Path) -> None:
    part, tree = part_of(path), ast.parse(path.read_text())
    assert part in LAYERS, f"{part} has no layer"
    if part == "__init__":
        return  # the public face names everything, lazily; the next test holds it to that
    for name, node in imports(tree):
        if not name.startswith("snello.") or name == "snello.__version__":
            continue
        other = name.split(".")[1]
        fine = other == part or LAYERS[other] < LAYERS[part] or (part, other) in ACROSS
        assert fine, f"line {node.lineno}: {part} may not import {other}"


def test_techniques_do_not_import_each_other() -> None:
    for path in (PACKAGE / "techniques").rglob("*.py"):
        relative = path.relative_to(PACKAGE / "techniques")
        own = relative.parts[0].removesuffix(".py")
        if own in ("table", "__init__"):
            continue
        for name, node in imports(ast.parse(path.read_text())):
            if name.startswith("snello.techniques."):
                other = name.split(".")[2]
                assert other in (own, *SHARED), f"{relative}:{node.lineno} imports the technique {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_imported_only_where_it_is_needed(path: Path) -> None:
    relative, tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())
    if relative.startswith(ABOUT_TORCH):
        return
    exempt = typing_only(tree)
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for name, node in imports(tree):
        if name.split(".")[0] in HEAVY and node.lineno not in exempt:
            assert node in inside, f"{relative}:{node.lineno} imports {name} for everybody"


@pytest.mark.parametrize(
    "statement",
    [
        "import snello",
        "from snello import LLM, SamplingParams, load, Spec",
        "import snello.cli.run, snello.cli.bench, snello.cli.doctor, snello.cli.report, snello.cli.export",
        "import snello.report.write, snello.interop.huggingface, snello.measure.machine, snello.measure.speed",
        "import snello.cli.optimize, snello.cli.apply, snello.cli.explain, snello.cli.embed, snello.cli.ladder",
        "import snello.cli.batch, snello.serve.batch",
        "import snello.serve.caches.exact, snello.serve.caches.flight, snello.serve.caches.similar",
        "import snello.cli.serve, snello.serve.server, snello.serve.app, snello.serve.routes, snello.engine.grammar",
        "from snello.techniques.table import TECHNIQUES",
    ],
)
def test_running_needs_no_torch(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {sorted(HEAVY)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_and_help_are_quick() -> None:
    """Under 0.5 s for the import, 0.2 s for --help on a quiet machine; the best of three, with room for a busy one."""
    for command, limit in (
        (["-c", "import snello"], 0.5),
        (["-m", "snello", "--help"], 0.6),
        (["-m", "snello", "--version"], 0.6),
    ):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True, cwd=ROOT, check=True)
            times.append(time.perf_counter() - started)
        assert min(times) < limit, f"{command}: {min(times):.2f} s"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from snello.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    modules = done.stdout.splitlines()[-1]
    for name in ("numpy", "argparse", "tokenizers", "jinja2", "huggingface_hub"):
        assert f"'{name}'" not in modules, name


def test_files_stay_small() -> None:
    """No file is longer than a person reads in one go; the table shows where the house grows."""
    sizes = sorted(((len(path.read_text().splitlines()), path) for path in MODULES), reverse=True)
    print("\nlongest files")
    for lines, path in sizes[:10]:
        print(f"{lines:5}  {path.relative_to(ROOT)}")
    assert sizes[0][0] <= LONGEST_FILE, sizes[0]


def test_functions_stay_small() -> None:
    lengths = sorted(
        ((node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(PACKAGE)}:{node.name}")
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    half = lengths[len(lengths) // 2][0]
    print(f"\n{len(lengths)} functions, half of at most {half} lines; longest:")
    for length, name in lengths[-8:]:
        print(f"{length:5}  {name}")
    assert half <= 15


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_owns(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc and len(doc) > 20, "a module opens with a paragraph that says what it owns and why"


def test_errors_of_users_carry_hints() -> None:
    """Whatever is raised or made as a `SnelloError` says what to do about it."""
    trees = {path: ast.parse(path.read_text()) for path in MODULES}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    errors = {"SnelloError"}
    while more := {node.name for node in classes if _names(node.bases) & errors} - errors:
        errors |= more
    assert errors >= {"Unsupported", *HINTS_OF_THEIR_OWN}
    without = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _names([node.func]) & (errors - HINTS_OF_THEIR_OWN.keys())
        if not any(_may_say(hint) for hint in [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "hint")])
    ]
    assert without == []


def _names(nodes: list[ast.expr]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _may_say(hint: ast.expr) -> bool:
    return not (isinstance(hint, ast.Constant) and not hint.value)


def test_asserts_are_not_for_users_and_nothing_prints_below_the_command_line() -> None:
    for path in MODULES:
        if part_of(path) in ("cli", "terminal", "__main__") or path.name in ("round_trip.py", "verify_template.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.relative_to(ROOT)}:{node.lineno} prints"


def test_nothing_is_pickled() -> None:
    for path in MODULES:
        names = {name.split(".")[0] for name, _ in imports(ast.parse(path.read_text()))}
        assert not names & {"pickle", "shelve", "dill", "marshal"}, path
