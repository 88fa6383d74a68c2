"""What this machine can do at best, measured once: bytes a second by working-set size, operations a second by
format.

Every speed stands beside the ceiling computed here. A probe takes a few seconds and is kept in the cache
folder, keyed by processor, cores, core library and threads; its age is said with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snello.measure.sizes import answered_layer, attention_operations, cache_bytes, linear_bytes, linear_operations
from snello.models.spec import Deployment, Spec

LADDER = tuple(2**power for power in (18, 20, 22, 23, 24, 25, 26, 28, 30))  # 256 KiB to 1 GiB
COMPUTE_FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int3")
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
)
ARM_PARTS = {  # of implementer 0x41, by ARM's manuals; others are named by their numbers
    "0xd05": "Cortex-A55",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd49": "Neoverse N2",
    "0xd4f": "Neoverse V2",
    "0xd84": "Neoverse V3",
    "0xd8e": "Neoverse N3",
}
PROBES = 3  # what is measured and how: figures of another way are not read
MAX_AGE_SECONDS = 30 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """This machine as measured: bytes and operations a second, all threads together."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    isa: str
    bandwidth: tuple[tuple[int, float], ...]  # (working set, bytes a second), ascending
    compute: Mapping[str, float] = field(default_factory=dict)
    measured_at: float = 0.0  # seconds since 1970

    @property
    def age_seconds(self) -> float:
        return max(0.0, time.time() - self.measured_at)

    def bandwidth_at(self, working_set: float) -> float:
        """Bytes a second when cycling over `working_set` bytes: straight lines over the logarithm of the
        size.
        """
        points = self.bandwidth
        if working_set <= points[0][0]:
            return points[0][1]
        for (low, slow), (high, fast) in itertools.pairwise(points):
            if working_set <= high:
                share = math.log(working_set / low) / math.log(high / low)
                return slow + share * (fast - slow)
        return points[-1][1]

    def peak(self, arithmetic: str) -> float:
        """Operations a second of this inner loop; a format that was not probed counts as FP32."""
        return self.compute.get(arithmetic) or self.compute.get("fp32", math.inf)

    def better_of(self, other: Machine) -> Machine:
        """The most that either probe saw."""
        before = dict(other.bandwidth)
        bandwidth = tuple((size, max(speed, before.get(size, 0.0))) for size, speed in self.bandwidth)
        names = {*self.compute, *other.compute}
        compute = {name: max(self.compute.get(name, 0.0), other.compute.get(name, 0.0)) for name in sorted(names)}
        return dataclasses.replace(self, bandwidth=bandwidth, compute=compute)

    def to_json(self) -> dict[str, Any]:
        return {
            "cpu": self.cpu,
            "features": list(self.features),
            "cores": self.cores,
            "threads": self.threads,
            "memory_bytes": self.memory_bytes,
            "isa": self.isa,
            "bandwidth": [list(point) for point in self.bandwidth],
            "compute": dict(self.compute),
            "measured_at": self.measured_at,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Machine:
        points = tuple((int(size), float(speed)) for size, speed in value["bandwidth"])
        return cls(**{**value, "features": tuple(value["features"]), "bandwidth": points})

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} cores, {self.isa}, {self.bandwidth[-1][1] / 1e9:.0f} GB/s"


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The most tokens a second that bandwidth and arithmetic allow."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    bytes_per_token: int

    def seconds(self, prompt: int, generate: int) -> float:
        """Of one stream: a prompt, then generate - 1 further tokens."""
        return prompt / self.prefill_tokens_per_second + (generate - 1) / self.decode_tokens_per_second


def ceiling(
    spec: Spec,
    machine: Machine,
    *,
    prompt: int = 512,
    generate: int = 128,
    streams: int = 1,
    measured_bytes: int = 0,
) -> Ceiling:
    """The ceiling of a model of this spec here. `measured_bytes`: an open executor's linears and head."""
    own = linear_bytes(spec)
    linears = measured_bytes or own
    stepped, prompted = (
        linears + linear_bytes(spec, rows) - own for rows in (streams, prompt)
    )  # more rows, more experts
    context = prompt + generate // 2
    cached = cache_bytes(spec, context)
    decode = (stepped + streams * cached) / machine.bandwidth_at(stepped + streams * cached)
    decode = max(decode, streams * _row_seconds(spec, machine, context, answers=1.0))
    prefill = prompted / machine.bandwidth_at(prompted + streams * cached)
    prefill = max(prefill, prompt * _row_seconds(spec, machine, prompt / 2, answers=1.0 / prompt))
    return Ceiling(
        prefill_tokens_per_second=prompt / prefill,
        decode_tokens_per_second=streams / decode,
        bytes_per_token=linears + cached,
    )


