"""The files for supervisors: systemd takes the unit, and the command in each of them is one that `snello` has."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from snello.cli import parser_for
from snello.serve.options import ServeOptions

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


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
