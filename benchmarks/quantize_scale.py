"""Does quantizing a model of a published size stay within time and memory?

    python -m benchmarks.quantize_scale --shape qwen3-0.6b --method gptq --tokens 32768
    python -m benchmarks.quantize_scale --shape llama-3.2-1b --method rtn
    python -m benchmarks.quantize_scale --shape llama-3.2-1b --method rtn --optimize --text TEXT --tokenizer FILE

Random BF16 weights of that shape are quantized to INT4 (head and embedding INT8) by a fresh process, whose seconds and
peak memory are kept in benchmarks/results/quantize_scale.json. Random weights and random calibration tokens cost what
real ones do: no step of a method depends on values. The bound on memory is the largest layer's working set, its
weights in FP32, times 1.3, plus 2 GB. Beside the peak of all resident pages stands that of anonymous memory: pages of
the mapped source are given back when anybody needs the room. With `--optimize` the whole proof is made: that one step
is judged on the text, timed, and published. Only the original inside Transformers is left out: that is a second copy of
the whole model. The shape gets a real tokenizer, since two texts in bytes have everything in common. With `--keep` that
run stays in a folder: one that was interrupted (Ctrl-C) goes on, its peaks are the largest and its seconds the sum of
all parts. With `--group`, a memory cgroup that is there for it, the process and all that it starts get the bound and no
byte more, pages of files included: what has to be read again costs time, what cannot be given back ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode_vs_peers import ROOT, refuse_noise
from snello.measure.machine import cpu_name
from snello.measure.peers.checkpoint import shape_of, write_checkpoint
from snello.measure.peers.environments import peers_folder
from snello.measure.reference import largest_part
from snello.models import load
from snello.models.shapes import SHAPES, random_model, spec_of_shape
from snello.models.spec import Spec

RESULTS = ROOT / "benchmarks" / "results" / "quantize_scale.json"
WINDOW = 1024
SAMPLE_SECONDS = 0.02
READ = {"select_tokens": 8192, "proof_tokens": 8192}  # what random weights say of more text is no wiser
PROOF = ("text", "tokenizer", "time-budget")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--method", default="rtn", choices=("rtn", "hqq", "awq", "gptq"))
    parser.add_argument("--tokens", type=int, default=32 * WINDOW, help="of calibration, where the method looks at any")
    parser.add_argument("--optimize", action="store_true", help="the whole proof, not the step alone")
    parser.add_argument("--text", type=Path, help="that --optimize is judged on")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, for --optimize")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shared", action="store_true", help="say in the result that others used the cores too")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine all the same")
    parser.add_argument("--time-budget", type=float, default=1800.0, metavar="SECONDS", help="of --optimize")
    parser.add_argument("--keep", type=Path, help="a folder for the run of --optimize, from which it goes on")
    parser.add_argument("--group", type=Path, help="folder of a memory cgroup, to run in with the bound as limit")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.optimize and (options.text is None or options.tokenizer is None):
        parser.error("--optimize needs --text and --tokenizer")
    if options.worker:
        if options.group:
            confine(options.group, memory_bound(spec_of_shape(options.shape)))
        print(json.dumps(prove(options) if options.optimize else work(options)))
        return
    refuse_noise(options.force)
    if not options.optimize:
        random_model(options.shape, "bf16")  # made once, and kept: not part of the time
    found = fresh(options)
    if found.get("exit") == 130:
        sys.exit("interrupted; the same command goes on from here")
    command = f"python -m benchmarks.quantize_scale --shape {options.shape} --method {options.method}"
    calibrates = options.method in ("awq", "gptq")
    facts = {
        "command": command
        + (f" --tokens {options.tokens}" if calibrates else "")
        + (f" --optimize --text {options.text} --tokenizer {options.tokenizer}" if options.optimize else "")
        + (f" --time-budget {options.time_budget:g}" if options.time_budget != 1800 else ""),
        "when": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "threads": options.threads,
        "cores_shared_with_others": options.shared,
        "confined": options.group is not None,
        "calibration_tokens": options.tokens if calibrates else 0,
    }
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    row = f"{options.shape}, {options.method}" + (", optimize" if options.optimize else "")
    rows[row] = {**facts, **found}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows[row]))


def fresh(options: argparse.Namespace) -> dict[str, Any]:
    """The same options in a process of their own."""
    with kept_folder(options.keep) as folder:
        arguments = [f"--{name}={getattr(options, name)}" for name in ("shape", "method", "tokens", "threads")]
        arguments += (
            ["--optimize", *(f"--{name}={getattr(options, name.replace('-', '_'))}" for name in PROOF)]
            if options.optimize
            else []
        )
        arguments += [f"--group={options.group}"] if options.group else []
        command = [sys.executable, "-m", "benchmarks.quantize_scale", *arguments, "--worker", f"{folder}/lean"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        apart: dict[str, Any] = {"cwd": ROOT, "env": environment, "start_new_session": True}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **apart) as worker:
            signal.signal(signal.SIGINT, lambda *_: worker.send_signal(signal.SIGINT))  # once: it finishes what it does
            assert worker.stdout is not None
            said = worker.stdout.read()
        if worker.returncode:
            raise subprocess.CalledProcessError(worker.returncode, command)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def kept_folder(folder: Path | None) -> AbstractContextManager[Any]:
    if folder is None:
        return tempfile.TemporaryDirectory()
    folder.mkdir(parents=True, exist_ok=True)
    return nullcontext(folder.resolve())


def work(options: argparse.Namespace) -> dict[str, Any]:
    from snello.techniques.base import Context
    from snello.techniques.quantize import Quantize

    model = random_model(options.shape, "bf16")
    random = np.random.default_rng(0)
    windows = [
        random.integers(0, model.spec.vocab_size, WINDOW).astype(np.int32) for _ in range(options.tokens // WINDOW)
    ]
    context = Context(output=options.worker, windows=windows, threads=options.threads, progress=say)
    watch = Watch()
    begin = time.perf_counter()
    lean = Quantize(method=options.method).apply(model, context)
    seconds = time.perf_counter() - begin
    bound = memory_bound(model.spec)
    return {
        "seconds": round(seconds, 1),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_anonymous_bytes": watch.stop(),
        "bound_bytes": bound,
        "weights_bytes": sum(file.stat().st_size for file in lean.files),
    }


def prove(options: argparse.Namespace) -> dict[str, Any]:
    from snello.optimize import run
    from snello.optimize.recipe import Recipe, Stage, Step
    from snello.optimize.workbench import NativeWorkbench

    class Bench(NativeWorkbench):
        def transformers(self, *_: Any) -> str:
            return "left out: its copy of the model is not ours to bound"

    folder = with_tokenizer(options.shape, options.tokenizer, options.worker.with_name("original"))
    step = Step("quantize", {"weights": "int4", "method": options.method})
    recipe = Recipe(stages=(Stage(f"int4, {options.method}", (step,)),), data=READ)
    wishes = {"recipe": recipe, "text": options.text, "max_loss": "50%", "time_budget": options.time_budget}
    wishes |= {"goal": "memory"}
    watch = Watch()
    begin = time.perf_counter()
    result = run.run(folder, output=options.worker, workbench=Bench(options.threads), on_event=tell, **wishes)
    found = {
        "seconds": round(time.perf_counter() - begin, 1),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_anonymous_bytes": watch.stop(),
    }
    parts = options.worker.with_name("parts.json")  # of a run that was interrupted
    every = [found, *(json.loads(parts.read_text()) if parts.exists() else [])]
    parts.write_text(json.dumps(every))
    return {
        "exit": result.exit_code,
        "sentence": result.sentence,
        "seconds": round(sum(part["seconds"] for part in every), 1),
        "parts": len(every),
        **{peak: max(part[peak] for part in every) for peak in ("peak_resident_bytes", "peak_anonymous_bytes")},
        "bound_bytes": memory_bound(load(folder).spec),
    }


def with_tokenizer(shape: str, tokenizer: Path, folder: Path) -> Path:
    """The random checkpoint of this shape, made once and kept, with links to its files, and this tokenizer."""
    made = peers_folder() / "checkpoints" / shape
    if not made.is_dir():
        write_checkpoint(shape_of(shape), made)
    folder.mkdir(exist_ok=True)
    files = {name: made / name for name in ("config.json", "model.safetensors")}
    for name, file in {**files, "tokenizer.json": tokenizer.resolve()}.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(file)
    return folder


def tell(event: Any) -> None:
    if event.name == "stage_judged":
        print(f"{event.used_seconds:6.1f} s  {event.row.name}: {event.row.verdict} {event.row.reason}", file=sys.stderr)


def say(message: str, fraction: float) -> None:
    print(f"{fraction:4.0%} {message}", file=sys.stderr, flush=True)


def memory_bound(spec: Spec) -> int:
    """The law: the largest layer's weights in FP32 times 1.3, plus 2 GB; the head is a layer."""
    return int(1.3 * 4 * largest_part(spec) + 2e9)


def confine(group: Path, most: int) -> None:
    """This process and its children get so many bytes of memory, by Linux's cgroups of either version."""
    limit = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
    (group / limit).write_text(f"{most}\n", encoding="ascii")
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n", encoding="ascii")


class Watch:
    """The most anonymous memory of this process, looked at often."""

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak

    def _look(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * int(line.split()[1]))


if __name__ == "__main__":
    main()
