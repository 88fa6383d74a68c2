"""The environments that peers run in, each apart from the others and from ours.

A peer drags in its own NumPy, its own OpenMP, and for conversion a whole training framework; none of that may reach
the environment under test. So every peer has a virtual environment of its own below `$SNELLO_PEERS` (else `peers` in
the user's cache folder), made from a pinned list in `requirements/`, and only when somebody asks for it. An
environment whose list has not changed is left alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from snello.errors import SnelloError
from snello.measure.machine import cache_folder

HERE = Path(__file__).resolve().parent
MARKER = "made-from.txt"

# llama.cpp is compiled for this machine.  Its AMX path has crashed on machines that have AMX, so it is turned off
# twice: by its own options, and by the compiler flags that `-march=native` would otherwise imply.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
LLAMACPP_CMAKE_ARGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DGGML_AMX_TILE=OFF",
    "-DGGML_AMX_INT8=OFF",
    "-DGGML_AMX_BF16=OFF",
    f"-DCMAKE_C_FLAGS='{NO_AMX}'",
    f"-DCMAKE_CXX_FLAGS='{NO_AMX}'",
    "-DLLAVA_BUILD=OFF",
]

Say = Callable[[str], None]


def peers_folder() -> Path:
    """Environments, converted models, random checkpoints and logs."""
    if named := os.environ.get("SNELLO_PEERS"):
        return Path(named).absolute()
    return cache_folder() / "peers"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One virtual environment: what it holds, how it is built, and the import that proves it."""

    name: str
    proof: str
    from_source: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    same_list_as: str = field(default="", repr=False)  # which environment's list it is made from, if not its own

    @property
    def folder(self) -> Path:
        return peers_folder() / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return HERE / "requirements" / f"{self.same_list_as or self.name}.txt"

    def fingerprint(self) -> str:
        """Changes whenever anything that decides the environment's content changes."""
        text = self.requirements.read_text() + repr(self) + sys.version
        return hashlib.sha256(text.encode()).hexdigest()

    def is_made(self) -> bool:
        marker = self.folder / MARKER
        return marker.exists() and marker.read_text().strip() == self.fingerprint()


LLAMACPP = Environment(
    name="llamacpp",
    proof="import llama_cpp, gguf; llama_cpp.llama_backend_init()",
    from_source=("llama-cpp-python",),
    variables={"CMAKE_ARGS": " ".join(LLAMACPP_CMAKE_ARGS), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
)


def llamacpp_for(isa: str, switches: Mapping[str, str]) -> Environment:
    """llama.cpp compiled for an instruction set instead of this machine, in an environment of its own."""
    arguments = [*LLAMACPP_CMAKE_ARGS, *(f"-D{name}={value}" for name, value in switches.items())]
    variables = {**LLAMACPP.variables, "CMAKE_ARGS": " ".join(arguments)}
    return dataclasses.replace(LLAMACPP, name=f"llamacpp-{isa}", variables=variables, same_list_as=LLAMACPP.name)


OPENVINO = Environment(name="openvino", proof="import openvino_genai")
# Its declared dependency on torchvision serves image models only, and is left out.
OPENVINO_CONVERT = Environment(
    name="openvino-convert",
    proof="import optimum.exporters.openvino, nncf",
    without_dependencies=("optimum-intel==2.2.0",),
)
CTRANSLATE2 = Environment(name="ctranslate2", proof="import ctranslate2")
CTRANSLATE2_CONVERT = Environment(name="ctranslate2-convert", proof="import ctranslate2.converters.transformers")
TRANSFORMERS = Environment(name="transformers", proof="import transformers, torch")
SIZES = {  # on disk, and what it needs to be made
    LLAMACPP.name: "0.2 GB, compiled here for some minutes: needs a C++ compiler and CMake",
    OPENVINO.name: "0.3 GB",
    OPENVINO_CONVERT.name: "1.6 GB, only for conversions",
    CTRANSLATE2.name: "0.2 GB",
    CTRANSLATE2_CONVERT.name: "1.1 GB, only for conversions",
    TRANSFORMERS.name: "1.0 GB",
}


def make(environment: Environment, say: Say) -> None:
    """Makes one environment, or leaves it as it is when its list has not changed.

    Raises:
        SnelloError: the registry cannot be reached, or something does not build.
    """
    if environment.is_made():
        say(f"{environment.name}: up to date in {environment.folder}")
        return
    size = SIZES[environment.same_list_as or environment.name]
    say(f"{environment.name}: making {environment.folder} ({size})")
    environment.folder.parent.mkdir(parents=True, exist_ok=True)
    python = str(environment.python)
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    source = [f"--no-binary={name}" for name in environment.from_source]
    source += ["--no-cache-dir"] if source else []  # pip keeps what it compiled, whatever it was compiled with
    _run(environment, [sys.executable, "-m", "venv", "--clear", str(environment.folder)])
    _run(environment, [*install, *source, "-r", str(environment.requirements)])
    if environment.without_dependencies:
        _run(environment, [*install, "--no-deps", *environment.without_dependencies])
    _run(environment, [python, "-c", environment.proof])
    (environment.folder / MARKER).write_text(environment.fingerprint() + "\n")


def _run(environment: Environment, command: list[str]) -> None:
    """What it prints goes to stderr: stdout is the command line's own."""
    variables = {**os.environ, **environment.variables}
    done = subprocess.run(command, stdout=sys.stderr, env=variables, check=False)
    if done.returncode != 0:
        hint = "what it printed says why; is the package registry reachable, and is there a C++ compiler?"
        raise SnelloError(
            f"{environment.name} was not made: `{shlex.join(command)}` ended with {done.returncode}", hint
        )
