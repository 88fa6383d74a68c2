"""Trains the embedded model `demo`: owns its schedule and what is written at the end; the loop is `snello.training`.

`demo_data` has the text, the tokenizer and the rows, `demo_model` the shape, the optimizers and the loss.

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
import shutil
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from scripts.demo_data import CONTEXT, END_ID, END_TOKEN, Corpus, DemoRows, HeldOut, load_held_out, prepare
from scripts.demo_model import PEAK_RATE, losses, measure, new_model, optimizers
from snello.training import Trained, TrainOptions, train
from snello.training.checkpoint import saved_step
from snello.training.data import Batch

WARM_UP_STEPS = 40
LOG_SECONDS = 20.0
LAST_STEPS = 20  # whose mean loss is in the record


# --- The run -----------------------------------------------------------------------------------------


def schedule(steps: int, decay_steps: int, seed: int, threads: int) -> TrainOptions:
    """Warm-up, constant, linear decay to zero over the last `decay_steps` of `steps`."""
    return TrainOptions(
        steps=steps,
        rate=PEAK_RATE,
        schedule="constant",
        warmup_steps=WARM_UP_STEPS - 1,
        decay_steps=decay_steps,
        seed=seed,
        precision="bf16",
        threads=threads,
    )


def step_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean nats a token of one batch."""
    assert isinstance(model, LlamaForCausalLM)
    return losses(model, batch["tokens"], bf16=True).mean()


class Log:
    """The loop's progress as lines with the time of day, now and then."""

    def __init__(self) -> None:
        self.last = -LOG_SECONDS

    def __call__(self, message: str, fraction: float) -> None:
        now = time.monotonic()
        if now - self.last >= LOG_SECONDS or fraction == 1.0:
            self.last = now
            say(message)


def say(text: str) -> None:
    """One log line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


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


def export(
    model: LlamaForCausalLM,
    done: Trained,
    plan: TrainOptions,
    tokenizer: Tokenizer,
    corpus: Corpus,
    held: HeldOut,
    out: Path,
) -> None:
    """Write the model in BF16 with its tokenizer and its record; the record measures what was written."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID)
    model.to(torch.bfloat16).save_pretrained(out)
    # The weights are written readable by their owner only; a file that is shipped is for everyone.
    (out / "model.safetensors").chmod(0o644)
    write_tokenizer(tokenizer, out)
    shipped = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    result = measure(shipped, held.windows, held.token_bytes, bf16=False)
    last = done.losses[-LAST_STEPS:]
    facts = {
        **corpus.facts,
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "context": CONTEXT,
        "seed": plan.seed,
        "steps": done.steps,
        "decay_steps": plan.decay_steps,
        "tokens_seen": done.tokens,
        "seconds": round(done.seconds),
        "train_nats_per_token": sum(last) / len(last),
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
    folder = options.work / "training"
    if not options.resume:
        shutil.rmtree(folder, ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer, corpus = prepare(options.work)
    model, rows = new_model(options.seed), DemoRows(corpus, options.seed, options.batch)
    plan = schedule(options.steps, options.decay_steps, options.seed, options.threads)
    if options.decay_now is not None:
        reached = saved_step(folder) or 0
        plan = schedule(reached + options.decay_now, options.decay_now, options.seed, options.threads)
    say(f"{corpus.facts} to step {plan.steps}, decay over {plan.decay_steps}")
    try:
        done = train(model, rows, step_loss, plan, progress=Log(), checkpoint_dir=folder, optimizers=optimizers)
    except KeyboardInterrupt:
        say(f"stopped at step {saved_step(folder)}, checkpoint saved")
        return 0
    export(model, done, plan, tokenizer, corpus, load_held_out(tokenizer), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
