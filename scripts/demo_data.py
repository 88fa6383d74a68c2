"""What `demo` learns from and is measured on: the standard library, its tokenizer, its rows, its held-out windows.

The order of everything follows from a seed, and what is made once is read back, so that a resumed run sees the same
rows.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from snello.models.demo.held_out import is_held_out, read_held_out, read_source, stdlib_directory

Tokens = npt.NDArray[np.uint16]

CONTEXT = 1024
VOCABULARY = 4096
END_TOKEN = "<|endoftext|>"
END_ID = 0

# Newlines and indentation are tokens of their own, never glued to a word: a prompt that ends with a colon,
# a newline or an indentation is then cut exactly as the training text was.  Digits stand alone, and a word
# takes at most one sign before it ("(self", ".join", " in", "_name").
SPLIT = r"\n+| {2,}|\d|[^\s\p{L}\d]?\p{L}+| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"

# Installed packages are not the standard library, and the last two are made by the build of the
# interpreter: they hold its paths and compiler options.
FOREIGN = ("site-packages", "dist-packages", "ensurepip", "__pycache__")
GENERATED = ("config-", "_sysconfigdata")


# --- The training text -------------------------------------------------------------------------------


def source_files(root: Path) -> list[Path]:
    """The Python files to learn from, in a fixed order: no bundles, nothing generated, nothing held out."""
    chosen = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root).as_posix()
        foreign = not set(FOREIGN).isdisjoint(relative.split("/")) or relative.startswith(GENERATED)
        if not foreign and not is_held_out(relative):
            chosen.append(path)
    return sorted(chosen, key=lambda path: path.relative_to(root).as_posix())


def is_python(path: Path) -> bool:
    """Whether the file decodes and splits into Python tokens; the test suite holds some that do not."""
    try:
        with path.open("rb") as stream:
            for _ in tokenize.tokenize(stream.readline):
                pass
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return False
    return True


def training_texts() -> list[str]:
    """Every distinct text to learn from, in the order of the files."""
    root = stdlib_directory()
    texts = (read_source(path) for path in source_files(root) if is_python(path))
    return list(dict.fromkeys(text for text in texts if text.strip()))


# --- The tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE on the training texts; every text comes back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """How many bytes of text each token stands for; the byte-level alphabet has one letter per byte."""
    lengths = [len(tokenizer.id_to_token(index) or "") for index in range(tokenizer.get_vocab_size())]
    lengths[END_ID] = 0
    return np.array(lengths, dtype=np.int64)


# --- Tokens, rows, batches ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """All documents as one array: number `i` is `tokens[bounds[i]:bounds[i + 1]]`, its end token included."""

    tokens: Tokens
    bounds: npt.NDArray[np.int64]
    facts: dict[str, Any]


def encode_corpus(tokenizer: Tokenizer, texts: list[str]) -> Corpus:
    """The training texts as tokens, with the facts that the training record repeats."""
    encoded = [[*encoding.ids, END_ID] for encoding in tokenizer.encode_batch(texts)]
    tokens = np.array([token for ids in encoded for token in ids], dtype=np.uint16)
    bounds = np.cumsum([0] + [len(ids) for ids in encoded], dtype=np.int64)
    data = [text.encode() for text in texts]
    facts = {
        "python_version": platform.python_version(),
        "files": len(texts),
        "bytes": sum(map(len, data)),
        "tokens_per_epoch": len(tokens),
        "sha256": hashlib.sha256(b"\0".join(data)).hexdigest(),
    }
    return Corpus(tokens, bounds, facts)


def prepare(work: Path) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and corpus, made once and then read back, so that a resumed run sees the same rows."""
    tokenizer_file, corpus_file = work / "tokenizer.json", work / "corpus.npz"
    facts_file = work / "corpus.json"
    if facts_file.is_file():
        stored = np.load(corpus_file)
        facts = json.loads(facts_file.read_text())
        return Tokenizer.from_file(str(tokenizer_file)), Corpus(stored["tokens"], stored["bounds"], facts)
    texts = training_texts()
    tokenizer = train_tokenizer(texts)
    corpus = encode_corpus(tokenizer, texts)
    tokenizer.save(str(tokenizer_file), pretty=False)
    np.savez(corpus_file, tokens=corpus.tokens, bounds=corpus.bounds)
    facts_file.write_text(json.dumps(corpus.facts, indent=2) + "\n")
    return tokenizer, corpus


def epoch_rows(corpus: Corpus, seed: int, epoch: int) -> Tokens:
    """One epoch as packed rows of CONTEXT + 1 tokens in random order; a short last row is lost."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(corpus.bounds) - 1)
    pieces = [corpus.tokens[corpus.bounds[i] : corpus.bounds[i + 1]] for i in order]
    stream = np.concatenate([np.array([END_ID], dtype=np.uint16), *pieces])
    # Neighbouring rows share one token: the last target of a row is the first input of the next.
    rows = np.lib.stride_tricks.sliding_window_view(stream, CONTEXT + 1)[::CONTEXT]
    # A long file fills many rows on end; left in place they would make whole steps about one file only.
    return rows[generator.permutation(len(rows))]


class DemoRows:
    """The batch of any step: `size` rows, counted over all epochs; each epoch has its own order."""

    def __init__(self, corpus: Corpus, seed: int, size: int) -> None:
        self.corpus, self.seed, self.size = corpus, seed, size
        self.epoch, self.rows = 0, epoch_rows(corpus, seed, 0)
        self.rows_per_epoch = len(self.rows)
        self.tokens_per_step = float(size * CONTEXT)
        self.digest = f"{corpus.facts['sha256']} {seed} {size}"

    def at(self, step: int) -> dict[str, torch.Tensor]:
        batch = [self._row(position) for position in range(step * self.size, (step + 1) * self.size)]
        return {"tokens": torch.from_numpy(np.stack(batch).astype(np.int64))}

    def _row(self, position: int) -> Tokens:
        epoch, place = divmod(position, self.rows_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.rows = epoch, epoch_rows(self.corpus, self.seed, epoch)
        row: Tokens = self.rows[place]
        return row


# --- The held-out windows ----------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """The held-out modules as windows of at most CONTEXT + 1 tokens, and the bytes behind each token."""

    windows: list[list[int]]
    openings: list[list[int]]
    token_bytes: npt.NDArray[np.int64]


def load_held_out(tokenizer: Tokenizer) -> HeldOut:
    """Every module starts after an end token, as a file does in training; every token is a target once."""
    windows: list[list[int]] = []
    openings: list[list[int]] = []
    for _, text in read_held_out():
        ids = [END_ID, *tokenizer.encode(text).ids]
        pieces = [ids[at : at + CONTEXT + 1] for at in range(0, len(ids) - 1, CONTEXT)]
        windows += pieces
        openings.append(pieces[0])
    return HeldOut(windows, openings, bytes_per_token(tokenizer))
