"""The user's text cut into `calib` (statistics), `select` (search) and `proof` (read once), by document.

Scored text comes as blocks: non-overlapping windows of at most 1,024 tokens (or the trained length) whose
first 64 tokens are not scored. Blocks of select and proof that share 13 tokens in a row with calib are
dropped and counted: a technique must not be judged on what it was fitted to. A document's blocks share a
cluster, the unit of resampling.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from snello.errors import SnelloError
from snello.measure.documents import Document, order
from snello.models.overlap import ngrams, seen_ngrams, without_overlap

WINDOW = 1_024
UNSCORED = 64
LEAST_SCORED = 16  # a shorter rest of a document is not worth a block

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One piece that is run on its own. Tokens [scored_from, T) are scored."""

    source: str
    document: str
    cluster: int
    start: int  # of its first own token within the document
    tokens: np.ndarray  # (T,) int32
    scored_from: int
    label: str | None = None
    other: np.ndarray | None = None  # second text of a pair

    @property
    def num_scored(self) -> int:
        return len(self.tokens) - self.scored_from


@dataclass(frozen=True, kw_only=True)
class Source:
    """One `--text`, cut."""

    name: str
    documents: int
    calib: tuple[np.ndarray, ...]
    select: tuple[Block, ...]
    proof: tuple[Block, ...]
    dropped_blocks: int = 0
    num_tokens: int = 0  # about: of all that was read, calib and what was dropped with it
    cut_short: bool = False  # the limit ended its select, not the text

    def tokens(self, cut: str) -> int:
        blocks = self.select if cut == "select" else self.proof
        return sum(block.num_scored for block in blocks)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """All sources; `sha256` names the whole input, so that a journal or a recipe knows its text again."""

    sources: tuple[Source, ...]
    sha256: str
    self_written: bool = False
    warnings: tuple[str, ...] = field(default=())

    @property
    def calib(self) -> list[np.ndarray]:
        """Calibration windows of all sources, in turn."""
        rounds = max((len(source.calib) for source in self.sources), default=0)
        return [s.calib[i] for i in range(rounds) for s in self.sources if i < len(s.calib)]

    def blocks(self, cut: str) -> list[Block]:
        return [block for source in self.sources for block in (source.select if cut == "select" else source.proof)]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many tokens each cut of a source holds at most: they bound time; the recipe records them."""

    calib: int = 32_768
    select: int = 65_536
    proof: int = 131_072
    calib_window: int = 512


def cut_text(
    documents: Sequence[Document],
    encode: Encode,
    *,
    trained: int,
    seed: int,
    limits: Limits,
    separator: int | None,
) -> Source:
    """One source, cut and windowed. `separator`: the token between short documents of one window.

    Answers of one model to one prompt stay on one side. Their prompts are ours and no text: that two of them begin
    alike, as every chat does, is no overlap.
    """
    ordered = order(documents, seed)
    if len(ordered) < 3:
        hint = "add documents, or blank lines between parts: the cut is by document"
        raise SnelloError(f"the text is {len(ordered)} document(s); it must be cut in three", hint, exit_code=4)
    parts = assign(ordered, limits)
    prefix = bos_prefix(encode)
    window = min(WINDOW, trained)
    calib = _calibration(parts["calib"], encode, prefix, min(limits.calib_window, window), limits.calib)
    select = windows(parts["select"], encode, prefix, window, limits.select, separator)
    proof = windows(parts["proof"], encode, prefix, window, limits.proof, separator)
    prompts = [np.array(one.tokens[: one.prompt_tokens], np.int32) for one in documents if one.prompt_tokens]
    seen = np.setdiff1d(seen_ngrams(calib), seen_ngrams(prompts))
    kept_select, kept_proof = without_overlap(select, seen), without_overlap(proof, seen)
    return Source(
        name=documents[0].source,
        documents=len(ordered),
        calib=tuple(calib),
        select=tuple(kept_select),
        proof=tuple(kept_proof),
        dropped_blocks=len(select) + len(proof) - len(kept_select) - len(kept_proof),
        num_tokens=_num_tokens(parts, (*select, *proof)),
        cut_short=sum(block.num_scored for block in select) >= limits.select,
    )


def assign(documents: Sequence[Document], limits: Limits) -> dict[str, list[Document]]:
    """Documents, in order, each to the cut that is furthest below its share of the characters.

    Calibration takes at most 30%, and no more than about the tokens that it needs, or six characters for each; the rest
    is divided three to four between select and proof.
    """
    total = sum(map(_size, documents)) or 1
    calib_share = min(0.3, (1.1 if documents[0].tokens else 6) * limits.calib / total)
    shares = {"calib": calib_share, "select": (1 - calib_share) * 3 / 7, "proof": (1 - calib_share) * 4 / 7}
    parts: dict[str, list[Document]] = {name: [] for name in shares}
    filled = dict.fromkeys(shares, 0)
    placed: dict[tuple[int, ...], str] = {}  # of each prompt that a model answered
    for document in documents:
        name = min(shares, key=lambda part: filled[part] / shares[part])
        if document.prompt_tokens:
            name = placed.setdefault(document.tokens[: document.prompt_tokens], name)
        parts[name].append(document)
        filled[name] += _size(document)
    return parts


def _num_tokens(parts: Mapping[str, Sequence[Document]], judged: Sequence[Block]) -> int:
    """Of all three cuts, from those of select and proof by their share of the characters."""
    sizes = {name: sum(map(_size, documents)) for name, documents in parts.items()}
    read = sum(len(block.tokens) for block in judged)
    return round(read * sum(sizes.values()) / max(1, sizes["select"] + sizes["proof"]))


def _size(document: Document) -> int:
    return len(document.text) or len(document.tokens)


def bos_prefix(encode: Encode) -> list[int]:
    """The special tokens that this tokenizer puts before a text, to stand before every window."""
    bare, marked = encode("a"), encode("a a")
    prefix: list[int] = []
    for one, other in zip(bare, marked, strict=False):
        if one != other or len(prefix) >= min(len(bare), 2) - 1:
            break
        prefix.append(one)
    empty = encode("")
    return [token for token in prefix if token in empty]


def _document_tokens(document: Document, encode: Encode, prefix: list[int]) -> list[int]:
    tokens = list(document.tokens) or encode(document.text)
    return tokens[len(prefix) :] if prefix and tokens[: len(prefix)] == prefix else tokens


def _calibration(
    documents: Sequence[Document], encode: Encode, prefix: list[int], window: int, most: int
) -> list[np.ndarray]:
    """Windows for statistics: documents one after the other, whole windows only (one shorter, if there is no
    more).
    """
    pieces: list[np.ndarray] = []
    rest: list[int] = []
    own = window - len(prefix)
    for document in documents:
        rest += _document_tokens(document, encode, prefix)
        while len(rest) >= own and sum(map(len, pieces)) + window <= max(most, window):
            pieces.append(np.array(prefix + rest[:own], np.int32))
            rest = rest[own:]
        if sum(map(len, pieces)) + window > most and pieces:
            return pieces
    return pieces or [np.array(prefix + rest, np.int32)]


def windows(
    documents: Sequence[Document],
    encode: Encode,
    prefix: list[int],
    window: int,
    most: int,
    separator: int | None = None,
) -> list[Block]:
    """Blocks of these documents, until they hold `most` scored tokens.

    A document of at least half a window has windows of its own; shorter ones are gathered, the separator
    between them.
    """
    blocks: list[Block] = []
    scored = 0
    gathered: list[int] = []
    first: Document | None = None
    own = window - len(prefix)

    def add(document: Document, cluster: int, tokens: list[int]) -> int:
        fresh = _cut(document, cluster, tokens, prefix, window)
        blocks.extend(fresh)
        return sum(block.num_scored for block in fresh)

    for cluster, document in enumerate(documents):
        if scored >= most:
            break
        tokens = _document_tokens(document, encode, prefix)
        if len(tokens) >= own // 2:
            scored += add(document, cluster, tokens)
            continue
        first = first or document
        gathered += [*([separator] if gathered and separator is not None else []), *tokens]
        if len(gathered) >= own:
            scored += add(first, cluster, gathered[:own])
            gathered, first = [], None
    if first is not None and scored < most:
        add(first, len(documents), gathered)
    return blocks


def _cut(document: Document, cluster: int, tokens: list[int], prefix: list[int], window: int) -> list[Block]:
    own = window - len(prefix)
    unscored = min(UNSCORED, window // 2)
    pieces = [(start, tokens[start : start + own]) for start in range(0, len(tokens), own)]
    return [
        Block(
            source=document.source,
            document=document.name,
            cluster=cluster,
            start=start,
            tokens=np.array(prefix + piece, np.int32),
            scored_from=unscored,
        )
        for start, piece in pieces
        if len(prefix) + len(piece) >= unscored + LEAST_SCORED
    ]


def unseen(blocks: Sequence[Block], seen: np.ndarray) -> list[Block]:
    """The blocks of which neither text holds anything that was seen."""
    kept = without_overlap(blocks, seen)
    return [block for block in kept if block.other is None or not np.isin(ngrams(block.other), seen).any()]


def drop_shared(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Several texts may quote each other: every cut also loses the blocks that another text's calib holds."""
    seen = seen_ngrams([piece for source in sources for piece in source.calib])
    result = []
    for source in sources:
        select, proof = unseen(source.select, seen), unseen(source.proof, seen)
        lost = len(source.select) + len(source.proof) - len(select) - len(proof)
        dropped = source.dropped_blocks + lost
        kept = dataclasses.replace(source, select=tuple(select), proof=tuple(proof), dropped_blocks=dropped)
        result.append(kept)
    return tuple(result)


