"""Trains the embedded model `demo`: owns its data, its tokenizer, its shape and its schedule.

The model is shipped, so anyone must be able to make it again: the data is the standard library of the
running Python, the order follows from a seed, and every number that matters is a constant below or an
option.  It is a plain Llama with as many key-value heads as heads, because the tools that make a model
lean have the most to show on a model that nobody has made lean before.

The schedule is warm-up, constant, linear decay to zero.  The constant part has no fixed end, so a run can
be stopped at any step and finished with a decay of any length:

    python -m scripts.train_demo --steps 3000 --decay-steps 750       a whole run
    kill -TERM <pid>                                                  saves a checkpoint and ends
    python -m scripts.train_demo --resume --decay-now 200             decays over the next 200 steps, exports
    python -m scripts.train_demo --resume --decay-now 0 --out DIR     exports the checkpoint as it is
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from snello.models.demo.held_out import is_held_out, read_held_out, read_source, stdlib_directory

Tokens = npt.NDArray[np.uint16]

CONTEXT = 1024
VOCABULARY = 4096
END_TOKEN = "<|endoftext|>"
END_ID = 0
PEAK_RATE = 3e-3
WARM_UP_STEPS = 40
CLIP_NORM = 1.0
SAVE_EVERY = 200
LOG_EVERY = 20

# Newlines and indentation are tokens of their own, never glued to a word: a prompt that ends with a colon,
# a newline or an indentation is then cut exactly as the training text was.  Digits stand alone, and a word
# takes at most one sign before it ("(self", ".join", " in", "_name").
SPLIT = r"\n+| {2,}|\d|[^\s\p{L}\d]?\p{L}+| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"

# Installed packages are not the standard library, and the last two are made by the build of the
# interpreter: they hold its paths and compiler options.
FOREIGN = ("site-packages", "dist-packages", "ensurepip", "__pycache__")
GENERATED = ("config-", "_sysconfigdata")


# --- The training text -------------------------------------------------------------------------------


def source_files(root: Path) -> list[Path]:
    """The Python files to learn from, in a fixed order: no bundles, nothing generated, nothing held out."""
    chosen = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root).as_posix()
        foreign = not set(FOREIGN).isdisjoint(relative.split("/")) or relative.startswith(GENERATED)
        if not foreign and not is_held_out(relative):
            chosen.append(path)
    return sorted(chosen, key=lambda path: path.relative_to(root).as_posix())


def is_python(path: Path) -> bool:
    """Whether the file decodes and splits into Python tokens; the test suite holds some that do not."""
    try:
        with path.open("rb") as stream:
            for _ in tokenize.tokenize(stream.readline):
                pass
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return False
    return True


def training_texts() -> list[str]:
    """Every distinct text to learn from, in the order of the files."""
    root = stdlib_directory()
    texts = (read_source(path) for path in source_files(root) if is_python(path))
    return list(dict.fromkeys(text for text in texts if text.strip()))


# --- The tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE on the training texts; every text comes back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """How many bytes of text each token stands for; the byte-level alphabet has one letter per byte."""
    lengths = [len(tokenizer.id_to_token(index) or "") for index in range(tokenizer.get_vocab_size())]
    lengths[END_ID] = 0
    return np.array(lengths, dtype=np.int64)


# --- Tokens, rows, batches ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """All documents as one array: number `i` is `tokens[bounds[i]:bounds[i + 1]]`, its end token included."""

    tokens: Tokens
    bounds: npt.NDArray[np.int64]
    facts: dict[str, Any]


def encode_corpus(tokenizer: Tokenizer, texts: list[str]) -> Corpus:
    """The training texts as tokens, with the facts that the training record repeats."""
    encoded = [[*encoding.ids, END_ID] for encoding in tokenizer.encode_batch(texts)]
    tokens = np.array([token for ids in encoded for token in ids], dtype=np.uint16)
    bounds = np.cumsum([0] + [len(ids) for ids in encoded], dtype=np.int64)
    data = [text.encode() for text in texts]
    facts = {
        "python_version": platform.python_version(),
        "files": len(texts),
        "bytes": sum(map(len, data)),
        "tokens_per_epoch": len(tokens),
        "sha256": hashlib.sha256(b"\0".join(data)).hexdigest(),
    }
    return Corpus(tokens, bounds, facts)


def prepare(work: Path) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and corpus, made once and then read back, so that a resumed run sees the same rows."""
    tokenizer_file, corpus_file = work / "tokenizer.json", work / "corpus.npz"
    facts_file = work / "corpus.json"
    if facts_file.is_file():
        stored = np.load(corpus_file)
        facts = json.loads(facts_file.read_text())
        return Tokenizer.from_file(str(tokenizer_file)), Corpus(stored["tokens"], stored["bounds"], facts)
    texts = training_texts()
    tokenizer = train_tokenizer(texts)
    corpus = encode_corpus(tokenizer, texts)
    tokenizer.save(str(tokenizer_file), pretty=False)
    np.savez(corpus_file, tokens=corpus.tokens, bounds=corpus.bounds)
    facts_file.write_text(json.dumps(corpus.facts, indent=2) + "\n")
    return tokenizer, corpus


