"""Where a model lost most: the worst passages as both models read them, and the loss of each document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from snello.measure.rulers import NextTokens, Reading, Ruler
from snello.measure.text import Block
from snello.optimize.receipts import DocumentLoss, Passage

PASSAGE_TOKENS = 48
PASSAGES = 10
PER_DOCUMENT = 2


def worst_passages(
    ruler: Ruler, model: Any, original: Reading, lean: Reading, blocks: Sequence[Block]
) -> tuple[Passage, ...]:
    """The passages of 48 tokens that lost most, at most two of a document. `model`: the original."""
    if not isinstance(ruler, NextTokens) or not model.spec.causal:
        return ()
    spans: list[tuple[float, int, int]] = []
    differences = ruler.differences(original, lean, blocks)
    for number, difference in enumerate(differences):
        starts = range(0, max(1, len(difference) - PASSAGE_TOKENS // 2), PASSAGE_TOKENS // 2)
        spans += [(float(difference[s : s + PASSAGE_TOKENS].sum()), number, s) for s in starts]
    chosen: list[tuple[float, int, int]] = []
    for span in sorted(spans, reverse=True):
        near = [one for one in chosen if one[1] == span[1] and abs(one[2] - span[2]) < PASSAGE_TOKENS]
        same = [one for one in chosen if blocks[one[1]].document == blocks[span[1]].document]
        if not near and len(same) < PER_DOCUMENT:
            chosen.append(span)
        if len(chosen) == PASSAGES:
            break
    return tuple(_passage(model, original, lean, blocks[number], number, start) for _, number, start in chosen)


def _passage(model: Any, original: Reading, lean: Reading, block: Block, number: int, start: int) -> Passage:
    end = start + PASSAGE_TOKENS
    first = block.scored_from + start
    ids = block.tokens[first : block.scored_from + end].tolist()
    before, after = original.values[number][start:end], lean.values[number][start:end]
    return Passage(
        source=block.source,
        document=block.document,
        start=block.start + first,
        tokens=tuple(model.tokenizer.decode([token], skip_special=False) for token in ids),
        original=tuple(round(float(value), 4) for value in before),
        lean=tuple(round(float(value), 4) for value in after),
        difference=float((after.astype(np.float64) - before).sum()),
    )


def document_losses(
    ruler: Ruler, original: Reading, lean: Reading, blocks: Sequence[Block]
) -> tuple[DocumentLoss, ...]:
    """Loss of each document, worst first."""
    if not isinstance(ruler, NextTokens):
        return ()
    groups: dict[tuple[str, str], list[np.ndarray]] = {}
    for block, difference in zip(blocks, ruler.differences(original, lean, blocks), strict=True):
        groups.setdefault((block.source, block.document), []).append(difference)
    found = []
    for (source, document), pieces in groups.items():
        values = np.concatenate(pieces)
        loss = float(np.expm1(values.mean()))
        found.append(DocumentLoss(source=source, document=document, tokens=len(values), loss=loss))
    return tuple(sorted(found, key=lambda document: -document.loss))
