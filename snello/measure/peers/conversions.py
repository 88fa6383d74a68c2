"""The same checkpoint in every peer's own format, by its own converter, made only when somebody asks.

A shape's checkpoint has random weights and is written here; then each contender's model is converted from it. What is
there is left alone, and what is half-made never has its final name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from snello.errors import SnelloError
from snello.measure.peers.checkpoint import shape_of, write_checkpoint
from snello.measure.peers.contenders import INSIDE, Contender, Peer, Subject
from snello.measure.peers.environments import (
    CTRANSLATE2_CONVERT,
    LLAMACPP,
    OPENVINO_CONVERT,
    Environment,
    Say,
    make,
)

INT4 = ("--weight-format", "int4", "--ratio", "1.0", "--sym")  # and a group size that divides every width
GROUP_SIZES = (128, 64, 32)
# Nothing is tuned beyond what OpenVINO's exporter offers on its command line. By its defaults it keeps the embedding
# and the output head in eight bits; `--all-layers` puts them in four as well, which reads fewer bytes a token.
EXPORTS = {
    "int4": INT4,
    "int4-all": (*INT4, "--all-layers"),
    "int8": ("--weight-format", "int8"),
    "fp16": ("--weight-format", "fp16"),
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def check(subject: Subject, contenders: Sequence[Contender]) -> None:
    """Everything is there.

    Raises:
        SnelloError: an environment or a converted model is missing; the hint is the command that makes it.
    """
    theirs = [contender for contender in contenders if contender.peer is not None]
    peers = [contender.peer for contender in theirs if contender.peer is not None]
    absent = dict.fromkeys(peer.name for peer in peers if not peer.environment.python.exists())
    if absent:
        raise SnelloError(f"not installed: {', '.join(absent)}", _command(subject, list(absent), theirs[0].isa))
    lacking = [contender for contender in theirs if not contender.converted(subject).exists()]
    if lacking or (theirs and not subject.checkpoint.exists()):
        names = dict.fromkeys(contender.peer.name for contender in lacking or theirs if contender.peer is not None)
        kinds = dict.fromkeys(contender.converted(subject).name for contender in lacking)
        missing = ", ".join(kinds) or str(subject.checkpoint)
        hint = _command(subject, list(names), theirs[0].isa)
        raise SnelloError(f"not converted for {', '.join(names)}: {missing}", hint)


def _command(subject: Subject, peers: Sequence[str], isa: str | None) -> str:
    held = f" --isa {isa}" if isa else ""
    return f"snello bench {subject.asked} --install-peers {','.join(peers)}{held}"


def install(peers: Sequence[Peer], contenders: Sequence[Contender], subject: Subject | None, say: Say) -> None:
    """Makes the peers' environments; with a subject also what converts it, and its conversions."""
    lacking = [] if subject is None else [one for one in contenders if one.peer and not one.converted(subject).exists()]
    environments = [peer.environment for peer in peers]
    environments += [one.peer.converter for one in lacking if one.peer is not None]
    unique: dict[str, Environment] = {environment.name: environment for environment in environments}
    for environment in unique.values():
        make(environment, say)
    if subject is None:
        return
    if subject.random and not subject.checkpoint.exists():
        say(f"writing {subject.checkpoint}")
        write_checkpoint(shape_of(subject.name), subject.checkpoint)
    for contender in lacking:
        path = contender.converted(subject)
        if not path.exists():
            say(f"converting {path}")
            _convert(contender, subject, path)


def _convert(contender: Contender, subject: Subject, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    assert contender.peer is not None
    command = COMMANDS[contender.peer.converter.name](subject, contender, partial)
    done = subprocess.run(command, stdout=sys.stderr, env={**os.environ, **OFFLINE}, check=False)
    if done.returncode != 0:
        _remove(partial)
        raise SnelloError(
            f"{path} was not made: its converter ended with {done.returncode}", "what it printed says why"
        )
    partial.rename(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _gguf(subject: Subject, contender: Contender, output: Path) -> list[str]:
    assert contender.peer is not None
    python, kind = contender.peer.converter.python, contender.peer.models[contender.weights].removesuffix(".gguf")
    return [str(python), str(INSIDE / "convert_llamacpp.py"), str(subject.checkpoint), kind, str(output)]


def _export(subject: Subject, contender: Contender, output: Path) -> list[str]:
    assert contender.peer is not None
    exporter = contender.peer.converter.python.with_name("optimum-cli")
    options = list(EXPORTS[contender.peer.models[contender.weights]])
    if "int4" in options:
        options += ["--group-size", str(group_size(subject.checkpoint))]
    task = ["--task", "text-generation-with-past"]
    return [str(exporter), "export", "openvino", "--model", str(subject.checkpoint), *options, *task, str(output)]


def group_size(checkpoint: Path) -> int:
    """The largest group that fits every linear: OpenVINO's exporter refuses one that leaves a remainder."""
    config = json.loads((checkpoint / "config.json").read_text())
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    queries = heads * int(config.get("head_dim") or hidden // heads)
    widths = (hidden, queries, int(config["intermediate_size"]))
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if not fitting:
        raise SnelloError(f"no group size of {GROUP_SIZES} divides {widths}", "compare INT8 weights instead")
    return fitting[0]


def _ctranslate2(subject: Subject, contender: Contender, output: Path) -> list[str]:
    assert contender.peer is not None
    converter = contender.peer.converter.python.with_name("ct2-transformers-converter")
    kind = contender.peer.models[contender.weights]
    model = ["--model", str(subject.checkpoint)]
    return [str(converter), *model, "--quantization", kind, "--output_dir", str(output)]


COMMANDS = {
    LLAMACPP.name: _gguf,
    OPENVINO_CONVERT.name: _export,
    CTRANSLATE2_CONVERT.name: _ctranslate2,
}
