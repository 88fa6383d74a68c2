"""OpenVINO GenAI on an exported model; runs in that peer's environment.

One stream goes through its pipeline for one, whose times are the engine's own record of how long each token took.
Several go through its continuous batching: prompts come first, whole, then every step gives each stream a token. Its
cache of prompts is on, as the several streams keep theirs.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

DECOMPRESSION = {"Convert", "Subtract", "Multiply", "Reshape"}
BLOCK = 32  # positions of a block of its cache on a CPU
SPARE_PROMPTS = 4  # room for prompts that are read alone, so that the kept ones are not driven out
LEAST_ROWS = 512
DYNAMIC_QUANTIZATION = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
RUNTIME_PROPERTIES = ("INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", DYNAMIC_QUANTIZATION)


def consumers(node: Any) -> set[str]:
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
        size, shape = int(node.get_byte_size()), list(node.get_shape())
        gathered = bool(shape) and shape[0] > 0 and consumers(node) == {"Gather"}
        total += size // shape[0] if gathered else size
    return total


def open_engine(setup: Any) -> OneStream | ManyStreams:
    return OneStream(setup) if setup.streams == 1 else ManyStreams(setup)


class OpenVino:
    """What both pipelines share: the folder and the settings."""

    def __init__(self, setup: Any) -> None:
        self.folder = Path(setup.model)
        self.properties = {
            "INFERENCE_NUM_THREADS": setup.threads,
            "INFERENCE_PRECISION_HINT": setup.options.get("precision", "f32"),
        }
        if "dynamic_quantization" in setup.options:
            self.properties[DYNAMIC_QUANTIZATION] = int(setup.options["dynamic_quantization"])
        self.bytes_per_token = bytes_per_token(self.folder)
        self.compiled: Any = None

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "OpenVINO GenAI",
            "version": openvino_genai.__version__,
            "settings": {"model": self.folder.name, **self.properties},
            "bytes_per_token": self.bytes_per_token,
        }

    def score(self, prompt: list[int], answer: list[int]) -> np.ndarray:
        """Through the runtime that the pipelines stand on, with the same properties: they give no logits."""
        if self.compiled is None:
            properties = {name: value for name, value in self.properties.items() if name in RUNTIME_PROPERTIES}
            self.compiled = openvino.Core().compile_model(self.folder / "openvino_model.xml", "CPU", properties)
        request = self.compiled.create_infer_request()
        names = {name for port in self.compiled.inputs for name in port.get_names()}
        found, rows, seen = [], prompt, 0
        for token in answer:
            inputs = {
                "input_ids": np.array([rows], dtype=np.int64),
                "attention_mask": np.ones((1, seen + len(rows)), dtype=np.int64),
                "position_ids": np.arange(seen, seen + len(rows), dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
            request.infer({name: value for name, value in inputs.items() if name in names})
            found.append(request.get_tensor("logits").data[0, -1].astype(np.float32))
            seen, rows = seen + len(rows), [token]
        return np.stack(found)

    def config(self, generate: int) -> Any:
        return openvino_genai.GenerationConfig(
            max_new_tokens=generate, min_new_tokens=generate, ignore_eos=True, do_sample=False
        )


class OneStream(OpenVino):
    """The pipeline for one prompt at a time."""

    def __init__(self, setup: Any) -> None:
        super().__init__(setup)
        self.pipeline = openvino_genai.LLMPipeline(self.folder, "CPU", **self.properties)

    def answer(self, prompts: list[list[int]], generate: int) -> list[tuple[list[int], list[float]]]:
        prompt = openvino.Tensor(np.array(prompts, dtype=np.int64))
        start = time.perf_counter()
        result = self.pipeline.generate(prompt, self.config(generate))
        tokens = list(result.tokens[0])
        record = result.perf_metrics.raw_metrics  # microseconds
        to_first, between = record.m_times_to_first_token[0], list(record.m_durations)
        if len(between) != len(tokens) - 1:
            raise RuntimeError(f"{len(tokens)} tokens, but {len(between)} times between them")
        return [(tokens, [start + 1e-6 * elapsed for elapsed in itertools.accumulate([to_first, *between])])]


class ManyStreams(OpenVino):
    """The pipeline for many, stepped by hand."""

    def __init__(self, setup: Any) -> None:
        super().__init__(setup)
        blocks = -(-(setup.prompt + setup.generate) // BLOCK) + 1
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = max(LEAST_ROWS, setup.prompt, setup.streams)
        scheduler.max_num_seqs = setup.streams
        scheduler.dynamic_split_fuse = False
        scheduler.enable_prefix_caching = True
        scheduler.num_kv_blocks = blocks * (setup.streams + SPARE_PROMPTS)
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(self.folder, scheduler, "CPU", self.properties)
        self.properties = {**self.properties, "pipeline": "continuous batching", "kv_blocks": scheduler.num_kv_blocks}
        self.requests = itertools.count()

    def answer(self, prompts: list[list[int]], generate: int) -> list[tuple[list[int], list[float]]]:
        handles = [
            self.pipeline.add_request(
                next(self.requests), openvino.Tensor(np.array([prompt], dtype=np.int64)), self.config(generate)
            )
            for prompt in prompts
        ]
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            moment = time.perf_counter()
            for handle, (tokens, moments) in zip(handles, answers, strict=True):
                while handle.can_read():
                    (output,) = handle.read().values()
                    tokens += output.generated_ids
                    moments += [moment] * len(output.generated_ids)
        return answers
