"""Does Snello decode one stream faster than its peers on this machine, and how near is each to the memory's limit?

Every engine runs the same checkpoint's shape in a worker of its own, all loaded at once, and is measured in turn
(`snello/measure/peers`).  Beside each speed stand the bytes it reads per token and the share of the memory bandwidth,
which a program that belongs to no engine measures right before and right after each turn: other tenants of a machine
move it by half within seconds.  Attention's cache is left out of the bytes: at these lengths it is under one percent.

    snello bench --shape tinyllama-1.1b --weights int4 --install-peers openvino,llama.cpp     and int4-all, and int8
    python -m benchmarks.decode_vs_peers --shape tinyllama-1.1b

Peers live in `build/peers` unless SNELLO_PEERS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from snello.cli.against import peer_table
from snello.errors import SnelloError
from snello.measure.peers.checkpoint import shapes
from snello.measure.peers.comparison import Lengths, compare
from snello.measure.peers.contenders import PEERS, Contender, contenders, peers_named, subject_of_shape
from snello.measure.peers.conversions import check
from snello.measure.peers.holding import ONEDNN
from snello.native import core

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "decode_vs_peers.json"
BANDWIDTH = ROOT / "build" / "bandwidth" / "bandwidth"
QUIET_LOAD = 0.7
WEIGHTS = ("int4", "int4-all", "int8")

os.environ.setdefault("SNELLO_PEERS", str(ROOT / "build" / "peers"))


def refuse_noise(force: bool) -> None:
    """Timing beside other work measures the other work."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD and not force:
        raise SystemExit(
            f"the machine is busy: its one-minute load is {load:.2f}, above {QUIET_LOAD}. "
            "Wait until it is quiet, or pass --force and distrust the figures."
        )


def measure_bandwidth(*, mebibytes: int = 1024, repeats: int = 15) -> list[dict[str, Any]]:
    """GB/s of the independent program, built first if need be; one entry per way of reading."""
    subprocess.run(["make", "--silent", "-C", str(ROOT / "benchmarks" / "bandwidth")], check=True)
    command = [str(BANDWIDTH), str(mebibytes), str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    entries: list[dict[str, Any]] = json.loads(done.stdout)["gigabytes_per_second"]
    return entries


def bandwidth_now(threads: int) -> float:
    """GB/s at this moment with that many threads, or as many as the program has: its best way of reading."""
    entries = measure_bandwidth(mebibytes=512, repeats=3)
    most = min(threads, max(entry["threads"] for entry in entries))
    return max(float(entry["median"]) for entry in entries if entry["threads"] == most)


def run(shape: str, chosen: list[Contender], lengths: Lengths) -> dict[str, Any]:
    """One comparison, its table on stdout."""
    try:
        for one in chosen:
            check(subject_of_shape(shape, one.weights), [one])
        subject = subject_of_shape(shape, chosen[0].weights)
        result = compare(subject, chosen, lengths, lambda: bandwidth_now(lengths.threads), say)
    except SnelloError as error:
        raise SystemExit(f"{error.message}\n  {error.hint}") from None
    print(f"{shape}: prompt {lengths.prompt}, answer {lengths.generate}, {lengths.streams} at once")
    limit = result["bandwidth_gigabytes_per_second"]
    read = f"{limit['median']:.1f} GB/s ({limit['min']:.1f}-{limit['max']:.1f})"
    print(f"memory read by the independent program meanwhile: {read}")
    print("\n".join(peer_table(result["rows"])))
    forced = [f"SNELLO_ISA={isa}"] if (isa := os.environ.get("SNELLO_ISA")) else []
    command = [*forced, "python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    return {"command": shlex.join(command), **result}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def place_of(shape: str, held: str | None = None) -> str:
    """A shape's name in the results: one place for each instruction set of ours, which decides what can be compared,
    and for each that all are held to.
    """
    if held:
        return f"{shape}, all {held}"
    isa = core.select_isa(None)
    return shape if isa == "avx512vnni" and not os.environ.get("SNELLO_ISA") else f"{shape}, {isa}"


def save(path: Path, names: tuple[str, ...], result: dict[str, Any]) -> None:
    """Puts the result below these names and keeps the others that the file holds."""
    whole = json.loads(path.read_text()) if path.exists() else {}
    place = whole
    for name in names[:-1]:
        place = place.setdefault(name, {})
    place[names[-1]] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps({"results": str(path)}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes(), default="tinyllama-1.1b")
    parser.add_argument("--engines", nargs="+", metavar="ENGINE", help="snello-int4 openvino-int4-f32 ... [all]")
    parser.add_argument("--isa", choices=ONEDNN, help="hold all to these instructions (SNELLO_ISA holds ours alone)")
    parser.add_argument("--rounds", type=int, default=5, help="each measures every engine twice")
    parser.add_argument("--prompt", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--generate", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    return parser.parse_args()


def main() -> None:
    options = parse()
    peers = peers_named(",".join(PEERS), options.isa)
    everybody = {one.name: one for weights in WEIGHTS for one in contenders(peers, weights)}
    if unknown := set(options.engines or ()) - everybody.keys():
        raise SystemExit(f"not an engine: {', '.join(sorted(unknown))}\n  choose from: {', '.join(everybody)}")
    refuse_noise(options.force)
    lengths = Lengths(
        prompt=options.prompt,
        generate=options.generate,
        threads=options.threads,
        rounds=options.rounds,
        seed=options.seed,
    )
    save(
        options.out,
        (place_of(options.shape, options.isa),),
        run(options.shape, [everybody[name] for name in options.engines or everybody], lengths),
    )


if __name__ == "__main__":
    main()
