"""A GGUF file as llama.cpp runs it, in the environment that `snello bench --install-peers llama.cpp` makes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snello.errors import SnelloError, Unsupported
from snello.measure import guards
from snello.measure.guards import Divergence, Habits
from snello.measure.peers.contenders import INSIDE
from snello.measure.peers.environments import LLAMACPP
from snello.measure.peers.turns import Worker
from snello.measure.rulers import Reading, Ruler
from snello.measure.runner import Runner, Step
from snello.measure.text import Block

MAGIC = b"GGUF"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """By its first bytes, whatever its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def parts(path: Path) -> list[Path]:
    """All files of a model that is split; llama.cpp finds them by the name of the first.

    Raises:
        SnelloError: this is another than the first, or one is not there.
    """
    named = SPLIT.fullmatch(path.name)
    if named is None:
        return [path]
    head, number, count = named.groups()
    found = [path.with_name(f"{head}-{part:05}-of-{count}.gguf") for part in range(1, int(count) + 1)]
    if int(number) != 1:
        raise SnelloError(f"{path} is part {int(number)} of {int(count)}", f"give the first: {found[0]}")
    for part in found:
        if not part.is_file():
            raise SnelloError(f"{path} is one of {int(count)} files, and {part.name} is not there", "put it beside it")
    return found


class _Scores:
    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.log_probabilities, self.top1 = arrays["log_probabilities"], arrays["top1"]


class Gguf:
    """One file, loaded in a process of its own.

    Args:
        original: the model whose tokens it is asked in.
        positions: the longest text that it will be given.

    Raises:
        SnelloError: llama.cpp is not installed here, or cannot load the file.
        Unsupported: its vocabulary is another.
    """

    kind = "run by llama.cpp"

    def __init__(self, path: Path, original: Any, *, positions: int, threads: int) -> None:
        if not LLAMACPP.is_made():
            hint = "snello bench --install-peers llama.cpp"
            raise SnelloError(f"{path} is a GGUF file, which llama.cpp runs: it is not installed here", hint)
        parts(path)
        self.path, self.spec = path, original.spec
        self.longest: int | None = positions
        self._folder = tempfile.TemporaryDirectory(prefix="snello-check-")
        scratch = Path(self._folder.name)
        self._answers = scratch / "answer.npz"
        command = [LLAMACPP.python, INSIDE / "read_llamacpp.py", path, "--positions", positions, "--threads", threads]
        words = [*map(str, command), "--vocabulary", str(scratch / "vocabulary.json")]
        self.worker = Worker("llama.cpp", words, scratch / "log")
        try:
            self._load(scratch / "log")
            self._check_vocabulary(json.loads((scratch / "vocabulary.json").read_text(encoding="utf-8")), original)
        except BaseException:
            self.close()
            raise

    def _load(self, log: Path) -> None:
        try:
            self.worker.load()
        except SnelloError:
            said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            hint = f"it said: {said[-1]}" if said else "is it whole, and of an architecture that llama.cpp knows?"
            raise SnelloError(f"llama.cpp cannot read {self.path}", hint) from None

    def _check_vocabulary(self, pieces: list[str], original: Any) -> None:
        """Every token of the original's must have its number; what only one of them has beyond is padding.

        Added tokens are spelled as converters like (Gemma's rows of blanks as blanks): of them only the number counts.
        """
        backend = original.tokenizer.backend
        own = {number: piece for piece, number in backend.get_vocab(with_added_tokens=True).items()}
        added = backend.get_added_tokens_decoder()
        strange = [
            number
            for number, piece in own.items()
            if number >= len(pieces) or (number not in added and pieces[number] != piece)
        ]
        if strange:
            message = f"{self.path} has another tokenizer ({len(strange):,} of {len(own):,} tokens are others)"
            hint = "check compares a model with versions of itself: give the original that the file was made from"
            raise Unsupported(f"{message}: losses do not pair token by token", hint)

    def facts(self) -> dict[str, Any]:
        size = sum(part.stat().st_size for part in parts(self.path))
        own = {"kind": self.kind, "name": self.path.name, "file_bytes": size}
        return {**own, "version": self.worker.ready["version"], "settings": self.worker.ready["settings"]}

    # ---- the face of a runner, as far as reading needs it

    def score(self, tokens: Any) -> _Scores:
        self._ask(tokens, scores=str(self._answers))
        return _Scores(self._answers)

    def logits(self, tokens: Any, rows: Any = None) -> np.ndarray:
        path = self._answers.with_suffix(".npy")
        wanted = range(len(tokens)) if rows is None else rows
        self._ask(tokens, rows=[int(row) for row in wanted], logits=str(path))
        return np.asarray(np.load(path))

    def _ask(self, tokens: Any, **request: Any) -> dict[str, Any]:
        return self.worker.ask(json.dumps({"tokens": [int(token) for token in tokens], **request}))

    # ---- judged

    def read(self, ruler: Ruler, blocks: Sequence[Block], step: Step) -> Reading:
        return ruler.read(self, blocks, step)  # type: ignore[arg-type]

    def divergence(self, original: Runner, blocks: Sequence[Block], *, seed: int, step: Step) -> Divergence | None:
        return guards.divergence(original, self, blocks, seed=seed, step=step)  # type: ignore[arg-type]

    def habits(self, prompts: Sequence[Sequence[int]], *, most: int, step: Step) -> Habits:
        ends, answers = list(self.spec.eos_tokens), []
        for done, prompt in enumerate(prompts, start=1):
            answers.append(self._ask(prompt, most=most, ends=ends)["answer"])
            step(done, len(prompts))
        return Habits(tuple(map(guards.is_loop, answers)), tuple(answer[-1] in ends for answer in answers))

    def close(self) -> None:
        self.worker.close()
        self._folder.cleanup()
