"""How much memory serving takes: the peak resident bytes of a fresh process that opens a model and answers.

Only a fresh process says it honestly: in ours, other models and the allocator's habits would count too. Memory-mapped
weights count once they are read, which serving does. Run as `python -m snello.measure.memory MODEL`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snello.errors import SnelloError

if TYPE_CHECKING:
    from snello.measure.speed import Workload
    from snello.models.model import Model


def resident_bytes(name: str = "VmRSS") -> int:
    """Of this process now ("VmRSS") or at its peak ("VmHWM")."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_while_serving(model: Path, *, threads: int | None = None, timeout_seconds: float = 600.0) -> int:
    """Peak resident bytes of a fresh process that answers one prompt with this model."""
    command = [sys.executable, "-m", "snello.measure.memory", str(model), str(threads or 0)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise SnelloError(f"serving {model} took over {timeout_seconds:.0f} s", "give more time") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise SnelloError(f"serving {model} failed: {last}", f"try it yourself: snello run {model}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_resident_bytes"])


def serve_once(model: str, threads: int | None) -> dict[str, int]:
    """Opens the model, answers one prompt of the standard workload, and reports this process."""
    from snello.engine.native import NativeExecutor
    from snello.measure.speed import Clock, Workload
    from snello.models import load
    from snello.models.spec import Deployment

    loaded = load(model)
    workload = Workload.fitting(loaded.spec)
    context = workload.prompt + workload.generate if loaded.spec.causal else None
    if loaded.draft is not None:
        return _serve_pair(loaded, workload, threads)
    with NativeExecutor(loaded, Deployment(threads=threads, context=context)) as executor:
        Clock(executor, workload).latency()
        return {"peak_resident_bytes": resident_bytes("VmHWM"), "resident_bytes": resident_bytes()}


def _serve_pair(model: Model, workload: Workload, threads: int | None) -> dict[str, int]:
    """The same where another model drafts: both answer, so both are there."""
    from snello.engine.llm import LLM
    from snello.engine.request import SamplingParams

    prompt = np.random.default_rng(0).integers(0, model.spec.vocab_size, workload.prompt).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=workload.generate, ignore_eos=True)
    with LLM(model, threads=threads, context=workload.prompt + workload.generate, max_num_seqs=1) as llm:
        llm.answer(prompt, params)
        return {"peak_resident_bytes": resident_bytes("VmHWM"), "resident_bytes": resident_bytes()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(serve_once(sys.argv[1], int(sys.argv[2]) or None)) + "\n")
