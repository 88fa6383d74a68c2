"""A peer that is no engine: what it takes is known, and it writes down what it was asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from snello.measure.peers.contenders import (
    Contender,
    Peer,
    Subject,
    subject_of_model,
)
from snello.measure.peers.environments import Environment
from snello.models import load

# An engine that takes 10 ms for a prompt and 2 ms for a step, and writes down what it was asked.
ENGINE = """
import os
import time

def open_engine(setup):
    return Fake(setup)

class Fake:
    def __init__(self, setup):
        self.setup = setup
        self.log = open(setup.options["log"], "a")

    def describe(self):
        print("a library that prints")
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
        options = {"threads": self.setup.threads, "model": self.setup.model, "isa": isa}
        return {"engine": "fake", "version": "1", "settings": options, "bytes_per_token": 1000000}

    def answer(self, prompts, generate):
        if "break" in self.setup.options:
            raise RuntimeError("the fake breaks")
        self.log.write(repr([prompts, generate]) + "\\n")
        self.log.flush()
        answers, now = [([], []) for _ in prompts], time.perf_counter() + 0.010
        for step in range(generate):
            for tokens, moments in answers:
                tokens.append(step)
                moments.append(now + 0.002 * step)
        time.sleep(max(0.0, moments[-1] - time.perf_counter()))
        return answers

    def score(self, prompt, answer):
        import numpy as np
        logits = np.zeros((len(answer), 4096), np.float32)  # as likely, all of them
        logits[:, 0] = len(prompt) - 4  # the first token more so behind longer prompts
        return logits
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A peer whose environment is this Python and whose engine is the one above."""
    monkeypatch.setenv("SNELLO_PEERS", str(tmp_path / "peers"))
    python = tmp_path / "peers" / "fake" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    engine, log = tmp_path / "engine.py", tmp_path / "asked.txt"
    engine.write_text(ENGINE)
    environment = Environment(name="fake", proof="import json")
    return Peer(
        name="fake",
        environment=environment,
        converter=environment,
        engine=str(engine),
        models={"bf16": "bf16.bin", "int4": "int4.bin"},
        settings=({"log": str(log)},),
    )


def fake_contender(fake: Peer, **options: str) -> Contender:
    return Contender(name="fake-one", weights="bf16", peer=fake, options={**fake.settings[0], **options})


def demo_subject(fake: Peer) -> Subject:
    subject = subject_of_model(load("demo"), "demo")
    model = fake_contender(fake).converted(subject)
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_bytes(b"weights")
    return subject
