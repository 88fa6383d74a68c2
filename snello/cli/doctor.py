"""`snello doctor`: this machine, its ceilings, which kernel serves what, and what the environment changes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from typing import Any

from snello.cli.options import of_deployment
from snello.report import numbers
from snello.terminal import Terminal, table

EXAMPLES = ("snello doctor", "snello doctor --refresh --json")

VARIABLES = {  # name -> (what it changes, whether its value may be shown)
    "SNELLO_CACHE": ("folder of packed models and of this machine's measurements", True),
    "SNELLO_PEERS": ("folder of the engines that bench --against compares with", True),
    "SNELLO_ISA": ("instruction set of the core, instead of the best", True),
    "HF_HOME": ("folder of downloaded models", True),
    "HF_TOKEN": ("access to private models", False),
    "HF_HUB_OFFLINE": ("1: never download", True),
}
AMX = {
    "absent": "not on this processor",
    "refused": "on this processor; the operating system does not give it to programs",
    "failed": "on this processor, but products went wrong while others ran: not used",
    "trusted": "tried under load: every product was right",
}
HALVES = "bf16 linears with bf16 inputs"
KERNELS = {  # instruction set -> (operation, how)
    "amx": (
        ("int3, int4 and int8 linears", "AMX tiles, 32 rows and 32 outputs at once"),
        (HALVES, "AMX tiles, as above"),
        ("fp32, fp16, bf16 linears", "AVX-512 fused multiply-add, widened exactly"),
        ("attention, int8 keys and values", "AMX tiles; VNNI dot products where a head is not a multiple of 64"),
        ("attention, float keys and values", "AVX-512 fused multiply-add"),
        ("norms, activations, rotations, sampling", "AVX-512"),
    ),
    "avx512vnni": (
        ("int3, int4 and int8 linears", "VNNI dot products, 16 rows of weights at once"),
        (HALVES, "dot products of pairs; one row by fused multiply-add"),
        ("fp32, fp16, bf16 linears", "AVX-512 fused multiply-add, widened exactly"),
        ("attention, int8 keys and values", "VNNI dot products"),
        ("attention, float keys and values", "AVX-512 fused multiply-add"),
        ("norms, activations, rotations, sampling", "AVX-512"),
    ),
    "avxvnni": (
        ("int3, int4 and int8 linears", "VNNI dot products in 256 bits"),
        ("fp32, fp16, bf16 linears", "AVX2 fused multiply-add, widened exactly"),
        ("attention, int8 keys and values", "VNNI dot products in 256 bits"),
        ("attention, float keys and values", "AVX2 fused multiply-add"),
        ("norms, activations, rotations, sampling", "AVX2"),
    ),
    "avx2": (
        ("int3, int4 and int8 linears", "AVX2 integer products, exact"),
        ("fp32, fp16, bf16 linears", "AVX2 fused multiply-add, widened exactly"),
        ("attention, int8 keys and values", "AVX2 integer products, exact"),
        ("attention, float keys and values", "AVX2 fused multiply-add"),
        ("norms, activations, rotations, sampling", "AVX2"),
    ),
    "neon-i8mm": (
        ("int3, int4 and int8 linears", "SMMLA, two rows times two outputs at once; SDOT for one or two rows"),
        ("fp32, fp16, bf16 linears", "Advanced SIMD fused multiply-add, widened exactly"),
        ("attention, int8 keys and values", "SDOT and USDOT"),
        ("attention, float keys and values", "Advanced SIMD fused multiply-add"),
        ("norms, activations, rotations, sampling", "Advanced SIMD"),
    ),
    "neon-dotprod": (
        ("int3, int4 and int8 linears", "SDOT"),
        ("fp32, fp16, bf16 linears", "Advanced SIMD fused multiply-add, widened exactly"),
        ("attention, int8 keys and values", "SDOT"),
        ("attention, float keys and values", "Advanced SIMD fused multiply-add"),
        ("norms, activations, rotations, sampling", "Advanced SIMD"),
    ),
    "scalar": (("every operation", "portable C++, the same bits, slow"),),
}
EXTRAS = {  # extra -> the modules it needs
    "optimize": ("torch", "transformers", "accelerate", "safetensors"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refresh", action="store_true", help="measure again, instead of reading the kept numbers")
    parser.add_argument("--threads", type=of_deployment("threads"), help="threads to measure with [the physical cores]")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from snello import __version__
    from snello.measure.machine import machine
    from snello.native import core

    terminal.footer(["measuring this machine: a few seconds, once"])
    here = machine(threads=arguments.threads, refresh=arguments.refresh)
    terminal.clear_footer()
    available = core.available_isas()
    facts = [
        ("snello", f"{__version__}, Python {platform.python_version()}"),
        ("processor", f"{here.cpu}, {here.cores} cores"),
        ("memory", numbers.size(here.memory_bytes)),
        ("threads", str(here.threads)),
        ("instruction set", f"{here.isa} (of {', '.join(available)})"),
        ("also here", ", ".join(here.features) or "-"),
        ("AMX", AMX[core.amx_status()]),
    ]
    speeds = [(f"reading {_binary(size)}", f"{speed / 1e9:.1f} GB/s") for size, speed in here.bandwidth]
    speeds += [(f"{name} products", f"{speed / 1e9:,.0f} GOP/s") for name, speed in here.compute.items()]
    how = kernels(here.isa, multiplies_bf16=core.multiplies_bf16())
    sections = {
        "this machine": facts,
        f"ceilings, {here.threads} threads, measured {_age(here.age_seconds)}": speeds,
        "kernels": list(how.items()),
        "environment": [(name, _variable(name)) for name in VARIABLES],
        "extras": [(name, _extra(name)) for name in EXTRAS],
    }
    for title, rows in sections.items():
        terminal.product(title)
        terminal.product("\n".join(table(rows, indent="  ")) + "\n")
    return {
        "version": __version__,
        "machine": here.to_json(),
        "isa_available": list(available),
        "amx": core.amx_status(),
        "kernels": how,
        "environment": {name: _variable(name) for name in VARIABLES},
        "extras": {name: _extra(name) for name in EXTRAS},
    }


def kernels(isa: str, *, multiplies_bf16: bool) -> dict[str, str]:
    """Operation -> how it is done."""
    found = dict(KERNELS.get(isa, ()))
    if HALVES in found and not multiplies_bf16:
        what = "tiles" if isa == "amx" else "dot products"
        found[HALVES] = f"AVX-512 fused multiply-add: {what} of BF16 are not there, or gave other bits when tried"
    return found


def _variable(name: str) -> str:
    purpose, shown = VARIABLES[name]
    value = os.environ.get(name)
    state = "not set" if value is None else (f"{value} (environment)" if shown else "set (environment)")
    return f"{state}: {purpose}"


def _extra(name: str) -> str:
    absent = [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(absent)}" if absent else "installed"


def _binary(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _age(seconds: float) -> str:
    if seconds < 90:
        return "just now"
    return f"{seconds / 3600:.0f} hours ago" if seconds < 172800 else f"{seconds / 86400:.0f} days ago"
