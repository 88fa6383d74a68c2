"""`snello run`: an answer as it is drawn, a conversation, or two models on one prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snello.cli.keeping import add_keeping, check_keeping, forgetting, say_what_is_kept
from snello.cli.opening import open_model
from snello.cli.options import of_deployment
from snello.cli.sampling import add_sampling, sampling_names
from snello.errors import SnelloError
from snello.report import numbers
from snello.terminal import Terminal

if TYPE_CHECKING:
    from snello.engine.llm import LLM
    from snello.engine.request import Chunk, Usage

EXAMPLES = (
    'snello run demo "def area(radius):"',
    "snello run Qwen/Qwen3-0.6B                        a conversation",
    'snello run demo --adapter adapters/answers "Q:"    with an adapter, which is not merged',
    "cat question.txt | snello run lean/qwen3-0.6b > answer.txt",
    'snello run --compare demo lean/demo "def area("   both, first differing token marked',
)
ADAPTER = "adapter"  # its name here
CHAT_HELP = '/help  /system TEXT  /reset  /stats  /quit     """ begins and ends many lines'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hugging Face name, or demo")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="without it: a conversation, or standard input")
    parser.add_argument("--compare", metavar="ORIGINAL", help="answer with this model first, then mark what differs")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="answer with this adapter of the model")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system message of a conversation")
    parser.add_argument(
        "--context",
        type=of_deployment("context"),
        help="positions to make room for [the model's own, if memory allows]",
    )
    parser.add_argument("--threads", type=of_deployment("threads"), help="[the physical cores]")
    add_keeping(parser)
    parser.add_argument(
        "--speculate",
        metavar="HOW",
        help="the same answer, sooner: prompt-lookup, suffix (past answers too), a smaller model of its words, or off",
    )
    add_sampling(parser)


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    check_keeping(arguments)
    if arguments.compare is not None:
        return _compare(arguments, terminal)
    with _open(arguments.model, arguments, terminal) as llm:
        say_what_is_kept(llm.executor.deployment, terminal)
        templated = bool(llm.tokenizer.chat_templates) and not arguments.raw
        if arguments.prompt is None and sys.stdin.isatty():
            return _converse(llm, arguments, terminal, templated=templated)
        text = sys.stdin.read() if arguments.prompt in (None, "-") else arguments.prompt
        prompt = _messages(arguments.system, text) if templated else text
        answer, usage = _stream(llm, prompt, arguments, terminal)
        stats = _closing(llm, usage, terminal)
        return {"model": arguments.model, "text": answer, **stats}


def _open(name: str, arguments: argparse.Namespace, terminal: Terminal) -> LLM:
    from snello.engine.llm import LLM

    model = open_model(name, terminal)
    if not model.spec.causal:
        verb = f"snello embed {name} TEXT" if model.spec.head.kind == "embed" else None
        message = f"{name} is an encoder ({model.spec.task}): it reads texts and writes none"
        raise SnelloError(message, verb or "it scores masked words or classes; run needs a decoder")
    keep = {"keep_first": arguments.keep_first, "keep_last": arguments.keep_last}
    adapters = {} if arguments.adapter is None else {ADAPTER: arguments.adapter}
    llm = LLM(
        model,
        threads=arguments.threads,
        context=arguments.context,
        speculate=arguments.speculate,
        adapters=adapters,
        **keep,
    )
    if adapters:
        terminal.say(f"adapter {arguments.adapter}: {numbers.size(llm.executor.adapters.num_bytes)}")
    return llm


def _adapter(arguments: argparse.Namespace) -> str | None:
    return None if arguments.adapter is None else ADAPTER


def _messages(system: str | None, text: str) -> list[Mapping[str, str]]:
    first: list[Mapping[str, str]] = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def _stream(
    llm: LLM, prompt: str | Sequence[Mapping[str, str]], arguments: argparse.Namespace, terminal: Terminal
) -> tuple[str, Usage]:
    """Prints the answer while it comes; returns it whole."""
    pieces: list[str] = []
    last: Chunk | None = None
    for last in llm.stream(prompt, adapter=_adapter(arguments), **sampling_names(arguments)):
        pieces.append(last.text)
        terminal.product(last.text, end="")
    terminal.product()
    assert last is not None and last.usage is not None
    return "".join(pieces), last.usage


# ---- the closing lines ----------------------------------------------------------------------------------------------


def _closing(llm: LLM, usage: Usage, terminal: Terminal) -> dict[str, Any]:
    """Speeds beside the ceiling, and memory: three facts on stderr, more in the JSON document."""
    if terminal.quiet and not terminal.json:
        return {}
    from snello.measure.machine import ceiling, machine

    executor = llm.executor
    terminal.footer(["measuring this machine: a few seconds, once"])
    here = machine(threads=executor.threads)
    possible = ceiling(
        executor.spec,
        here,
        prompt=max(1, usage.prompt_tokens),
        generate=max(2, usage.completion_tokens),
        measured_bytes=executor.bytes_per_token(),
    ).decode_tokens_per_second
    decode = usage.decode_tokens_per_second
    prefill = (usage.prompt_tokens - usage.cached_tokens) / max(usage.first_token_seconds, 1e-9)
    peak, used = _peak_bytes(), usage.prompt_tokens + usage.completion_tokens
    speed = f", {numbers.rate(decode)} tok/s, {decode / possible:.0%} of the {numbers.rate(possible)} possible here"
    known = f" ({numbers.count(usage.cached_tokens)} known)" if usage.cached_tokens else ""
    parts = (
        f"prompt {numbers.count(usage.prompt_tokens)} tokens{known}, {numbers.seconds(usage.first_token_seconds)} "
        f"({numbers.rate(prefill)}/s)",
        f"answer {numbers.count(usage.completion_tokens)} tokens" + (speed if decode else ""),
        f"peak {numbers.size(peak)}, context {numbers.count(used)} of {numbers.count(executor.context)}",
    )
    terminal.say(terminal.glyph(" · ", " | ").join(parts))
    guesses = _guesses(llm, terminal)
    return {
        **guesses,
        **forgetting(executor.deployment, used, terminal),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "possible_decode_tokens_per_second": possible,
        "peak_bytes": peak,
        "context": executor.context,
        "isa": executor.isa,
        "threads": executor.threads,
    }