def epoch_rows(corpus: Corpus, seed: int, epoch: int) -> Tokens:
    """One epoch as packed rows of CONTEXT + 1 tokens in random order; a short last row is lost."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(corpus.bounds) - 1)
    pieces = [corpus.tokens[corpus.bounds[i] : corpus.bounds[i + 1]] for i in order]
    stream = np.concatenate([np.array([END_ID], dtype=np.uint16), *pieces])
    # Neighbouring rows share one token: the last target of a row is the first input of the next.
    rows = np.lib.stride_tricks.sliding_window_view(stream, CONTEXT + 1)[::CONTEXT]
    # A long file fills many rows on end; left in place they would make whole steps about one file only.
    return rows[generator.permutation(len(rows))]


def batches(corpus: Corpus, seed: int, size: int, first_row: int) -> Iterator[torch.Tensor]:
    """Batches for ever, from a position that is counted in rows over all epochs."""
    rows_per_epoch = len(epoch_rows(corpus, seed, 0))
    epoch, row = divmod(first_row, rows_per_epoch)
    rows = epoch_rows(corpus, seed, epoch)
    while True:
        batch = [rows[row : row + size]]
        row += size
        if row >= len(rows):
            epoch, row = epoch + 1, row - len(rows)
            rows = epoch_rows(corpus, seed, epoch)
            batch.append(rows[:row])
        yield torch.from_numpy(np.concatenate(batch).astype(np.int64))


# --- The model ---------------------------------------------------------------------------------------


def demo_config() -> LlamaConfig:
    """The shape of `demo`: about 9.7 million parameters, one key-value head for each head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=896,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """A model with random weights; what writes into the residual stream starts smaller with depth."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(demo_config())
    scale = 1.0 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(scale)
    return model


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the embedding and the gains, stepped as one.

    Muon (Jordan et al. 2024) orthogonalizes the momentum of a matrix; on a small budget of tokens it reaches a loss
    with far fewer of them than AdamW. Its rate is matched to AdamW's update size (Liu et al. 2025), so both share one
    schedule.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        named = dict(model.named_parameters())
        matrices = [value for name, value in named.items() if value.ndim == 2 and "embed" not in name]
        others = [value for name, value in named.items() if value.ndim != 2 or "embed" in name]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]

    def step(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def losses(model: LlamaForCausalLM, rows: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Nats of every target token of the rows, flat."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


# --- The held-out measure ----------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """The held-out modules as windows of at most CONTEXT + 1 tokens, and the bytes behind each token."""

    windows: list[list[int]]
    openings: list[list[int]]
    token_bytes: npt.NDArray[np.int64]


def load_held_out(tokenizer: Tokenizer) -> HeldOut:
    """Every module starts after an end token, as a file does in training; every token is a target once."""
    windows: list[list[int]] = []
    openings: list[list[int]] = []
    for _, text in read_held_out():
        ids = [END_ID, *tokenizer.encode(text).ids]
        pieces = [ids[at : at + CONTEXT + 1] for at in range(0, len(ids) - 1, CONTEXT)]
        windows += pieces
        openings.append(pieces[0])
    return HeldOut(windows, openings, bytes_per_token(tokenizer))


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, windows: list[list[int]], token_bytes: npt.NDArray[np.int64], bf16: bool
) -> dict[str, float]:
    """Nats per token and bits per byte over the windows; `bf16` is fast, without it the result is exact."""
    nats, tokens, size = 0.0, 0, 0
    model.eval()
    for window in windows:
        nats += float(losses(model, torch.tensor([window]), bf16).sum())
        tokens += len(window) - 1
        size += int(token_bytes[window[1:]].sum())
    model.train()
    bits = nats / math.log(2)
    return {"nats_per_token": nats / tokens, "bits_per_byte": bits / size, "tokens": tokens, "bytes": size}


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
