"""The verbs on small models, in processes and pipes as people use them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snello.terminal import Terminal
from tests.checkpoints import make_checkpoint
from tests.serve.world import make_encoder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two decoders of one vocabulary, two encoders, and a cache of its own."""
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "llama", "llama")
    make_checkpoint(home / "other", "llama", seed=1)
    make_checkpoint(home / "bert", "bert-mlm")
    make_encoder(home / "encoder")
    return home


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "SNELLO_CACHE": str(home / "cache"), **more}


def snello(home: Path, *words: str, text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snello", *words],
        cwd=home,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(home, **more),
        check=False,
    )


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert document["event"] == "result" and document["exit"] == 0
    return document


def test_what_is_forgotten_is_said(home: Path) -> None:
    words = ("run", "llama", "the rain in the train " * 9, "--max-tokens", "12", "--temperature", "0", "--raw")
    kept = snello(home, *words, "--keep-last", "20", "--keep-first", "4")
    assert kept.returncode == 0, kept.stderr
    assert "only the first 4 and the newest 20 tokens are seen" in kept.stderr
    assert "tokens were out of sight at the end" in kept.stderr
    document = result(snello(home, *words, "--keep-last", "20", "--keep-first", "4", "--json"))
    length = sum(document["usage"][name] for name in ("prompt_tokens", "completion_tokens"))
    assert document["forgotten_tokens"] == length - 24 > 0
    assert document["text"] + "\n" == kept.stdout


