"""Writes requirements/lock.txt: installs what pyproject.toml asks for into the running (empty) environment, then "
"pins it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

HEADER = """\
# The versions that `make` installs: the base, `optimize`, `serve` and the tools. Rewritten by `make lock`.
# torch is pinned by its public version: with PyTorch's CPU wheels as an extra index pip takes the small CPU build.
"""


def requirements(pyproject: Path) -> list[str]:
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["optimize"], *extras["serve"], *extras["dev"]]


def main(target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *requirements(Path("pyproject.toml"))], check=True)
    frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    pins = [line.split("+")[0] for line in frozen.splitlines()]  # the public version, not a local build's
    target.write_text(HEADER + "\n".join(pins) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
