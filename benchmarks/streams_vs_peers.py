"""Does Snello answer many at once, and read long prompts, faster than its peers on this machine?

A row is one number of streams, each with a prompt of its own, or the prompt alone; each row is a comparison of its own
in which all engines are loaded and run in turn (`snello/measure/peers`), and a row that is measured again replaces
the one before.  The bytes are those of the weights, once a step for all streams; attention's cache is left out.

    python -m benchmarks.streams_vs_peers                   every row
    python -m benchmarks.streams_vs_peers --streams 8       one of them
    python -m benchmarks.streams_vs_peers --prefill         the prompt alone
    python -m benchmarks.streams_vs_peers --weights bf16 --streams 1 --peers transformers,llama.cpp

Peers live in `build/peers` unless SNELLO_PEERS says otherwise.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.decode_vs_peers import ROOT, WEIGHTS, place_of, refuse_noise, run, save
from snello.measure.peers.checkpoint import shapes
from snello.measure.peers.comparison import Lengths
from snello.measure.peers.contenders import contenders, peers_named
from snello.measure.peers.holding import ONEDNN

RESULTS = ROOT / "benchmarks" / "results" / "streams_vs_peers.json"
STREAMS = (1, 8, 16, 32)
PROMPT = 512
PREFILL_ANSWER = 2  # tokens: what comes after the first is not looked at


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes(), default="tinyllama-1.1b")
    parser.add_argument("--weights", choices=(*WEIGHTS, "bf16"), default="int4")
    parser.add_argument("--cache", choices=("int8",), help="our keys and values [BF16]; OpenVINO's are INT8 by default")
    parser.add_argument("--isa", choices=ONEDNN, help="hold all to these instructions (SNELLO_ISA holds ours alone)")
    parser.add_argument("--peers", default="openvino,llama.cpp", metavar="NAMES")
    parser.add_argument("--streams", type=int, nargs="+", metavar="N", help="only these rows")
    parser.add_argument("--prefill", action="store_true", help="the row of the prompt alone")
    parser.add_argument("--rounds", type=int, default=2, help="each measures every engine twice")
    parser.add_argument("--prompt", type=int, default=PROMPT, metavar="TOKENS")
    parser.add_argument("--generate", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    return parser.parse_args()


def rows(options: argparse.Namespace) -> dict[str, Lengths]:
    """The lengths of each row that was asked for, by its name."""
    everything = not options.prefill and options.streams is None
    shared = {"prompt": options.prompt, "threads": options.threads, "rounds": options.rounds, "seed": options.seed}
    longer = "" if options.prompt == PROMPT else f"-after-{options.prompt}"
    cached = f"-kv-{options.cache}" if options.cache else ""
    asked = {
        f"decode-{streams}{longer}{cached}": Lengths(generate=options.generate, streams=streams, **shared)
        for streams in (STREAMS if everything else options.streams or ())
    }
    if everything or options.prefill:
        asked[f"prefill-{options.prompt}{cached}"] = Lengths(generate=PREFILL_ANSWER, **shared)
    return asked


def main() -> None:
    options = parse()
    refuse_noise(options.force)
    chosen = contenders(peers_named(options.peers, options.isa), options.weights, options.cache)
    place = place_of(options.shape, options.isa)
    for name, lengths in rows(options).items():
        save(options.out, (place, options.weights, name), run(options.shape, chosen, lengths))


if __name__ == "__main__":
    main()
