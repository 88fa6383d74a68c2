"""The loop: it learns, the same seed gives the same hash, and no interruption can be told from its result."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snello.errors import SnelloError
from snello.models import load
from snello.models.reference import Reference
from snello.training import Rows, Trained, TrainOptions, train
from snello.training.checkpoint import FILE, digest, saved_step
from snello.training.loop import pieces
from tests.checkpoints import make_checkpoint

OPTIONS: dict[str, Any] = {"steps": 6, "rate": 1e-3, "warmup_steps": 2, "precision": "fp32"}


def rows(count: int = 7, length: int = 24, seed: int = 0) -> Rows:
    random = np.random.default_rng(3)
    return Rows([random.integers(1, 40, length).astype(np.int32) for _ in range(count)], batch=2, seed=seed)


def next_token(module: nn.Module, batch: Any) -> Tensor:
    logits = module(batch["tokens"][:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch["tokens"][:, 1:].flatten())


@pytest.fixture
def model(tmp_path: Path) -> Any:
    made = load(make_checkpoint(tmp_path / "model", "qwen3"))
    return lambda: Reference.from_model(made)


def run(module: nn.Module, **changes: Any) -> Trained:
    call = {key: changes.pop(key) for key in ("progress", "checkpoint_dir", "optimizers") if key in changes}
    data = changes.pop("batches", rows())
    loss = changes.pop("loss", next_token)
    return train(module, data, loss, TrainOptions(**OPTIONS | changes), **call)


def test_it_learns_and_the_same_seed_gives_the_same_hash(model: Any) -> None:
    one, other = run(model(), steps=30), run(model(), steps=30)
    assert one.digest == other.digest and one.losses == other.losses
    assert np.mean(one.losses[-5:]) < np.mean(one.losses[:3]) - 0.3
    assert one.tokens == 30 * 2 * 24 and one.steps == 30


@pytest.mark.parametrize("change", [{"batches": rows(seed=1)}, {"rate": 2e-3}, {"steps": 7}, {"clip": 0.1}], ids=str)
def test_what_decides_the_result_changes_its_hash(change: dict[str, Any], model: Any) -> None:
    assert run(model()).digest != run(model(), **change).digest


def noisy(module: nn.Module, batch: Any) -> Tensor:
    """A loss that draws: its random state must come back too."""
    found = next_token(module, batch)
    return found * (0.5 + torch.rand(()))


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_interrupted_and_resumed_is_the_same_hash(stop: int, model: Any, tmp_path: Path) -> None:
    whole = run(model(), loss=noisy)
    calls, handler = 0, signal.getsignal(signal.SIGINT)  # the one of a process in the background ignores it

    def cut(module: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 + stop:  # after the trial's three
            os.kill(os.getpid(), signal.SIGINT)
        return noisy(module, batch)

    with pytest.raises(KeyboardInterrupt, match="goes on"):
        run(model(), loss=cut, checkpoint_dir=tmp_path / "state")
    assert saved_step(tmp_path / "state") == stop
    again = run(model(), loss=noisy, checkpoint_dir=tmp_path / "state")
    assert again.digest == whole.digest and again.losses == whole.losses and again.resumed_from == stop
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_progress_raises_leaves_a_checkpoint(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("snello.training.loop.TELL_SECONDS", 0.0)
    heard: list[str] = []

    def stop(message: str, fraction: float) -> None:
        heard.append(message)
        if fraction > 0.4:
            raise GeneratorExit

    with pytest.raises(GeneratorExit):
        run(model(), progress=stop, checkpoint_dir=tmp_path)
    assert heard[0].startswith("train on 288 tokens: about") and "left" in heard[-1]
    assert run(model(), checkpoint_dir=tmp_path).digest == run(model()).digest


def test_killed_without_warning_it_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Killed while it writes, the file is the one before; nothing half written is read."""
    make_checkpoint(tmp_path / "model", "qwen3")
    code = textwrap.dedent(f"""
        import os, signal, torch
        torch.set_num_threads(1)
        from snello.models import load
        from snello.models.reference import Reference
        from tests.training.test_loop import run, next_token
        module, calls = Reference.from_model(load({str(tmp_path / "model")!r})), 0
        def cut(module, batch):
            global calls
            calls += 1
            if calls == 3 + 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return next_token(module, batch)
        run(module, loss=cut, save_seconds=0.0, checkpoint_dir=__import__("pathlib").Path({str(tmp_path / "state")!r}))
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL and saved_step(tmp_path / "state") == 3
    module = Reference.from_model(load(tmp_path / "model"))
    whole = Reference.from_model(load(tmp_path / "model"))
    assert run(module, checkpoint_dir=tmp_path / "state").digest == run(whole).digest


def interrupted(model: Any, folder: Path, **changes: Any) -> None:
    def stop(message: str, fraction: float) -> None:
        if fraction:
            raise KeyboardInterrupt

    import snello.training.loop as loop

    before, loop.TELL_SECONDS = loop.TELL_SECONDS, 0.0
    try:
        with pytest.raises(KeyboardInterrupt):
            run(model(), progress=stop, checkpoint_dir=folder, **changes)
    finally:
        loop.TELL_SECONDS = before


@pytest.mark.parametrize("change", [{"batches": rows(seed=1)}, {"rate": 2e-3}, {"seed": 5}], ids=str)
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, Any], model: Any, tmp_path: Path) -> None:
    interrupted(model, tmp_path)
    with pytest.raises(SnelloError, match="another training, which came to step 1") as caught:
        run(model(), checkpoint_dir=tmp_path, **change)
    assert "rm -r" in str(caught.value.hint)


def test_other_starting_weights_are_another_run(model: Any, tmp_path: Path) -> None:
    interrupted(model, tmp_path)
    module = model()
    with torch.no_grad():
        module.norm.weight[0] += 1
    with pytest.raises(SnelloError, match="another training"):
        run(module, checkpoint_dir=tmp_path)


def test_a_constant_run_can_be_ended_later_with_a_decay(model: Any, tmp_path: Path) -> None:
    """Its past would have been the same, so it may go on; a cosine's would not."""
    constant: dict[str, Any] = {"schedule": "constant", "steps": 20}
    interrupted(model, tmp_path, **constant)
    ended = run(model(), checkpoint_dir=tmp_path, schedule="constant", steps=4, decay_steps=2)
    assert ended.steps == 4 and ended.digest == run(model(), schedule="constant", steps=4, decay_steps=2).digest


def test_a_file_that_is_no_checkpoint_is_one_line(model: Any, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(SnelloError, match="cannot be read"):
        run(model(), checkpoint_dir=tmp_path)


def test_frozen_parameters_stay(model: Any) -> None:
    module = model()
    module.requires_grad_(False)
    module.layers[0].ffn.down.requires_grad_(True)
    before = {name: value.clone() for name, value in module.named_parameters()}
    run(module)
    changed = [name for name, value in module.named_parameters() if not torch.equal(value, before[name])]
    assert changed == ["layers.0.ffn.down.weight"]
    module.requires_grad_(False)
    with pytest.raises(SnelloError, match="nothing in this model is left to train"):
        run(module)


def test_recomputing_changes_memory_and_not_the_result(model: Any) -> None:
    module = model()
    assert run(module, recompute=True).digest == run(model()).digest
    assert "forward" not in module.layers[0].__dict__
    with pytest.raises(SnelloError, match="no block to recompute"):
        run(nn.Linear(3, 3), recompute=True)


def test_pieces_of_a_batch_add_up(model: Any) -> None:
    whole, cut = model(), model()
    one, other = run(whole, steps=3), run(cut, steps=3, accumulate=2)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    shares = [(share, len(piece["x"])) for share, piece in pieces({"x": torch.zeros(3)}, 5)]
    assert [size for _, size in shares] == [1, 1, 1] and sum(share for share, _ in shares) == pytest.approx(1)


def test_bf16_keeps_fp32_weights_and_is_another_result(model: Any) -> None:
    module = model()
    found = run(module, precision="bf16", steps=20)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert found.precision == "bf16" and found.digest != run(model(), steps=20).digest
    np.testing.assert_allclose(found.losses[-1], run(model(), steps=20).losses[-1], atol=0.1)


def test_the_callers_random_state_is_its_own(model: Any) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run(model(), seed=9, loss=noisy)
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_explodes_ends_the_run_without_a_checkpoint(model: Any, tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="not finite at step 1") as caught:
        run(model(), loss=lambda m, b: next_token(m, b) / torch.zeros(()), checkpoint_dir=tmp_path)
    assert "rate=0.0001" in str(caught.value.hint) and saved_step(tmp_path) is None


def test_too_long_is_refused_before_it_starts(model: Any) -> None:
    module = model()
    before = digest(module)
    with pytest.raises(SnelloError, match="tokens would take about .* min, 0.001 are allowed") as caught:
        run(module, steps=100_000, max_minutes=0.001)
    assert "fit" in str(caught.value.hint) and digest(module) == before


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"steps": True},
        {"steps": 1.5},
        {"rate": 0},
        {"rate": float("nan")},
        {"clip": "1"},
        {"schedule": "cosin"},
        {"precision": "fp16"},
        {"accumulate": 0},
        {"weight_decay": 1},
        {"decay_steps": 3},
        {"max_minutes": 0},
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SnelloError) as caught:
        TrainOptions(**{"steps": 3} | options)
    assert caught.value.hint


def test_rates() -> None:
    cosine = TrainOptions(steps=10, rate=1.0, warmup_steps=2)
    rates = [cosine.rate_at(step) for step in range(10)]
    assert rates[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0] and rates[-1] > 0
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    linear = TrainOptions(steps=4, rate=1.0, schedule="linear")
    assert [linear.rate_at(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    constant = TrainOptions(steps=4, rate=1.0, schedule="constant", decay_steps=2)
    assert [constant.rate_at(step) for step in range(4)] == [1.0, 1.0, 1.0, 0.5]


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from snello.training import TrainOptions; TrainOptions(steps=1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
