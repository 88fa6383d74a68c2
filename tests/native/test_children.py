"""What the self-test of AMX asks its children: their answers, however the process handles the end of a child."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("children") / "children"
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, f"-I{CSRC}", str(HERE / "children.cpp"), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("handling", ["default", "ignored"])
def test_one_no_one_fault_or_one_too_late_is_no(children: Path, handling: str) -> None:
    """With SIGCHLD ignored, which is inherited, a child's exit status is lost: "yes" must not be lost with it."""
    done = subprocess.run([children, handling], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "1000"), done.stderr
