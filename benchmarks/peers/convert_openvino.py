"""Turns a checkpoint into what OpenVINO GenAI loads, by the engine's own exporter and weight compression.

Nothing is tuned here beyond what the exporter offers on its command line.  By its defaults it keeps the embedding and
the output head in eight bits; `--all-layers` variants put them in four as well, which reads fewer bytes per token.

    python -m benchmarks.peers.convert_openvino tinyllama-1.1b int4 int8
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess

from benchmarks.peers.checkpoint import CHECKPOINTS, SHAPES
from benchmarks.peers.setup import PEERS

MODELS = PEERS / "models" / "openvino"
EXPORTER = PEERS / "openvino-convert" / "bin" / "optimum-cli"

INT4 = ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0"]
VARIANTS = {
    "int4": [*INT4, "--sym"],
    "int4-all": [*INT4, "--sym", "--all-layers"],
    "int4-asym": INT4,  # the exporter's own choice where `--sym` is not given
    "int8": ["--weight-format", "int8"],
}


def convert(shape: str, variant: str) -> None:
    """One export; it takes its final name only when complete."""
    folder = MODELS / f"{shape}-{variant}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = [str(EXPORTER), "export", "openvino", "--model", str(CHECKPOINTS / shape), *VARIANTS[variant]]
    command += ["--task", "text-generation-with-past", str(partial)]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    subprocess.run(command, check=True, env={**os.environ, **offline})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("variants", nargs="*", default=[*VARIANTS], help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--force", action="store_true", help="convert again what is there already")
    options = parser.parse_args()
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    if not EXPORTER.exists():
        raise SystemExit("make the exporter first:\n  python -m benchmarks.peers.setup openvino-convert")
    if not (CHECKPOINTS / options.shape).exists():
        raise SystemExit(f"make the checkpoint first:\n  python -m benchmarks.peers.checkpoint {options.shape}")
    for variant in options.variants:
        folder = MODELS / f"{options.shape}-{variant}"
        if folder.exists() and not options.force:
            print(f"{folder}: there already", flush=True)
            continue
        convert(options.shape, variant)
        print(f"{folder}: written", flush=True)


if __name__ == "__main__":
    main()
