"""What this machine gives a model: threads and room for keys and values.

Turns the open choices of a `Deployment` into numbers, once, when a model is opened.
"""

from __future__ import annotations

import os
from pathlib import Path

from snello.engine.pages import Retention
from snello.errors import SnelloError
from snello.models.spec import Deployment, Spec
from snello.native import core

SHARE_OF_FREE_MEMORY = 4  # the default context takes at most a quarter


def physical_cores() -> int:
    """Physical cores that this process may use; hyper-threads count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_siblings(cpu) for cpu in allowed}
    return max(1, len(siblings))


def _siblings(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def free_memory_bytes() -> int:
    """Memory that can be had without swapping (Linux: MemAvailable)."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def choose_threads(deployment: Deployment) -> int:
    return physical_cores() if deployment.threads is None else deployment.threads


def choose_context(deployment: Deployment, spec: Spec, page_bytes: int, retention: Retention) -> int:
    """Positions to make room for: what was asked, else the model's own, else what a quarter of free memory holds.

    `retention` says how many pages a sequence of some length holds.

    Raises:
        SnelloError: more was asked than the model was made for or memory holds.
    """
    page = core.PAGE_POSITIONS
    pages, rows = max(1, free_memory_bytes() // page_bytes), deployment.chunk_rows
    fits, asked = pages * page, deployment.context
    if retention.peak(spec.max_positions, rows) * SHARE_OF_FREE_MEMORY <= pages:  # even the longest sequence
        fits = spec.max_positions * SHARE_OF_FREE_MEMORY
    if asked is None:
        return min(spec.max_positions, max(page, fits // SHARE_OF_FREE_MEMORY))
    if asked > spec.max_positions:
        hint = f"use --context {spec.max_positions} or less"
        raise SnelloError(f"context {asked:,} asked for, and the model was made for {spec.max_positions:,}", hint)
    if asked > fits and retention.peak(asked, rows) > pages:
        needed = retention.peak(asked, rows) * page_bytes
        hint = f"use --context {fits} or an INT8 cache"
        raise SnelloError(f"context {asked:,} needs {needed / 1e9:.1f} GB for keys and values, more than is free", hint)
    return asked


def choose_pages(deployment: Deployment, whole: int, page_bytes: int) -> int:
    """Pages of the cache: for `streams` contexts of `whole` pages, and up to `max_num_seqs` where a quarter of free
    memory holds them.

    Memory that is not used is not taken: a page becomes resident when it is first written.

    Raises:
        SnelloError: not even the streams fit.
    """
    free, streams = free_memory_bytes(), deployment.streams
    if streams > 1 and whole * streams * page_bytes > free:
        needed = f"{whole * streams * page_bytes / 1e9:.1f} GB for keys and values"
        hint = f"at most {max(1, free // (whole * page_bytes)):,} fit, more with a smaller context"
        raise SnelloError(f"streams={streams} needs {needed}, more than is free", hint)
    affordable = free // SHARE_OF_FREE_MEMORY // page_bytes
    return max(whole * streams, min(whole * deployment.max_num_seqs, affordable))