# ---- one document a block (encoders) ----


def cut_examples(documents: Sequence[Document], encode: Encode, *, longest: int, seed: int, limits: Limits) -> Source:
    """Labelled or single texts: each is a block and its own cluster; `order` dropped exact repeats."""
    ordered = order(documents, seed)
    if len(ordered) < 30:
        raise SnelloError(f"the text is {len(ordered)} examples", "give at least some hundreds", exit_code=4)
    parts = assign(ordered, dataclasses.replace(limits, calib=limits.calib * 2))
    calib = [_clip(encode(document.text), longest) for document in parts["calib"]]
    chosen, total = [], 0
    for piece in calib:
        if total >= limits.calib:
            break
        chosen.append(piece)
        total += len(piece)
    judged = ("select", "proof")
    cuts = {name: [_example(d, i, encode, longest) for i, d in enumerate(parts[name])] for name in judged}
    seen = seen_ngrams(chosen)
    kept = {name: tuple(unseen(cuts[name], seen)) for name in judged}
    return Source(
        name=documents[0].source,
        documents=len(ordered),
        calib=tuple(chosen),
        select=kept["select"],
        proof=kept["proof"],
        dropped_blocks=sum(len(cuts[name]) - len(kept[name]) for name in judged),
        num_tokens=_num_tokens(parts, [block for name in judged for block in cuts[name]]),
    )


