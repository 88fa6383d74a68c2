"""One torch thread: tests run side by side, and results must not depend on how many there are. What adapters learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from snello.models import load
from snello.models.model import Model
from snello.techniques.adapt.train import Answer
from tests.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama"))


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    random = np.random.default_rng(0)
    return [Answer(random.integers(0, 300, 12).astype(np.int32), 8 + place % 3) for place in range(16)]
