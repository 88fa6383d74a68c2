"""Bytes of one packed matrix (docs/numerics.md, Layout), from its shape and format alone.

Plans and ceilings are computed before any time is spent, so this asks neither for weights nor for the core; a test
holds it to the core's own count.
"""

from __future__ import annotations

from snello.models.spec import BITS, GROUPED, Format

PANEL_ROWS, BLOCK_COLUMNS = 16, 64
LINE = 64


def packed_bytes(form: Format, rows: int, columns: int) -> int:
    if form.skip:
        return channel_scales(form, rows, columns) + channel_weights(form, rows, columns)
    panels = padded(rows, PANEL_ROWS) // PANEL_ROWS
    if form.weights == "int8":
        return panels * (2 * LINE + PANEL_ROWS * padded(columns, BLOCK_COLUMNS))
    if form.weights in GROUPED:
        columns = padded(columns, BLOCK_COLUMNS)
        scales = padded(PANEL_ROWS * -(-columns // form.group_size), LINE)
        return panels * (LINE + scales + PANEL_ROWS * columns * BITS[form.weights] // 8)
    return panels * padded(PANEL_ROWS * columns * BITS[form.weights] // 8, LINE)


def channel_weights(form: Format, rows: int, columns: int) -> int:
    """Of a matrix that is stored by channel."""
    return _slab_rows(form, rows) * padded(columns, BLOCK_COLUMNS) * BITS[form.weights] // 8


def channel_scales(form: Format, rows: int, columns: int) -> int:
    groups = -(-padded(columns, BLOCK_COLUMNS) // form.group_size) if form.group_size else 0
    return _slab_rows(form, rows) * (4 + groups)


def _slab_rows(form: Format, rows: int) -> int:
    """Rows that are stored by channel fill lines of 64 bytes."""
    return padded(rows, 8 * LINE // BITS[form.weights])


def padded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