def _guesses(llm: LLM, terminal: Terminal) -> dict[str, Any]:
    """What guessing brought and holds; nothing where nobody guesses."""
    if llm.drafter is None:
        return {}
    governor, memory = llm.engine.governor, llm.drafter.memory_bytes
    right = f", {governor.accepted / governor.proposed:.0%} right" if governor.proposed else ""
    terminal.say(
        f"{llm.drafter.name}: {numbers.count(governor.proposed)} tokens guessed{right}, holds {numbers.size(memory)}"
    )
    facts = {"drafter": llm.drafter.name, "memory_bytes": memory}
    return {"speculation": {**facts, "proposed": governor.proposed, "accepted": governor.accepted}}


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- a conversation -------------------------------------------------------------------------------------------------


def _converse(llm: LLM, arguments: argparse.Namespace, terminal: Terminal, *, templated: bool) -> dict[str, Any]:
    """Turns until /quit or the end of input. Without a chat template every line is a text to continue."""
    kind = "conversation" if templated else "no chat template: every line is continued as it is"
    terminal.say(f"{llm.model.name}, context {numbers.count(llm.executor.context)}, {llm.executor.isa}; {kind}; /help")
    system, turns, stats = arguments.system, list[Mapping[str, str]](), dict[str, Any]()
    while (line := _read_turn(terminal)) is not None:
        if line.startswith("/"):
            word, _, rest = line.partition(" ")
            if word == "/quit":
                break
            if word == "/system":
                system, turns = rest or None, []
            elif word == "/reset":
                turns = []
            elif word == "/stats":
                terminal.say(str(stats or "no answer yet"))
            else:
                terminal.say(CHAT_HELP)
            continue
        turns.append({"role": "user", "content": line})
        first: list[Mapping[str, str]] = [{"role": "system", "content": system}] if system else []
        answer, usage = _stream(llm, [*first, *turns] if templated else line, arguments, terminal)
        turns.append({"role": "assistant", "content": answer})
        stats = _closing(llm, usage, terminal)
    return {"model": arguments.model, "turns": turns}


def _read_turn(terminal: Terminal) -> str | None:
    """One turn; None at the end of input. An empty line asks again; three quotes hold many lines."""
    while True:
        terminal.say(">>> ", end="")
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip().startswith('"""'):
            lines = [line.strip().removeprefix('"""')]
            while not lines[-1].endswith('"""') and (more := sys.stdin.readline()):
                lines.append(more.rstrip("\n"))
            return "\n".join(lines).removesuffix('"""').strip()
        if line.strip():
            return line.strip()


# ---- two models -----------------------------------------------------------------------------------------------------


def _compare(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Both answers under one seed; in the second the first token that differs is marked."""
    if arguments.adapter is not None:
        raise SnelloError("--compare is of models", "merge the adapter first: snello adapt --merge", exit_code=2)
    if arguments.prompt is None:
        raise SnelloError("--compare needs a prompt", "snello run --compare ORIGINAL LEAN PROMPT", exit_code=2)
    names = {"temperature": 0.0, "seed": 0, "max_tokens": 64, **sampling_names(arguments)}
    tokens: list[tuple[int, ...]] = []
    texts: list[str] = []
    place: int | None = None
    for name in (arguments.compare, arguments.model):
        with _open(name, arguments, terminal) as llm:
            templated = bool(llm.tokenizer.chat_templates) and not arguments.raw
            messages = _messages(arguments.system, arguments.prompt)
            output = llm.chat(messages, **names) if templated else llm.generate(arguments.prompt, **names)
            tokens.append(output.token_ids)
            texts.append(output.text)
            place = first_difference(tokens[0], tokens[-1])
            shown = output.text if place is None else _marked(llm, output.token_ids, place, terminal)
            terminal.product(f"{name}\n{shown}\n")
    same = "the same tokens" if place is None else f"the same for {place} tokens, then different"
    terminal.say(same)
    models = [arguments.compare, arguments.model]
    return {"models": models, "texts": texts, "first_difference": place}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The place of the first token that differs; None if all are the same."""
    for place, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return place
    return None if len(a) == len(b) else min(len(a), len(b))


def _marked(llm: LLM, ids: Sequence[int], place: int, terminal: Terminal) -> str:
    before, through, whole = (llm.tokenizer.decode(list(ids[:end])) for end in (place, place + 1, len(ids)))
    return before + terminal.mark(through[len(before) :]) + whole[len(through) :]
