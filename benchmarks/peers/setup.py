"""Makes the environments that the peer engines run in, each apart from the others and from ours.

A peer drags in its own NumPy, its own OpenMP, and for conversion a whole training framework; none of that may reach
the environment under test.  So every peer has a virtual environment of its own under `build/peers/`, made here from
a pinned list beside this file.  An environment whose list has not changed is left alone.

    python -m benchmarks.peers.setup                    # all of them
    python -m benchmarks.peers.setup llamacpp openvino  # some of them
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = ROOT / "build" / "peers"
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


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One virtual environment: what it holds, how it is built, and the import that proves it."""

    name: str
    proof: str
    from_source: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return PEERS / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return HERE / f"requirements-{self.name}.txt"

    def fingerprint(self) -> str:
        """Changes whenever anything that decides the environment's content changes."""
        text = self.requirements.read_text() + repr(self) + sys.version
        return hashlib.sha256(text.encode()).hexdigest()

    def is_made(self) -> bool:
        marker = self.folder / MARKER
        return marker.exists() and marker.read_text().strip() == self.fingerprint()


ENVIRONMENTS = (
    Environment(
        name="llamacpp",
        proof="import llama_cpp, gguf; llama_cpp.llama_backend_init()",
        from_source=("llama-cpp-python",),
        variables={"CMAKE_ARGS": " ".join(LLAMACPP_CMAKE_ARGS), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
    ),
    Environment(name="openvino", proof="import openvino_genai"),
    # Its declared dependency on torchvision serves image models only, and is left out.
    Environment(
        name="openvino-convert",
        proof="import optimum.exporters.openvino, nncf",
        without_dependencies=("optimum-intel==2.2.0",),
    ),
)


def pip(environment: Environment, *arguments: str) -> None:
    """Runs pip inside the environment, with the variables its builds need."""
    command = [str(environment.python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **environment.variables})


def make(environment: Environment) -> None:
    """Makes one environment, or leaves it as it is when its list has not changed."""
    if environment.is_made():
        print(f"{environment.name}: up to date", flush=True)
        return
    print(f"{environment.name}: making {environment.folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment.folder)], check=True)
    source = [f"--no-binary={name}" for name in environment.from_source]
    pip(environment, *source, "-r", str(environment.requirements))
    if environment.without_dependencies:
        pip(environment, "--no-deps", *environment.without_dependencies)
    subprocess.run([str(environment.python), "-c", environment.proof], check=True)
    (environment.folder / MARKER).write_text(environment.fingerprint() + "\n")


def main() -> None:
    names = [environment.name for environment in ENVIRONMENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="NAME", help=f"which to make, of: {', '.join(names)}")
    chosen = set(parser.parse_args().environments) or set(names)
    if unknown := chosen - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    for environment in ENVIRONMENTS:
        if environment.name in chosen:
            make(environment)


if __name__ == "__main__":
    main()
