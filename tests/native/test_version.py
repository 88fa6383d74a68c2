"""What is stored on disk is bound to the bits of the core: other bits need another `NUMERICS_VERSION`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from snello.engine.native import NativeExecutor
from snello.models import shapes
from snello.models.spec import CacheFormat, Deployment
from snello.native import core
from snello.native.logits import top

# By version: of logits, of a page and, from 5 on, of the most likely tokens, over the formats of weights and caches.
DIGESTS = {
    1: "29dff0ecad31b9336912d244f6ed9a2219d0a8107d3cf7a0df1340d26a6ada1a",
    2: "9bc24150a56739a77850a240891c56e169bef4f02c250efdbe7d1668671f7126",
    3: "d9b678a130fbe84fac2a4574ec1e70f78cceac645748ad5e46e092efb467e691",
    4: "e9cd1e1606abe9cbcf373a9e2c3dfa88280c637f4f3a25f6ebce67ac239c4517",
    5: "6f86fc94ae1653d889cde6228e05b51dee5cf4cbd448335a5d82e0094ee47fd6",
}
WAYS: list[tuple[shapes.RandomWeights, CacheFormat]] = [("bf16", "bf16"), ("int8", "int8"), ("int4-all", "fp32")]


def test_other_bits_have_another_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE", str(tmp_path))
    tiny = shapes._llama(128, 2, 4, 2, 384, 512, max_position_embeddings=256, rope_theta=10000.0)
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    tokens = np.arange(7, 7 + 3 * 150, 3) % 512
    total = hashlib.sha256()
    for weights, cache in WAYS:
        model = shapes.random_model("tiny", weights, cache=cache)
        with NativeExecutor(model, Deployment(threads=1, context=256)) as executor, executor.session() as session:
            logits = session.feed(tokens)
            total.update(logits.tobytes())
            total.update(executor.page(session.pages[0]).tobytes())
            for most_likely in top(logits, 5):
                total.update(most_likely.tobytes())
    assert total.hexdigest() == DIGESTS.get(core.NUMERICS_VERSION), (
        "the core gives other bits than this number stands for: raise core.NUMERICS_VERSION and add the digest here"
    )
