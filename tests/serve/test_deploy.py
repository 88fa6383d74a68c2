"""The files for supervisors: systemd takes the unit, the command in each of them is one that `snello` has, and the
image gets all that the package is built from."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from snello.cli import parser_for
from snello.serve.options import ServeOptions

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed")
    text = (DEPLOY / "snello.service").read_text().replace("/opt/snello/bin/snello", "/bin/true")
    (tmp_path / "snello.service").write_text(text)
    done = subprocess.run([program, "verify", tmp_path / "snello.service"], capture_output=True, text=True)
    assert done.returncode == 0 and "snello.service" not in done.stderr, done.stderr


def test_a_supervisor_waits_longer_than_the_drain() -> None:
    unit = (DEPLOY / "snello.service").read_text()
    found = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert found and int(found[1]) > ServeOptions(models=("demo",)).drain_seconds
    assert "KillSignal=SIGTERM" in unit


def test_their_commands_are_ours() -> None:
    unit, image = (DEPLOY / "snello.service").read_text(), (DEPLOY / "Containerfile").read_text()
    started = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", image, re.MULTILINE)
    assert started and entry
    for words in (shlex.split(started[1]), [*json.loads(entry[1]), "/models", "--keys", "/keys.txt"]):
        parser, rest = parser_for(words[1:])
        arguments = parser.parse_args(rest)
        assert arguments.host == "0.0.0.0" and arguments.port == 8080 and arguments.keys is not None


def test_what_the_package_is_built_from_gets_into_the_image() -> None:
    lines = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, packages = settings["project"], settings["tool"]["scikit-build"]["wheel"]["packages"]
    compiled = re.findall(r"^ +(\w+)/\S+\.cpp$", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    needed = {"CMakeLists.txt", "pyproject.toml", project["readme"], *project["license-files"], *packages, *compiled}
    assert compiled and "*" in lines
    assert needed <= let_in and all((ROOT / name).exists() for name in let_in)
