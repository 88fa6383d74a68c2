"""One torch thread: tests run side by side, and results must not depend on how many there are."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