def _example(document: Document, cluster: int, encode: Encode, longest: int) -> Block:
    tokens = _clip(encode(document.text), longest)
    return Block(
        source=document.source,
        document=document.name,
        cluster=cluster,
        start=0,
        tokens=tokens,
        scored_from=0,
        label=document.label,
        other=None if document.other is None else _clip(encode(document.other), longest),
    )


def _clip(ids: list[int], longest: int) -> np.ndarray:
    """At most `longest` tokens; the closing token stays."""
    return np.array(ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]], np.int32)


# ---- uncut: where nothing was fitted here ----


def uncut(
    documents: Sequence[Document],
    encode: Encode,
    *,
    causal: bool,
    longest: int,
    seed: int,
    most: int,
    separator: int | None,
) -> Source:
    """One source of which all is `proof`, up to `most` scored tokens. `causal`: read in windows, not by examples."""
    ordered = order(documents, seed)
    if causal:
        blocks = windows(ordered, encode, bos_prefix(encode), min(WINDOW, longest), most, separator)
    else:
        blocks, scored = [], 0
        for number, document in enumerate(ordered):
            if scored >= most:
                break
            blocks.append(_example(document, number, encode, longest))
            scored += blocks[-1].num_scored
    read = sum(block.num_scored for block in blocks)
    return Source(
        name=documents[0].source,
        documents=len(ordered),
        calib=(),
        select=(),
        proof=tuple(blocks),
        num_tokens=sum(len(block.tokens) for block in blocks),
        cut_short=read >= most,
    )


def fingerprint(documents: Sequence[Document], seed: int, limits: Limits) -> str:
    """Names this text, this order and these limits."""
    digest = hashlib.sha256(f"{seed}{limits}".encode())
    for document in documents:
        digest.update(f"{document.source}\0{document.text}\0{document.label}\0{document.other}\0".encode())
        digest.update(np.array(document.tokens, np.int32).tobytes())
    return digest.hexdigest()
