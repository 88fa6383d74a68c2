"""Trains the embedded model `demo`: owns its schedule, its run and what is written at the end.

`demo_data` has the text, the tokenizer and the rows, `demo_model` the shape, the optimizer and the loss.

The model is shipped, so anyone must be able to make it again: the data is the standard library of the
running Python, the order follows from a seed, and every number that matters is a constant below or an
option.  It is a plain Llama with as many key-value heads as heads, because the tools that make a model
lean have the most to show on a model that nobody has made lean before.

The schedule is warm-up, constant, linear decay to zero.  The constant part has no fixed end, so a run can
be stopped at any step and finished with a decay of any length. In the root of the repository:

    python -m scripts.train_demo --steps 3000 --decay-steps 750       a whole run
    kill -TERM <pid>                                                  saves a checkpoint and ends
    python -m scripts.train_demo --resume --decay-now 200             decays over the next 200 steps, exports
    python -m scripts.train_demo --resume --decay-now 0 --out DIR     exports the checkpoint as it is
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from scripts.demo_data import CONTEXT, END_ID, END_TOKEN, Corpus, HeldOut, batches, load_held_out, prepare
from scripts.demo_model import PEAK_RATE, Optimizer, losses, measure, new_model

WARM_UP_STEPS = 40
CLIP_NORM = 1.0
SAVE_EVERY = 200
LOG_EVERY = 20


# --- The run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Warm-up, constant, linear decay to zero over the last `decay_steps` of `steps`."""

    steps: int
    decay_steps: int

    def rate(self, step: int) -> float:
        """Learning rate of a step, the first being 0; the last step still learns a little."""
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        decay = min(1.0, (self.steps - step) / max(1, self.decay_steps))
        return PEAK_RATE * min(warm, decay)


@dataclass
class Run:
    """What a checkpoint holds: weights, optimizer, and how far the run has come."""

    model: LlamaForCausalLM
    optimizer: Optimizer
    seed: int
    step: int = 0
    rows: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan

    def save(self, path: Path) -> None:
        """Write beside, then rename: a run that is cut while saving still has its older checkpoint."""
        beside = path.with_suffix(".new")
        state = {name: getattr(self, name) for name in ("seed", "step", "rows", "seconds", "train_loss")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"rng": torch.get_rng_state()}, beside)
        os.replace(beside, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        for name in ("seed", "step", "rows", "seconds", "train_loss"):
            setattr(self, name, state[name])


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between steps."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def one_step(run: Run, rows: torch.Tensor, rate: float) -> float:
    """One update; returns the mean nats per token before it."""
    loss = losses(run.model, rows, bf16=True).mean()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP_NORM)
    run.optimizer.step(rate)
    run.step += 1
    run.rows += len(rows)
    return float(loss.detach())


def say(text: str) -> None:
    """One log line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def train(run: Run, corpus: Corpus, held: HeldOut, plan: Schedule, batch: int, checkpoint: Path) -> bool:
    """Train to the end of the schedule; False when a signal ended it early, with a checkpoint saved."""
    stop = StopRequest()
    supply = batches(corpus, run.seed, batch, run.rows)
    recent: list[float] = []
    mark = time.monotonic()
    while run.step < plan.steps and not stop.asked:
        rate = plan.rate(run.step)
        recent.append(one_step(run, next(supply), rate))
        if run.step % LOG_EVERY == 0 or run.step == plan.steps:
            now = time.monotonic()
            spent, mark = now - mark, now
            run.seconds += spent
            run.train_loss = sum(recent) / len(recent)
            say(progress(run, plan, rate, spent / len(recent), len(recent) * batch * CONTEXT / spent))
            recent = []
        if run.step % SAVE_EVERY == 0 and run.step < plan.steps:
            report_and_save(run, held, checkpoint)
            run.seconds, mark = run.seconds + time.monotonic() - mark, time.monotonic()
    run.save(checkpoint)
    return run.step >= plan.steps


def progress(run: Run, plan: Schedule, rate: float, seconds_per_step: float, speed: float) -> str:
    """The line that says how the run is doing."""
    left = (plan.steps - run.step) * seconds_per_step / 60
    return (
        f"step {run.step}/{plan.steps} loss {run.train_loss:.4f} rate {rate:.2e} "
        f"{speed:.0f} tokens/s left {left:.0f} min"
    )


def report_and_save(run: Run, held: HeldOut, checkpoint: Path) -> None:
    """Checkpoint first, since it is what matters if the run is cut; then measure on the openings."""
    run.save(checkpoint)
    result = measure(run.model, held.openings, held.token_bytes, bf16=True)
    say(f"step {run.step} held-out openings {result['bits_per_byte']:.4f} bits/byte, checkpoint saved")


# --- The result --------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """`tokenizer.json` in one line, and the small file that tells `transformers` how to read it."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TOKEN,
        "eos_token": END_TOKEN,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def export(run: Run, tokenizer: Tokenizer, corpus: Corpus, held: HeldOut, plan: Schedule, out: Path) -> None:
    """Write the model in BF16 with its tokenizer and its record; the record measures what was written."""
    out.mkdir(parents=True, exist_ok=True)
    run.model.generation_config = GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID)
    run.model.to(torch.bfloat16).save_pretrained(out)
    # The weights are written readable by their owner only; a file that is shipped is for everyone.
    (out / "model.safetensors").chmod(0o644)
    write_tokenizer(tokenizer, out)
    shipped = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    result = measure(shipped, held.windows, held.token_bytes, bf16=False)
    facts = {
        **corpus.facts,
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "context": CONTEXT,
        "seed": run.seed,
        "steps": run.step,
        "decay_steps": plan.decay_steps,
        "tokens_seen": run.rows * CONTEXT,
        "seconds": round(run.seconds),
        "train_nats_per_token": run.train_loss,
        "held_out": result,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    nats, bits = result["nats_per_token"], result["bits_per_byte"]
    say(f"written to {out}: held-out {nats:.4f} nats/token, {bits:.4f} bits/byte")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the script."""
    parser = argparse.ArgumentParser(description="Train the embedded model `demo`.")
    parser.add_argument("--steps", type=int, default=2600, help="last step of the schedule")
    parser.add_argument("--decay-steps", type=int, default=650, help="steps of the final linear decay")
    parser.add_argument("--decay-now", type=int, metavar="D", help="end D steps on, decaying")
    parser.add_argument("--batch", type=int, default=4, help=f"rows of {CONTEXT} tokens in a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    parser.add_argument("--out", type=Path, default=Path("snello/models/demo"))
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="checkpoint and encoded data")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train, or continue, and write the model when the schedule is complete."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = options.work / "checkpoint.pt"
    tokenizer, corpus = prepare(options.work)
    held = load_held_out(tokenizer)
    model = new_model(options.seed)
    run = Run(model, Optimizer(model), options.seed)
    if options.resume:
        run.load(checkpoint)
    plan = Schedule(options.steps, options.decay_steps)
    if options.decay_now is not None:
        plan = Schedule(run.step + options.decay_now, options.decay_now)
    say(f"{corpus.facts} from step {run.step} to {plan.steps}, decay over {plan.decay_steps}")
    if run.step < plan.steps and not train(run, corpus, held, plan, options.batch, checkpoint):
        say(f"stopped at step {run.step}, checkpoint saved")
        return 0
    export(run, tokenizer, corpus, held, plan, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