def test_an_answer_is_all_that_a_pipe_gets(home: Path) -> None:
    words = ("run", "llama", "the rain", "--max-tokens", "12", "--seed", "1")
    said = snello(home, *words)
    assert said.returncode == 0, said.stderr
    document = result(snello(home, *words, "--json"))
    assert said.stdout == document["text"] + "\n"
    assert "tok/s" in said.stderr and "possible here" in said.stderr and "peak" in said.stderr
    assert document["usage"]["completion_tokens"] <= 12
    assert document["possible_decode_tokens_per_second"] > 0


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize(("words", "given"), [((), b"caf\xe9"), ((b"caf\xe9",), b"")])
def test_a_prompt_that_is_not_utf8_is_the_users_to_mend(
    home: Path, words: tuple[bytes, ...], given: bytes, locale: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snello", "run", "llama", *words],
        cwd=home,
        input=given,
        capture_output=True,
        env=environment(home, LC_ALL=locale, PYTHONCOERCECLOCALE="0"),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: the text is not UTF-8 (character 3)\nhint:  "), done.stderr


def test_a_prompt_comes_from_a_pipe(home: Path) -> None:
    piped = snello(home, "run", "llama", "-q", "--seed", "1", "--max-tokens", "8", text="the rain")
    given = snello(home, "run", "llama", "the rain", "-q", "--seed", "1", "--max-tokens", "8")
    assert piped.stdout == given.stdout != "\n"
    assert piped.stderr == ""


def test_an_answer_prints_where_the_encoding_cannot_say_it(home: Path) -> None:
    done = snello(home, "run", "llama", "the rain", "--max-tokens", "40", "--seed", "2", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr


def test_two_models_side_by_side(home: Path) -> None:
    same = result(snello(home, "run", "--compare", "llama", "llama", "the rain", "--max-tokens", "6", "--json"))
    assert same["first_difference"] is None
    words = ("run", "--compare", "llama", "other", "the rain", "--max-tokens", "6")
    differing = result(snello(home, *words, "--json"))
    assert differing["first_difference"] is not None
    assert "[" in snello(home, *words).stdout


def test_run_sends_encoders_elsewhere(home: Path) -> None:
    done = snello(home, "run", "bert", "x")
    assert done.returncode == 1 and "is an encoder" in done.stderr and "hint:" in done.stderr


def test_a_long_prompt_is_an_error_with_both_numbers(home: Path) -> None:
    done = snello(home, "run", "llama", "x" * 4000)
    assert done.returncode == 1 and "512" in done.stderr and "hint:" in done.stderr


def test_bench_stands_beside_the_ceiling(home: Path) -> None:
    words = ("bench", "llama", "--prompt", "16", "--generate", "4", "--repeats", "2", "--streams", "2")
    document = result(snello(home, *words, "--profile", "--json"))
    assert set(document["profile"]) == {"prompt", "answer, 1 at once", "answer, 2 at once"}
    for profile in document["profile"].values():
        assert {"attention", "up, gate", "head"} <= {part["name"] for part in profile["parts"]}
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "streams_tokens_per_second"):
        assert 0 < document[key]["min"] <= document[key]["median"] <= document[key]["max"]
        assert document["ceiling"][key] > 0
    assert document["memory"]["bytes_per_second"] > 0 and document["memory"]["best_bytes_per_second"] > 0
    shown = snello(home, *words, "--profile").stdout
    assert "possible here" in shown and "of possible" in shown and "q, k, v" in shown
    encoder = result(snello(home, "bench", "bert", "--prompt", "16", "--repeats", "2", "--json"))
    assert encoder["prefill_tokens_per_second"]["median"] > 0
    assert "--profile times prompts" in snello(home, "bench", "bert", "--profile").stderr


def test_bench_says_when_memory_gives_less_than_it_can() -> None:
    from snello.cli.bench import said_of_slow_memory

    facts = {
        "decode_tokens_per_second": {"median": 64.0},
        "bytes_per_token": 500_000_000,
        "memory": {"bytes_per_second": 4e10, "best_bytes_per_second": 8e10},
    }
    assert said_of_slow_memory(facts) == "memory gave 40 GB/s around the runs, not 80: answers read at 80% of that"
    facts["memory"] = {"bytes_per_second": 7.5e10, "best_bytes_per_second": 8e10}
    assert said_of_slow_memory(facts) == ""


def test_bench_says_how_one_answer_is_multiplied() -> None:
    from snello.cli.bench import said_of_one_row

    assert said_of_one_row(on_tiles=False, tiles_seconds=0.027, vectors_seconds=0.026) == (
        "one answer at a time is multiplied on vectors (tried: 27 ms a step on tiles, 26 ms on vectors)"
    )


def test_doctor_tells_machine_kernels_and_environment(home: Path) -> None:
    document = result(snello(home, "doctor", "--json"))
    assert document["machine"]["bandwidth"] and document["kernels"] and "SNELLO_ISA" in document["environment"]
    secret = snello(home, "doctor", HF_TOKEN="hf_secret")
    assert "hf_secret" not in secret.stdout and "set (environment)" in secret.stdout


def test_doctor_says_where_bf16_is_multiplied() -> None:
    from snello.cli.doctor import HALVES, kernels

    assert "tiles" in kernels("amx", multiplies_bf16=True)[HALVES]
    assert "pairs" in kernels("avx512vnni", multiplies_bf16=True)[HALVES]
    for isa in ("amx", "avx512vnni"):
        assert "fused multiply-add: " in kernels(isa, multiplies_bf16=False)[HALVES]
    assert HALVES not in kernels("avx2", multiplies_bf16=False)


def test_doctor_knows_how_every_instruction_set_computes() -> None:
    from snello.cli.doctor import KERNELS

    sources = (Path(__file__).parents[1] / "csrc" / "isa").glob("*.cpp")
    names = {name for source in sources for name in re.findall(r'table\("([^"]+)"\)', source.read_text())}
    for_tests = {"amx-emulated", "bf16-emulated", "avxvnni-evex", "avx512vnni-fma"}
    assert names - for_tests == set(KERNELS)


def test_explain_is_the_manual(home: Path) -> None:
    document = result(snello(home, "explain", "quantize", "--json"))
    assert {"--weights", "--method"} <= {option["flag"] for option in document["options"]}
    assert all(option["help"] for option in document["options"])
    assert "When it hurts" in snello(home, "explain", "quantize").stdout


def test_apply_then_run_then_export(home: Path) -> None:
    document = result(snello(home, "apply", "quantize", "llama", "--weights", "int8", "-o", "lean", "--json"))
    assert document["bytes_after"] < document["bytes_before"]
    assert snello(home, "run", "lean", "the rain", "--max-tokens", "4", "-q").returncode == 0
    again = snello(home, "apply", "quantize", "llama", "--weights", "int8", "-o", "lean")
    assert again.returncode == 1 and "--overwrite" in again.stderr
    exported = result(snello(home, "export", "lean", "--to", "hf", "-o", "hf", "--json"))
    assert "as in Transformers" in exported["proof"]
    assert result(snello(home, "run", "hf", "the rain", "--max-tokens", "4", "--json"))["text"] is not None


def test_apply_onto_its_own_model_compares_with_what_was(home: Path) -> None:
    (home / "calib.txt").write_text("the rain on the roof is here. " * 200)
    words = ("--text", "calib.txt", "--ffn", "0.5", "-o", "own", "--overwrite", "--json")
    first = result(snello(home, "apply", "prune", "llama", *words))
    again = result(snello(home, "apply", "prune", "own", *words))
    assert again["bytes_before"] == first["bytes_after"] > again["bytes_after"]


def test_apply_sparsify_reads_its_options_and_text(home: Path) -> None:
    (home / "calib.txt").write_text("the rain on the roof is here. " * 200)
    words = ("apply", "sparsify", "llama", "--method", "sparsegpt", "--pattern", "2:4", "-o", "sparse")
    without = snello(home, *words)
    assert without.returncode == 1 and "none was given" in without.stderr and "method='magnitude'" in without.stderr
    first = result(snello(home, *words, "--text", "calib.txt", "--threads", "1", "--json"))
    again = result(snello(home, *words, "--text", "calib.txt", "--threads", "1", "--overwrite", "--json"))
    assert first["digest"] == again["digest"] and abs(first["bytes_after"] / first["bytes_before"] - 1) < 0.1
    assert snello(home, "run", "sparse", "the rain", "--max-tokens", "4", "-q").returncode == 0
    assert "bytes_after" in result(snello(home, "apply", "quantize", "sparse", "-o", "both", "--json"))
    assert "--sparsity float [0.5]" in snello(home, "explain", "sparsify").stdout


def test_embed_gives_a_vector_a_line(home: Path) -> None:
    done = snello(home, "embed", "bert", "x")
    assert done.returncode == 1 and "gives no vectors of texts: it was opened for masked-lm" in done.stderr
    done = snello(home, "embed", "llama", "x")
    assert done.returncode == 1 and '"architectures": ["LlamaModel"]' in done.stderr
    lines = snello(home, "embed", "encoder", text="the rain\nthe\u2028rain\r\nrain\n").stdout.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 3
    assert "text 2 of 3 is empty" in snello(home, "embed", "encoder", text="the rain\n\nrain\n").stderr
    assert snello(home, "embed", "encoder", text=" \n").returncode == 2


def test_embed_says_what_it_would_not_read(home: Path) -> None:
    long = "the rain " * 200
    done = snello(home, "embed", "encoder", "the rain", long, long)
    assert done.returncode == 1 and done.stdout == ""
    assert "reads 128 tokens, and 2 of 3 texts (the first is number 2) are longer" in done.stderr
    cut = result(snello(home, "embed", "encoder", "the rain", long, "--truncate", "--json"))["embeddings"]
    assert cut[0] == result(snello(home, "embed", "encoder", "the rain", "--json"))["embeddings"][0] != cut[1]


def test_bench_says_which_of_its_options_is_too_large(home: Path) -> None:
    done = snello(home, "bench", "llama", "--prompt", "5000")
    assert done.returncode == 2 and "the model was made for 512" in done.stderr and "--prompt" in done.stderr


def test_adapt_looks_at_its_place_before_it_learns(home: Path) -> None:
    (home / "answers.txt").write_text("the rain")
    done = snello(home, "adapt", "llama", "--data", "answers.txt", "-o", "answers.txt/in", "--overwrite")
    assert done.returncode == 1 and "answers.txt cannot be written" in done.stderr
    done = snello(home, "adapt", "llama", "--data", "answers.txt", "-o", "llama", "--overwrite")
    assert done.returncode == 1 and "would replace llama" in done.stderr


def test_a_conversation_in_a_terminal(home: Path) -> None:
    """Without a chat template each line is continued; /quit ends it."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "snello", "run", "llama", "--max-tokens", "4", "--seed", "1"]
    with subprocess.Popen(
        command, cwd=home, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(home)
    ) as process:
        os.write(leader, b"/help\nthe rain\n/stats\n/quit\n")
        _, err = process.communicate(timeout=60)
    os.close(leader)
    os.close(follower)
    assert process.returncode == 0
    said = err.decode(errors="replace")
    assert "no chat template" in said and "/reset" in said and "tok/s" in said


@pytest.mark.parametrize("name", ["generate", "score", "quantize"])
def test_examples_run(name: str, home: Path) -> None:
    words = [str(home / "llama")] + ([str(home / "lean-example")] if name == "quantize" else [])
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment(home), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_integers_that_others_chose_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    import torch

    from snello.cli.opening import open_model
    from tests.models import foreign

    make_checkpoint(tmp_path, "llama", dtype=torch.float16)
    settings = {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True, "desc_act": False}
    foreign.rewrite(
        tmp_path, settings, lambda w: foreign.gptq(w, bits=8, size=-1, symmetric=True, shuffled=False, version=1)
    )
    said = io.StringIO()
    assert open_model(str(tmp_path), Terminal(err=said)).note
    assert "GPTQ weights of 8 bits, one group a row: read as FP16" in said.getvalue()


def test_what_only_counts_is_given_more_text_than_a_calibration(tmp_path: Path) -> None:
    from snello.cli.apply import _calibration
    from snello.measure.text import Limits
    from snello.models import load

    model = load(make_checkpoint(tmp_path / "model", "llama"))
    (tmp_path / "text.txt").write_text("\n\n".join(["a ship of the north sea"] * 4_000))
    lengths = [sum(map(len, _calibration([tmp_path / "text.txt"], model, counted))) for counted in (0, 50_000)]
    assert lengths[0] <= Limits().calib < 45_000 < lengths[1] <= 50_000
