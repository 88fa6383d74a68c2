"""What calibration text says about a smaller vocabulary, beside counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from snello.optimize.words import leaving, seen

WINDOWS = [np.array(tokens, np.int32) for tokens in ([7, 7, 9], [0, 7, 50], [9, 8, 8], [8, 51, 52])]


def test_what_half_of_the_text_would_miss() -> None:
    """Windows 0 and 2 choose 7, 8, 9 and the earliest others; 0, 7, 50, 8, 51, 52 are asked for."""
    assert seen(WINDOWS) == 7
    assert leaving(WINDOWS, 3) == pytest.approx(4 / 6)
    assert leaving(WINDOWS, 4) == pytest.approx(3 / 6)  # 0 is the earliest that was not chosen
    assert leaving(WINDOWS, 53) == 0.0


def test_too_little_text_promises_nothing() -> None:
    assert leaving([], 10) == leaving(WINDOWS[:1], 10) == 1.0


def test_more_words_never_miss_more() -> None:
    generator = np.random.default_rng(0)
    windows = [np.minimum(generator.zipf(1.3, 512), 1999).astype(np.int32) for _ in range(8)]
    missed = [leaving(windows, keep) for keep in (400, 800, 1600, 2000)]
    assert missed == sorted(missed, reverse=True) and missed[0] > missed[-1] == 0.0
