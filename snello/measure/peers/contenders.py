"""Who is compared: engines with their best settings, at as many bits of weights as ours.

A contender is one engine with one set of settings; where a setting is a matter of taste (OpenVINO's activations in f32
or bf16), both run and the faster one counts. A subject is the model that all of them run.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from snello.errors import SnelloError, Unsupported
from snello.measure.peers.checkpoint import shape_of
from snello.measure.peers.environments import (
    CTRANSLATE2,
    CTRANSLATE2_CONVERT,
    HERE,
    LLAMACPP,
    OPENVINO,
    OPENVINO_CONVERT,
    TRANSFORMERS,
    Environment,
    peers_folder,
)
from snello.measure.peers.holding import held

if TYPE_CHECKING:
    from snello.models.model import Model

INSIDE = HERE / "inside"
BOTH_PRECISIONS = ("f32", "bf16")
ITSELF = ""  # in place of a converted model: the checkpoint


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An engine that is not ours: what runs it, what converts for it, and which of its models has which bits."""

    name: str
    environment: Environment
    converter: Environment
    engine: str  # a file in `inside`
    models: dict[str, str]  # weights of ours -> the end of the converted model's name; with 4 bits where ours have 3
    settings: tuple[dict[str, str], ...] = ({},)
    options: dict[str, str] = field(default_factory=dict)  # with each of the settings
    variables: dict[str, str] = field(default_factory=dict)  # of its process
    isa: str | None = None  # the instruction set that it is held to

    @property
    def label(self) -> str:
        """Its name in files and rows."""
        return self.name.replace(".", "")


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="llama.cpp",
            environment=LLAMACPP,
            converter=LLAMACPP,
            engine="engine_llamacpp.py",
            models={
                "int3": "q4_0.gguf",
                "int4": "q4_0.gguf",
                "int4-all": "q4_0-all.gguf",
                "int8": "q8_0.gguf",
                "bf16": "bf16.gguf",
            },
        ),
        Peer(
            name="openvino",
            environment=OPENVINO,
            converter=OPENVINO_CONVERT,
            engine="engine_openvino.py",
            models={"int3": "int4", "int4": "int4", "int4-all": "int4-all", "int8": "int8", "bf16": "fp16"},
            settings=tuple({"precision": precision} for precision in BOTH_PRECISIONS),
        ),
        Peer(  # its fewest bits on a CPU are eight
            name="ctranslate2",
            environment=CTRANSLATE2,
            converter=CTRANSLATE2_CONVERT,
            engine="engine_ctranslate2.py",
            models={"int3": "int8", "int4": "int8", "int4-all": "int8", "int8": "int8", "bf16": "bfloat16"},
        ),
        Peer(  # without further packages it runs what the checkpoint has
            name="transformers",
            environment=TRANSFORMERS,
            converter=TRANSFORMERS,
            engine="engine_transformers.py",
            models=dict.fromkeys(("int3", "int4", "int4-all", "int8", "bf16"), ITSELF),
            settings=tuple({"dtype": dtype} for dtype in BOTH_PRECISIONS),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model of a comparison.

    Attributes:
        name: of its converted files.
        checkpoint: the Hugging Face folder that peers are converted from.
        model: what our engine opens: a folder, or the name of a shape with random weights.
        weights: ours, as bits of the body and of the head.
        words, positions: the size of its vocabulary, and the longest text that it was made for.
        asked: how the command line named it.
    """

    name: str
    checkpoint: Path
    model: str
    weights: str
    words: int
    positions: int
    asked: str
    random: bool = False


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One engine with one set of settings.

    Attributes:
        cache: the type of *our* keys and values.
        peer: None for ours.
        isa: the instruction set that all are held to, ours by `SNELLO_ISA`; None: whatever the processor has.
    """

    name: str
    weights: str
    cache: str | None = None
    peer: Peer | None = None
    isa: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        """The name of what stands against it: as many bits in the body and in the head."""
        return our_name(self.weights, self.cache)

    @property
    def variables(self) -> dict[str, str]:
        """Of its process, besides those of this one."""
        if self.peer is not None:
            return self.peer.variables
        return {"SNELLO_ISA": self.isa} if self.isa else {}

    def model(self, subject: Subject) -> str:
        return subject.model if self.peer is None else str(self.converted(subject))

    def converted(self, subject: Subject) -> Path:
        """The peer's model."""
        assert self.peer is not None
        if self.peer.models[self.weights] == ITSELF:
            return subject.checkpoint
        name = f"{subject.name}-{self.peer.models[self.weights]}"
        return peers_folder() / "models" / self.peer.label / name

    def loaded_bytes(self, subject: Subject) -> int:
        """What a peer's model takes in memory; none for ours. A checkpoint that is run in FP32 grows to twice."""
        if self.peer is None:
            return 0
        path = self.converted(subject)
        size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
        return 2 * size if path == subject.checkpoint and "f32" in self.options.values() else size

    def command(self, subject: Subject) -> list[str]:
        """Python, the worker, its engine and its model; the lengths are added by who measures."""
        python = Path(sys.executable) if self.peer is None else self.peer.environment.python
        engine = "engine_snello.py" if self.peer is None else self.peer.engine
        options = dict(self.options)
        if self.peer is None and subject.random:
            options |= {"weights": self.weights, "tokenizer": str(subject.checkpoint)}
            options |= {"cache": self.cache} if self.cache else {}
        extra = [word for name, value in options.items() for word in ("--option", f"{name}={value}")]
        command = [python, INSIDE / "worker.py", INSIDE / engine, self.model(subject), "--words", subject.words]
        return [*map(str, command), *extra]


def our_name(weights: str, cache: str | None = None) -> str:
    return f"snello-{weights}" + (f"-kv-{cache}" if cache else "")


def contenders_of(peer: Peer, weights: str, cache: str | None = None) -> list[Contender]:
    """The peer's settings at these bits."""
    model = peer.models[weights].removesuffix(".gguf")
    return [
        Contender(
            name="-".join(filter(None, [peer.label, model, *settings.values()])),
            weights=weights,
            cache=cache,
            peer=peer,
            isa=peer.isa,
            options=settings | peer.options,
        )
        for settings in peer.settings
    ]


def contenders(peers: Sequence[Peer], weights: str, cache: str | None = None) -> list[Contender]:
    """Ours and all of theirs at these bits, ours held to what the peers are held to."""
    theirs = [contender for peer in peers for contender in contenders_of(peer, weights, cache)]
    isa = peers[0].isa if peers else None
    return [Contender(name=our_name(weights, cache), weights=weights, cache=cache, isa=isa), *theirs]


def peers_named(text: str, isa: str | None = None) -> list[Peer]:
    """The peers of a list with commas, held to an instruction set if one is given.

    Raises:
        SnelloError: one is not known, none is named, or one cannot be held to the set.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = ", ".join(PEERS)
    if unknown := [name for name in names if name not in PEERS]:
        raise SnelloError(f"no peer is named {', '.join(unknown)}", f"choose from: {known}", exit_code=2)
    if not names:
        raise SnelloError("no peer is named", f"choose from: {known}", exit_code=2)
    return [held(PEERS[name], isa) for name in dict.fromkeys(names)]


# ---- subjects -------------------------------------------------------------------------------------------------------


def subject_of_shape(shape: str, weights: str) -> Subject:
    """A published shape: everybody runs random weights."""
    config = shape_of(shape)
    return Subject(
        name=shape,
        checkpoint=peers_folder() / "checkpoints" / shape,
        model=shape,
        weights=weights,
        words=config.vocab_size,
        positions=config.context,
        asked=f"--shape {shape} --weights {weights}",
        random=True,
    )


def subject_of_model(model: Model, asked: str, original: str | None = None) -> Subject:
    """A checkpoint, or a lean folder whose original (as it is named inside, if not given) the peers are converted from.

    Raises:
        SnelloError: it is no decoder, or the original of a lean folder is not there any more.
    """
    if not model.spec.causal:
        raise Unsupported(f"{model.name} is an encoder, and peers are compared on decoders", "leave out --against")
    checkpoint = _original(model, original)
    place = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", checkpoint.resolve().name).strip("-")
    return Subject(
        name=f"{plain}-{place}",
        checkpoint=checkpoint,
        model=asked,
        weights=weights_of(model),
        words=model.spec.vocab_size,
        positions=model.spec.max_positions,
        asked=asked if original is None else f"{asked} --original {original}",
    )


def weights_of(model: Model) -> str:
    """Ours, named like the random weights of a shape: the body's bits, and whether the head has as few."""
    from snello.models.spec import linear_names

    formats = {name: model.spec.format(name).weights for name in linear_names(model.spec)}
    body = [kind for name, kind in formats.items() if name != "head"]
    most = max(set(body), key=body.count)
    if most == "int4":
        return "int4-all" if formats.get("head") == "int4" else "int4"
    return most if most in ("int8", "int3") else "bf16"


def _original(model: Model, named: str | None) -> Path:
    """The checkpoint that peers can be converted from."""
    from snello.models import load
    from snello.models.lean import LEAN

    if named is None:
        path = _source(model) if (model.path / LEAN).exists() else model.path
    else:
        original = load(named)
        if original.spec.vocab_size != model.spec.vocab_size:
            words = f"{original.spec.vocab_size:,} words, and {model.name} {model.spec.vocab_size:,}"
            raise SnelloError(f"{named} is not what {model.name} was made from: it has {words}", "name its original")
        path = original.path
    if not (path / "config.json").exists():
        message = f"{model.name} is no Hugging Face checkpoint, and peers are converted from one"
        raise Unsupported(message, "compare a model folder with a config.json, or a --shape")
    return path


def _source(model: Model) -> Path:
    from snello.models import load
    from snello.models.files import read_json
    from snello.models.lean import LEAN

    name = read_json(model.path / LEAN)["source"]["name"]
    try:
        return load(name).path
    except SnelloError as error:
        hint = "say where it is with --original FOLDER"
        raise SnelloError(f"{model.name} was made from {name}, which peers need: {error.message}", hint) from None
