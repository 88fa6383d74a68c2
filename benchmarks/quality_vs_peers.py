"""Are faster answers also no worse?  Each engine's KL divergence from the original in FP32, beside its speed.

The same real model for everybody, and its twin: a model that computes the same function, in which one channel of a
hundred is louder by a power of two (`tests/twins.py`), as in large models.  Ours is quantized by its defaults, without
calibration, as the peers' exporters do; by GPTQ as well, which is calibrated on text (`--calib`) and they are not.
Every engine is timed in turn and then given held-out text, through the same kernels, cache and types; "ahead" is
faster at a KL that is shown to be no worse.

    snello bench FOLDER --install-peers openvino,llama.cpp,ctranslate2,transformers
    python -m benchmarks.quality_vs_peers --model FOLDER --calib train.txt --text held_out.txt

writes benchmarks/results/quality_vs_peers.json.  Peers live in `build/peers` unless SNELLO_PEERS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from benchmarks.decode_vs_peers import ROOT, bandwidth_now, refuse_noise, save
from benchmarks.quantize_methods import windows
from snello.cli.against import peer_table, quality_table
from snello.interop.huggingface import hf_config, hf_tensors
from snello.measure.peers.comparison import Lengths, compare
from snello.measure.peers.contenders import PEERS, contenders, peers_named, subject_of_model
from snello.measure.peers.conversions import install
from snello.measure.peers.environments import peers_folder
from snello.measure.peers.quality import quality
from snello.models import load
from snello.models.tensor_writer import write_shards
from snello.techniques.base import Context
from snello.techniques.quantize import Quantize
from tests.twins import scaled_channels

RESULTS = ROOT / "benchmarks" / "results" / "quality_vs_peers.json"
CALIBRATION = 24  # windows
MOST_BYTES = 5_000_000_000  # of a file
RECIPES = {
    "int4": Quantize(),
    "int4, groups of 32": Quantize(group_size=32),
    "int4, groups of 32, gptq": Quantize(method="gptq", group_size=32),
    "int8": Quantize(weights="int8"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a checkpoint in Hugging Face format")
    parser.add_argument("--calib", required=True, type=Path, help="text like its own")
    parser.add_argument("--text", required=True, type=Path, help="text that it has not seen")
    parser.add_argument("--only", choices=RECIPES, action="append")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="NAMES")
    parser.add_argument("--prompt", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--generate", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=4, help="each measures every engine twice")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    return parser.parse_args()


def twin_of(checkpoint: Path) -> Path:
    """The twin as a checkpoint of its own, in FP32, written once."""
    path = peers_folder() / "checkpoints" / f"{checkpoint.name}-twin"
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns("*.safetensors*"))
        twin = scaled_channels(load(str(checkpoint)))
        write_shards(partial, *hf_tensors(twin), "fp32", MOST_BYTES)
        (partial / "config.json").write_text(json.dumps(hf_config(twin, "fp32"), indent=2) + "\n")
        partial.rename(path)
    return path


def run(options: argparse.Namespace, name: str, checkpoint: Path, recipe: str) -> None:
    original = load(str(checkpoint))
    folder = peers_folder() / "lean" / f"{name}-{recipe.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    calib = windows(original, options.calib, CALIBRATION) if RECIPES[recipe].method != "rtn" else []
    RECIPES[recipe].apply(original, Context(output=folder, windows=calib))
    peers, subject = peers_named(options.peers), subject_of_model(load(str(folder)), str(folder), str(checkpoint))
    asked = contenders(peers, subject.weights)
    install(peers, asked, subject, print)
    lengths = Lengths(prompt=options.prompt, generate=options.generate, threads=options.threads, rounds=options.rounds)
    read = quality(original, options.text, lengths.prompt, lengths.generate, print)
    result = compare(subject, asked, lengths, lambda: bandwidth_now(lengths.threads), print, read)
    print(f"{name}, {recipe}")
    print("\n".join([*peer_table(result["rows"]), *quality_table(result["rows"])]), flush=True)
    save(RESULTS, (name, recipe), result)


def main() -> None:
    options = parse()
    refuse_noise(options.force)
    for name, checkpoint in ((options.model.name, options.model), ("twin", twin_of(options.model))):
        for recipe in options.only or RECIPES:
            run(options, name, checkpoint, recipe)


if __name__ == "__main__":
    main()
