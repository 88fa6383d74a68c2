"""A workbench without weights: models are numbers in a JSON file, time is counted, every run takes milliseconds.

Losses come from seeded noise of the size that each step is said to cost, so the real statistics judge them; seconds
come from a clock that the fake runners advance, so the real timing judges those.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.measure.machine import Machine
from snello.measure.rulers import Reading
from snello.models.spec import Attention, Embedding, FeedForward, Format, Head, Layer, Norm, Rope, Spec
from snello.techniques.base import Context

MACHINE = Machine(
    cpu="Fake CPU",
    features=(),
    cores=2,
    threads=2,
    memory_bytes=10**10,
    isa="scalar",
    bandwidth=((2**18, 1e10), (2**30, 1e10)),
    compute={"fp32": 1e12, "bf16": 1e12, "int8": 1e13, "int4": 1e13},
)
VOCABULARY = 512


class FakeTime:
    """Stands in for `time` where seconds are measured."""

    now = 0.0
    noise = 0.0
    generator = np.random.default_rng(0)

    @classmethod
    def perf_counter(cls) -> float:
        return cls.now

    @classmethod
    def spend(cls, seconds: float) -> None:
        cls.now += seconds * float(np.exp(cls.noise * cls.generator.standard_normal()))


def spec(layers: int = 2, feed_forward: int = 384) -> Spec:
    attention = Attention(num_heads=4, num_kv_heads=2, head_dim=32, rope=Rope(base=10000.0, dims=32))
    block = Layer(mixer=attention, feed_forward=FeedForward(width=feed_forward, activation="silu"))
    return Spec(
        family="llama",
        task="causal-lm",
        vocab_size=VOCABULARY,
        hidden_size=128,
        max_positions=256,
        layers=(block,) * layers,
        norm=Norm(kind="rms", epsilon=1e-6),
        embedding=Embedding(),
        head=Head(kind="lm"),
        default_format=Format(weights="bf16"),
        cache_format="bf16",
        eos_tokens=(0,),
    )


def encoder_spec(task: str) -> Spec:
    """A classifier or an embedding model of the same size."""
    classify = task == "sequence-classification"
    head = Head(kind="classify", labels=("no", "yes")) if classify else Head(kind="embed", pooling="mean")
    block = replaced(spec().layers[0], mixer=replaced(spec().layers[0].mixer, causal=False))
    return replaced(spec(), task=task, head=head, layers=(block,) * 2, eos_tokens=())


class FakeTokenizer:
    def chat(self, messages: Any) -> list[int]:
        raise SnelloError("fake has no chat template")

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [1 + int(hashlib.md5(word.encode()).hexdigest()[:8], 16) % (VOCABULARY - 1) for word in text.split()]

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        return "".join(f" w{token}" for token in tokens)

    def token_id(self, token: str) -> int | None:
        return None


@dataclass
class FakeModel:
    spec: Spec
    path: Path
    loss: float = 0.0  # nats
    pace: float = 1.0  # cost over the original's
    memory: float = 1.0
    content: str = "original"
    name: str = "fake"
    tokenizer: Any = field(default_factory=FakeTokenizer)
    num_parameters: int = 400_000
    note: str = ""
    grid: int = 0

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.content}{self.spec.digest}".encode()).hexdigest()


def generator_of(*parts: Any) -> np.random.Generator:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


@functools.cache
def noise_size(nats: float) -> float:
    """Noise on the odds that costs this much on average."""
    losses = generator_of("calibration").gamma(1.2, 2.8, 20_000)
    odds = -losses - np.log(-np.expm1(-np.maximum(losses, 1e-9)))
    noise = generator_of("noise").standard_normal(20_000)
    sizes = np.geomspace(0.01, 5, 60)
    costs = [float((np.logaddexp(0.0, -(odds + size * noise)) - losses).mean()) for size in sizes]
    return float(np.interp(nats, np.maximum.accumulate(costs), sizes))


class FakeRunner:
    def __init__(self, model: FakeModel) -> None:
        self.model, self.spec, self.context, self.threads = model, model.spec, 256, 1
        self.closed = False

    @property
    def weights_bytes(self) -> int:
        from snello.measure.sizes import weights_bytes

        return weights_bytes(self.spec)

    def bytes_per_token(self, context: int = 0) -> int:
        from snello.measure.sizes import linear_bytes

        return linear_bytes(self.spec)

    def score(self, tokens: Any) -> Any:
        assert not self.closed
        ids = np.asarray(tokens)
        losses = generator_of("nll", ids.tobytes()).gamma(1.2, 2.8, len(ids) - 1)
        if self.model.loss < 0:  # it reads better
            losses = losses * (1 + self.model.loss / float(losses.mean()))
        if self.model.loss > 0:
            own = generator_of("noise", self.model.digest, ids.tobytes())
            odds = -losses - np.log(-np.expm1(-np.maximum(losses, 1e-9)))
            noise = noise_size(self.model.loss) * own.standard_normal(len(losses))
            losses = np.logaddexp(0.0, -(odds + noise))
        top = np.where(generator_of("top", ids.tobytes()).random(len(ids) - 1) < 0.4, ids[1:], 7)
        changed = generator_of("changed", self.model.digest, ids.tobytes()).random(len(ids) - 1) < self.model.loss
        return SimpleNamespace(
            log_probabilities=-losses.astype(np.float32), top1=np.where(changed, 3, top).astype(np.int32)
        )

    def logits(self, tokens: Any, rows: Any = None) -> np.ndarray:
        ids = np.asarray(tokens)
        wanted = range(len(ids)) if rows is None else rows
        base = np.stack([2 * ROWS[int(ids[: int(r) + 1].sum()) % len(ROWS)][:64] for r in wanted])
        return base + self.model.loss * generator_of(self.model.digest).normal(0, 1, 64)

    def encode(self, tokens: Any) -> np.ndarray:
        FakeTime.spend(0.01 * self.model.pace)
        ids = np.asarray(tokens)
        own = generator_of("encode", self.model.digest, ids.tobytes())
        if self.spec.head.kind == "embed":
            vector = generator_of("vector", ids.tobytes()).normal(0, 1, 64)
            return vector + np.sqrt(2 * self.model.loss) * own.normal(0, 1, 64)
        right = int(ids.sum() % 2) ^ int(generator_of("wrong", ids.tobytes()).random() < 0.1)
        return np.eye(2)[right ^ int(own.random() < self.model.loss)]

    def session(self) -> FakeSession:
        return FakeSession(self)

    def step(self, sessions: Sequence[FakeSession], tokens: Sequence[int]) -> np.ndarray:
        FakeTime.spend(0.01 * self.model.pace * (1 + 0.1 * len(sessions)))
        return np.stack([session.next(token) for session, token in zip(sessions, tokens, strict=True)])

    def close(self) -> None:
        self.closed = True


ROWS = np.random.default_rng(5).normal(0, 1, (211, VOCABULARY)).astype(np.float32)


class FakeSession:
    def __init__(self, runner: FakeRunner) -> None:
        self.runner, self.tokens = runner, [0]

    def feed(self, tokens: Any) -> np.ndarray:
        FakeTime.spend(0.0005 * self.runner.model.pace * len(tokens))
        self.tokens += list(tokens)
        return self.row()

    def next(self, token: int) -> np.ndarray:
        self.tokens.append(token)
        return self.row()

    def row(self) -> np.ndarray:
        return ROWS[(7 * self.tokens[-1] + len(self.tokens)) % len(ROWS)]

    def close(self) -> None:
        pass


# what each kind of step costs: (nats, cost over the original)
EFFECTS: dict[str, tuple[float, float]] = {
    "int8": (0.0008, 0.55),
    "int4 rtn": (0.12, 0.33),
    "int4 gptq": (0.003, 0.33),
    "int4 awq": (0.004, 0.33),
    "int3 gptq": (0.2, 0.28),
    "mixed gptq": (0.002, 0.45),
    "bf16 rtn": (0.0005, 0.99),
    "prune": (0.2, 0.9),  # nothing that a usual budget allows
}


@dataclass
class FakeWorkbench:
    root: Path
    effects: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(EFFECTS))
    cache_pace: float = 0.9  # of an INT8 cache, over the model without it
    applied: list[str] = field(default_factory=list)
    same_bits: bool = True  # the original gives the same numbers twice
    base: Spec = field(default_factory=spec)
    free: int = 10**11
    prunes: bool = False  # off: runs that are about something else take half the time

    def load(self, name: str | Path) -> FakeModel:
        path = Path(name)
        if (path / "model.safetensors").exists():
            content = (path / "model.safetensors").read_text()
            facts = json.loads(content)
            from snello.optimize.recipe import Step

            planned = self.base
            for step in facts["steps"]:
                options = {key: value for key, value in step.items() if key != "use"}
                planned = Step(step["use"], options).technique.plan(planned)
            return FakeModel(planned, path, facts["loss"], facts["pace"], facts["pace"], content)
        if str(name) != "fake":
            raise SnelloError(f"{name} does not exist", "give fake")
        return FakeModel(self.base, self.root)

    def machine(self) -> Machine:
        return MACHINE

    def open(self, model: FakeModel, *, context: int, streams: int = 1) -> FakeRunner:
        runner = FakeRunner(model)
        if not self.same_bits:
            runner.score = self._unsteady(runner)  # type: ignore[method-assign]
        return runner

    def _unsteady(self, runner: FakeRunner) -> Any:
        real, calls = runner.score, iter(range(10**9))

        def score(tokens: Any) -> Any:
            found = real(tokens)
            found.log_probabilities += np.float32(1e-4 * next(calls))
            return found

        return score

    def plan(self, step: Any, spec: Spec) -> Spec:
        if step.use == "prune" and not self.prunes:
            raise Unsupported("the fake model is not to be pruned", "set prunes")
        return step.technique.plan(spec)

    def apply(self, step: Any, model: FakeModel, context: Context) -> FakeModel:
        options = step.resolved()
        if options["use"] == "distill" and options["loss"] != "text" and model.content == "original":
            raise Unsupported("fake is its own teacher", "give a smaller student")
        context.progress("half", 0.5)
        loss, pace = self.effect(options)
        if options.get("cache"):
            loss, pace = loss + 0.0005, pace * self.cache_pace
        loss, pace = loss + model.loss, pace * model.pace  # steps add and multiply; below 0 it reads better
        windows = hashlib.sha256(b"".join(window.tobytes() for window in context.windows)).hexdigest()
        before = json.loads(model.content)["steps"] if model.content != "original" else []
        facts = {"steps": [*before, options], "loss": loss, "pace": pace, "windows": windows, "seed": context.seed}
        partial = context.output.with_name(f"{context.output.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "model.safetensors").write_text(json.dumps(facts, sort_keys=True))
        partial.rename(context.output)
        return self.load(context.output)

    def effect(self, options: dict[str, Any]) -> tuple[float, float]:
        """Nats and cost of one step, and a note that it was applied."""
        if options["use"] == "distill":
            self.applied.append(f"distill {options['loss']}")
            return self.effects[self.applied[-1]]
        if options["use"] != "quantize":
            chosen = [f"{name} {value:g}" for name, value in options.items() if type(value) is float and value]
            self.applied.append(" ".join([options["use"], *chosen]))
            return self.effects.get(self.applied[-1]) or self.effects[options["use"]]
        self.applied.append(f"{options['weights']} {options['method']}")
        return self.effects.get(self.applied[-1]) or self.effects[str(options["weights"])]

    def peak_memory(self, model: FakeModel) -> int:
        return int(1e9 * model.memory)

    def translation(self, original: FakeModel, other: FakeModel) -> None:
        return None

    def reference(self, model: FakeModel, blocks: Any) -> Reading | str:
        return "torch is not installed"

    def transformers(self, model: FakeModel, prompt: int, generate: int) -> str:
        return "transformers is not installed"

    def free_memory(self) -> int:
        return self.free

    def free_disk(self, folder: Path) -> int:
        return self.free

    def versions(self) -> dict[str, str]:
        return {"snello": "0.1.0"}


def write_text(path: Path, words: int = 60_000, seed: int = 0) -> Path:
    """Paragraphs of random words: documents enough for every cut."""
    generator = np.random.default_rng(seed)
    lines, left = [], words
    while left > 0:
        count = int(generator.integers(200, 500))
        lines.append(" ".join(f"word{n}" for n in generator.integers(0, 3000, count)))
        left -= count
    path.write_text("\n\n".join(lines))
    return path


def install(target: Any = None) -> None:
    """Lets fake runners set the clock that timing reads."""
    import snello.measure.speed

    snello.measure.speed.time = target or FakeTime  # type: ignore[assignment]
    FakeTime.now, FakeTime.noise = 0.0, 0.002
    FakeTime.generator = np.random.default_rng(0)


def fake_time() -> Iterator[None]:
    import time

    install()
    yield
    install(time)


def replaced(value: Any, **changes: Any) -> Any:
    return dataclasses.replace(value, **changes)