def _row_seconds(spec: Spec, machine: Machine, context: float, *, answers: float) -> float:
    """Arithmetic of one row; `answers`: the share of rows whose answer is wanted."""
    seconds = 0.0
    for key, operations in linear_operations(spec).items():
        share = answers if key.startswith("answers:") else 1.0
        seconds += share * operations / machine.peak(key.removeprefix("answers:"))
    cached = "int8" if spec.cache_format == "int8" else "fp32"
    attended = attention_operations(spec, context)
    attended -= (1.0 - answers) * attention_operations(answered_layer(spec), context)
    return seconds + attended / machine.peak(cached)


def machine(*, threads: int | None = None, refresh: bool = False) -> Machine:
    """This machine, from the cache if it was probed in the last 30 days by this core with as many threads.

    `refresh` probes again and keeps the better of both: a busy machine shows less than it can, never more.
    """
    from snello.engine.resources import choose_threads
    from snello.native import core

    threads = choose_threads(Deployment(threads=threads))
    isa = core.select_isa(None)
    path = _path(isa, threads)
    known = _read(path)
    if known is not None and known.age_seconds >= MAX_AGE_SECONDS:
        known = None
    if known is not None and not refresh:
        return known
    probed = probe(threads, isa)
    probed = probed if known is None else probed.better_of(known)
    _write(path, probed)
    return probed


def known_machine(threads: int, isa: str) -> Machine | None:
    """This machine as it was probed before, however long ago; None: never. Costs nothing."""
    return _read(_path(isa, threads))


def probe_again(known: Machine) -> Machine:
    """Probes once more and keeps the better of both figures: for when something here ran faster than `known` allows.

    A probe that shared the machine with other work sees too little; a ceiling is the most that was ever seen.
    """
    better = probe(known.threads, known.isa).better_of(known)
    _write(_path(known.isa, known.threads), better)
    return better


def probe(threads: int, isa: str) -> Machine:
    """Measures now; a few seconds."""
    from snello.engine.resources import free_memory_bytes
    from snello.native import core

    room = free_memory_bytes() // 4
    pool = core.Pool(threads)
    try:
        sizes = [size for size in LADDER if size <= max(room, LADDER[0])]
        bandwidth = tuple((size, 1e9 * core.probe_bandwidth(pool, size, _repeats(size))) for size in sizes)
        compute = {name: 1e9 * core.probe_compute(pool, name, 3) for name in COMPUTE_FORMATS}
    finally:
        pool.close()
    return Machine(
        cpu=cpu_name(),
        features=cpu_features(),
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_bytes=memory_bytes(),
        isa=isa,
        bandwidth=bandwidth,
        compute={name: speed for name, speed in compute.items() if speed > 0},
        measured_at=time.time(),
    )


def bandwidth_now(threads: int, working_set: int) -> float:
    """Bytes a second at this moment, cycling over so many bytes: other tenants of a machine move it by half."""
    from snello.native import core

    size = min(max(working_set, LADDER[0]), LADDER[-1])
    pool = core.Pool(threads)
    try:
        return 1e9 * core.probe_bandwidth(pool, size, _repeats(size))
    finally:
        pool.close()


def _repeats(size: int) -> int:
    """Many for what a cache holds, three for what memory holds."""
    return max(3, min(64, (1 << 28) // size))


def cache_folder() -> Path:
    """`SNELLO_CACHE`, else the user's cache folder."""
    if named := os.environ.get("SNELLO_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snello"


def _path(isa: str, threads: int) -> Path:
    from snello.native import core

    return cache_folder() / f"machine-{_key(isa, core.ABI_VERSION, threads)}.json"


def _key(isa: str, abi: int, threads: int) -> str:
    facts = f"{PROBES}|{cpu_name()}|{os.cpu_count()}|{isa}|{abi}|{threads}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _read(path: Path) -> Machine | None:
    try:
        return Machine.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, probed: Machine) -> None:
    """A cache that cannot be written costs a probe next time and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(probed.to_json(), indent=1))
        os.replace(partial, path)
    except OSError:
        return


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name() -> str:
    """ "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", or what the platform calls it."""
    found = _cpuinfo()
    return (
        found.get("model name") or found.get("Model") or _arm_name(found) or platform.processor() or platform.machine()
    )


def _arm_name(cpuinfo: Mapping[str, str]) -> str:
    """ARM's own cores by name: Linux tells numbers only."""
    implementer, part = cpuinfo.get("CPU implementer"), cpuinfo.get("CPU part")
    if not implementer or not part:
        return ""
    known = ARM_PARTS.get(part) if implementer == "0x41" else None
    return f"ARM {known}" if known else f"ARM {implementer}, part {part}"


def cpu_features() -> tuple[str, ...]:
    """The instruction sets among `FEATURES` that this processor names."""
    found = _cpuinfo()
    flags = set((found.get("flags") or found.get("Features") or "").split())
    return tuple(name for name in FEATURES if name in flags)


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's limit."""
    total = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit)) if limit.isdigit() else total
    except OSError:
        return total
