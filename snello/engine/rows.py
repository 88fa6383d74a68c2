"""A step as the core takes it: flat rows and page tables."""

from __future__ import annotations

import numpy as np

from snello.engine.sequence import Piece, Step
from snello.native import core


def batch_of(step: Step) -> core.Batch:
    """All rows of a step; logits come for the last `num_outputs` rows of each piece, in order."""
    pieces = step.pieces
    counts = [len(piece.tokens) for piece in pieces]
    if len(pieces) == 1:
        return _alone(pieces[0], counts[0])
    ends = np.cumsum(counts)
    outputs = [
        row
        for piece, end in zip(pieces, ends.tolist(), strict=True)
        for row in range(end - piece.num_outputs, end)
    ]  # fmt: skip
    return core.Batch(
        tokens=np.concatenate([np.array(piece.tokens, np.int32) for piece in pieces]),
        positions=np.concatenate([np.arange(piece.start, piece.end, dtype=np.int32) for piece in pieces]),
        sequences=np.repeat(np.arange(len(pieces), dtype=np.int32), counts),
        page_tables=_tables(pieces),
        lengths=np.array([piece.end for piece in pieces], np.int32),
        output_rows=np.array(outputs, np.int32),
        adapters=_adapters(pieces, counts),
    )


def _alone(piece: Piece, rows: int) -> core.Batch:
    return core.Batch(
        tokens=np.frombuffer(piece.tokens, np.int32),
        positions=np.arange(piece.start, piece.end, dtype=np.int32),
        sequences=np.zeros(rows, np.int32),
        page_tables=_table(piece)[None],
        lengths=np.array([piece.end], np.int32),
        output_rows=np.arange(rows - piece.num_outputs, rows, dtype=np.int32),
        adapters=_adapters([piece], [rows]),
    )


def _adapters(pieces: list[Piece], counts: list[int]) -> np.ndarray | None:
    """(rows,), or None where no row has one."""
    numbers = [piece.sequence.adapter for piece in pieces]
    return None if max(numbers) < 0 else np.repeat(np.array(numbers, np.int32), counts)


def _tables(pieces: list[Piece]) -> np.ndarray:
    """(pieces, most pages): shorter tables end in zeros, which no row reads."""
    tables = np.zeros((len(pieces), max(len(piece.sequence.pages) for piece in pieces)), np.int32)
    for row, piece in zip(tables, pieces, strict=True):
        row[: len(piece.sequence.pages)] = _table(piece)
    return tables


def _table(piece: Piece) -> np.ndarray:
    """A page that is gone is out of sight of all rows: any index will do."""
    table = np.array(piece.sequence.pages, np.int32)
    return np.maximum(table, 0) if piece.sequence.num_gone else table
