"""Measures OpenVINO GenAI on an exported model; runs in that peer's environment.

Times are the engine's own record of how long each token took, so the Python around it costs it nothing.

    echo go | build/peers/openvino/bin/python -m benchmarks.peers.worker_openvino build/peers/models/openvino/X
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.protocol import Measurement, arguments, claim_stdout, random_prompt, serve

DECOMPRESSION = {"Convert", "Subtract", "Multiply", "Reshape"}


def consumers(node: openvino.Node) -> set[str]:
    """The kinds of operation that use a constant, seen through the ones that only unpack it."""
    kinds: set[str] = set()
    for target in node.output(0).get_target_inputs():
        user = target.get_node()
        kind = user.get_type_name()
        kinds |= consumers(user) if kind in DECOMPRESSION else {kind}
    return kinds


def bytes_per_token(folder: Path) -> int:
    """All constants once, except that a table from which rows are only gathered gives one row."""
    total = 0
    for node in openvino.Core().read_model(folder / "openvino_model.xml").get_ops():
        if node.get_type_name() != "Constant":
            continue
        size, shape = node.get_byte_size(), list(node.get_shape())
        gathered = bool(shape) and shape[0] > 0 and consumers(node) == {"Gather"}
        total += size // shape[0] if gathered else size
    return total


class OpenVino:
    """One pipeline on the CPU."""

    def __init__(
        self, folder: Path, *, prompt: int, generate: int, threads: int, seed: int, properties: dict[str, str]
    ) -> None:
        self.prompt, self.generate, self.seed = prompt, generate, seed
        self.properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, **properties}
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", **self.properties)
        self.folder = folder
        self.bytes_per_token = bytes_per_token(folder)
        self.config = openvino_genai.GenerationConfig(
            max_new_tokens=generate, min_new_tokens=generate, ignore_eos=True, do_sample=False
        )

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "OpenVINO GenAI",
            "version": openvino_genai.__version__,
            "settings": {"model": self.folder.name, **self.properties},
            "bytes_per_token": self.bytes_per_token,
        }

    def measure(self, index: int) -> Measurement:
        prompt = np.array([random_prompt(self.prompt, self.seed, index)], dtype=np.int64)
        result = self.pipeline.generate(openvino.Tensor(prompt), self.config)
        tokens = list(result.tokens[0])
        if len(tokens) != self.generate:
            raise RuntimeError(f"asked for {self.generate} tokens, got {len(tokens)}")
        record = result.perf_metrics.raw_metrics
        to_first, between = record.m_times_to_first_token[0], record.m_durations  # microseconds
        if len(between) != len(tokens) - 1:
            raise RuntimeError(f"{len(tokens)} tokens, but {len(between)} times between them")
        return Measurement(
            prefill_tokens_per_second=self.prompt / (to_first * 1e-6),
            decode_tokens_per_second=len(between) / (sum(between) * 1e-6),
            tokens=tokens,
        )


def main() -> None:
    lines = claim_stdout()
    parser = arguments(__doc__)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="activations between products")
    parser.add_argument(
        "--attention", choices=("PA", "SDPA"), help="attention backend; the engine's own choice if absent"
    )
    options = parser.parse_args()
    properties = {"INFERENCE_PRECISION_HINT": options.precision}
    if options.attention:
        properties["ATTENTION_BACKEND"] = options.attention
    engine = OpenVino(
        options.model,
        prompt=options.prompt,
        generate=options.generate,
        threads=options.threads,
        seed=options.seed,
        properties=properties,
    )
    engine.measure(-1)
    serve(engine, options.repeats, lines)


if __name__ == "__main__":
    main()
