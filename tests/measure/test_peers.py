"""Peers run in turn on prompts that no cache knows; ratios are paired; what is missing is named with its command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snello.cli import main
from snello.cli.against import peer_table
from snello.errors import SnelloError, Unsupported
from snello.measure.peers import contenders as contending
from snello.measure.peers.checkpoint import Shape, shape_of, write_checkpoint
from snello.measure.peers.comparison import Lengths, compare
from snello.measure.peers.contenders import (
    PEERS,
    Contender,
    Peer,
    contenders,
    peers_named,
    subject_of_model,
    subject_of_shape,
    weights_of,
)
from snello.measure.peers.conversions import check, group_size, install
from snello.measure.peers.environments import LLAMACPP, Environment, peers_folder
from snello.measure.peers.inside import worker
from snello.measure.peers.judge import judge, paired_ratio
from snello.measure.peers.turns import Series, Worker, in_turn
from snello.models import load
from snello.models.shapes import spec_of_shape
from snello.models.spec import Spec
from snello.models.tokenizer import load_tokenizer
from snello.native import core
from tests.measure.fake_peer import demo_subject, fake_contender

# ---- who is compared ------------------------------------------------------------------------------------------------


def test_contenders_have_as_many_bits_as_ours() -> None:
    names = [one.name for one in contenders([*PEERS.values()], "int4")]
    assert names == [
        "snello-int4",
        "llamacpp-q4_0",
        "openvino-int4-f32",
        "openvino-int4-bf16",
        "ctranslate2-int8",
        "transformers-f32",
        "transformers-bf16",
    ]
    for peer in PEERS.values():
        assert set(peer.models) == {"int3", "int4", "int4-all", "int8", "bf16"}
        assert (contending.INSIDE / peer.engine).exists() and peer.environment.requirements.exists()


def test_the_weights_of_a_model_are_named_like_a_shape_s() -> None:
    model = load("demo")
    for weights in ("int4", "int4-all", "int8", "bf16"):
        spec = spec_of_shape("tinyllama-1.1b", weights)
        assert weights_of(dataclasses.replace(model, spec=spec)) == weights


def test_a_peer_that_does_not_exist_is_an_error() -> None:
    assert [peer.name for peer in peers_named("openvino, llama.cpp,openvino")] == ["openvino", "llama.cpp"]
    for text in ("vllm", "openvino,vllm"):
        with pytest.raises(SnelloError, match="no peer is named vllm") as found:
            peers_named(text)
        assert found.value.hint == "choose from: llama.cpp, openvino, ctranslate2, transformers"
    with pytest.raises(SnelloError, match="no peer is named"):
        peers_named(" , ")


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNELLO_PEERS", str(tmp_path))
    subject, asked = subject_of_shape("tinyllama-1.1b", "int4"), contenders([PEERS["llama.cpp"]], "int4")
    command = "snello bench --shape tinyllama-1.1b --weights int4 --install-peers llama.cpp"
    with pytest.raises(SnelloError, match="^not installed: llama.cpp$") as found:
        check(subject, asked)
    assert found.value.hint == command
    LLAMACPP.python.parent.mkdir(parents=True)
    LLAMACPP.python.touch()
    with pytest.raises(SnelloError, match="^not converted for llama.cpp: tinyllama-1.1b-q4_0.gguf$") as found:
        check(subject, asked)
    assert found.value.hint == command
    asked[1].converted(subject).parent.mkdir(parents=True)
    asked[1].converted(subject).touch()
    subject.checkpoint.mkdir(parents=True)
    check(subject, asked)


def test_an_unknown_shape_and_an_encoder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SnelloError, match="no checkpoint of the shape gpt-9"):
        subject_of_shape("gpt-9", "int4")
    monkeypatch.setattr(Spec, "causal", property(lambda self: False))
    with pytest.raises(Unsupported, match="is an encoder"):
        subject_of_model(load("demo"), "x")


def test_a_lean_folder_is_compared_on_its_original(tmp_path: Path) -> None:
    demo = load("demo")
    lean = dataclasses.replace(demo, path=tmp_path, name="lean")
    (tmp_path / "snello.json").write_text(json.dumps({"source": {"name": "demo"}}))
    subject = subject_of_model(lean, "lean/demo")
    assert subject.checkpoint == demo.path and subject.model == "lean/demo"
    (tmp_path / "snello.json").write_text(json.dumps({"source": {"name": str(tmp_path / "gone")}}))
    with pytest.raises(SnelloError, match="lean was made from .*gone, which peers need"):
        subject_of_model(lean, "lean/demo")
    found = subject_of_model(lean, "lean/demo", "demo")
    assert found.checkpoint == demo.path and found.asked == "lean/demo --original demo"
    another = dataclasses.replace(lean, spec=spec_of_shape("tinyllama-1.1b", "int4"))
    with pytest.raises(SnelloError, match="demo is not what lean was made from: it has 4,096 words, and lean 32,000"):
        subject_of_model(another, "lean/demo", "demo")
    (tmp_path / "snello.json").unlink()
    with pytest.raises(Unsupported, match="no Hugging Face checkpoint"):
        subject_of_model(lean, "lean/demo")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo", "--against", "vllm"], "no peer is named vllm"),
        (["demo", "--against", "openvino"], "not installed: openvino"),
        (["--against", "openvino"], "bench needs a MODEL or a --shape"),
        (["demo", "--against", "openvino", "--profile"], "--profile looks at our own engine alone"),
        (["demo", "--against", "openvino", "--install-peers", "openvino"], "are two runs"),
        (["--install-peers", "vllm"], "no peer is named vllm"),
        (["demo", "--text", "x.txt"], "--text goes with --against"),
        (["demo", "--original", "demo"], "--original goes with --against"),
        (["demo", "--isa", "avx2"], "--isa goes with --against"),
        (["demo", "--against", "llama.cpp", "--isa", "avx2"], "--install-peers llama.cpp --isa avx2"),
        (["demo", "--text", "x.txt", "--install-peers", "openvino"], "--text goes with --against"),
        (["--shape", "tinyllama-1.1b", "--original", "demo", "--against", "openvino"], "has random weights and no"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SNELLO_PEERS", str(tmp_path))
    monkeypatch.setattr(core, "available_isas", lambda: ["avx2"])
    assert main(["bench", *words]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- where peers live, and what they are fed ------------------------------------------------------------------------


def test_peers_live_in_the_cache_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_CACHE", "/somewhere")
    monkeypatch.delenv("SNELLO_PEERS", raising=False)
    assert peers_folder() == Path("/somewhere/peers")
    monkeypatch.setenv("SNELLO_PEERS", "here")
    assert peers_folder() == Path.cwd() / "here"


def test_an_environment_is_made_anew_only_when_its_list_changes(
    fake: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    (tmp_path / "fake.txt").write_text("numpy==2\n")
    monkeypatch.setattr(Environment, "requirements", property(lambda self: tmp_path / f"{self.name}.txt"))
    environment = fake.environment
    assert not environment.is_made()
    (environment.folder / "made-from.txt").write_text(environment.fingerprint() + "\n")
    install([fake], [], None, said.append)
    assert said == [f"fake: up to date in {environment.folder}"]
    (tmp_path / "fake.txt").write_text("numpy==3\n")
    assert not environment.is_made()


def test_a_random_checkpoint_is_one_that_opens_and_is_the_same_every_time(tmp_path: Path) -> None:
    shape = Shape(
        name="tiny",
        hidden_size=64,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=32,
        intermediate_size=128,
        vocab_size=512,
        tied=False,
        context=128,
        rope_theta=10000.0,
    )
    for name in ("a", "b"):
        write_checkpoint(shape, tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    model = load(tmp_path / "a")
    assert model.spec.hidden_size == 64 and model.spec.vocab_size == 512 and not model.spec.head.tied
    assert load_tokenizer(tmp_path / "a").decode([256, 300, *b"hi"]) == "hi"


def test_a_checkpoint_has_the_shape_it_is_named_for() -> None:
    config = shape_of("llama-3.2-1b").config()
    assert config["head_dim"] == 64 and config["tie_word_embeddings"]
    assert config["rope_scaling"]["rope_type"] == "llama3"


def test_a_checkpoint_of_qwen3_opens_as_one(tmp_path: Path) -> None:
    small = {"layers": 2, "hidden_size": 64, "heads": 2, "kv_heads": 1, "head_dim": 64, "intermediate_size": 128}
    shape = dataclasses.replace(shape_of("qwen3-0.6b"), **small, vocab_size=512)
    write_checkpoint(shape, tmp_path / "small")
    spec, whole = load(tmp_path / "small").spec, spec_of_shape("qwen3-0.6b", "int4")
    assert spec.family == whole.family == "qwen3" and spec.head.tied
    assert "layers.0.attention.q_norm.weight" in load(tmp_path / "small").weights.names()


# ---- the worker -----------------------------------------------------------------------------------------------------


def test_no_two_prompts_are_the_same() -> None:
    prompts = [tuple(worker.random_prompt(64, 32000, seed, index)) for seed in (0, 1) for index in range(-40, 40)]
    assert len(set(prompts)) == len(prompts)
    assert all(300 <= token < 32000 for prompt in prompts for token in prompt)
    assert all(20 <= token < 40 for token in worker.random_prompt(64, 40, 0, 0))


def test_only_the_time_in_which_all_answers_run_counts() -> None:
    even = [([1, 2, 3], [1.0, 1.5, 2.0]), ([1, 2, 3], [1.0, 1.5, 2.0])]
    assert worker.decode_speed(even) == pytest.approx(4.0)
    late = [([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]), ([1, 2, 3, 4], [2.0, 3.0, 4.0, 5.0])]
    assert worker.decode_speed(late) == pytest.approx(2.0)  # from 2 to 4: two tokens each
    with pytest.raises(ValueError, match="never all ran together"):
        worker.decode_speed([([1, 2], [1.0, 2.0]), ([1, 2], [2.0, 3.0])])


def run_worker(fake: Peer, tmp_path: Path, streams: int, turns: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """The worker's lines, and what its engine was asked."""
    command = [*fake_contender(fake).command(demo_subject(fake)), "--prompt", "4", "--generate", "5"]
    one = Worker("fake", [*command, "--streams", str(streams)], tmp_path / "fake.log")
    try:
        one.load()
        lines = [one.ready, *(one.go() for _ in range(turns))]
    finally:
        one.close()
    assert one.process.returncode == 0
    asked = [eval(line) for line in (tmp_path / "asked.txt").read_text().splitlines()]
    return lines, asked


def test_one_stream_reads_a_new_prompt_every_time(fake: Peer, tmp_path: Path) -> None:
    lines, asked = run_worker(fake, tmp_path, streams=1, turns=2)
    assert lines[0]["decode_tokens_per_second"] == [] and lines[0]["engine"] == "fake"
    for line in lines[1:]:
        assert line["decode_tokens_per_second"][0] == pytest.approx(500, rel=1e-6)
        assert line["prefill_tokens_per_second"][0] == pytest.approx(400, rel=0.2)
        assert line["first_tokens"] == [[0, 1, 2, 3, 4]]
    assert [(len(prompts), generate) for prompts, generate in asked] == [(1, 5)] * 3
    assert len({tuple(prompts[0]) for prompts, _ in asked}) == 3


def test_several_streams_keep_their_prompts_and_the_prompt_is_timed_alone(fake: Peer, tmp_path: Path) -> None:
    lines, asked = run_worker(fake, tmp_path, streams=3, turns=2)
    assert lines[1]["decode_tokens_per_second"][0] == pytest.approx(1500, rel=1e-6)
    lengths = [(len(prompts), generate) for prompts, generate in asked]
    assert lengths == [(1, 5), (3, 1), (3, 5), (1, 1), (3, 5), (1, 1), (3, 5)]
    alone, together = [asked[i][0] for i in (0, 3, 5)], [asked[i][0] for i in (1, 2, 4, 6)]
    assert all(prompts == together[0] for prompts in together)
    prompts = [tuple(prompt) for batch in [*alone, together[0]] for prompt in batch]
    assert len(set(prompts)) == len(prompts) == 6


def test_a_worker_is_given_an_answer_and_its_logits_come_back(fake: Peer, tmp_path: Path) -> None:
    one = Worker("fake", [*fake_contender(fake).command(demo_subject(fake)), "--prompt", "4"], tmp_path / "fake.log")
    try:
        one.load()
        one.score([1, 2, 3, 4, 5], [6, 7], tmp_path / "logits.npy")
        assert one.go()["decode_tokens_per_second"]
    finally:
        one.close()
    logits = np.load(tmp_path / "logits.npy")
    assert logits.shape == (2, 4096) and logits.dtype == np.float32 and logits[0, 0] == 1.0 and not logits[:, 1:].any()


# ---- in turn --------------------------------------------------------------------------------------------------------


class Recorded:
    """A turn that writes its name down."""

    def __init__(self, name: str, order: list[str], speeds: list[float]) -> None:
        self.name, self.order, self.speeds = name, order, iter(speeds)
        self.ready: dict[str, Any] = {}

    def go(self) -> dict[str, Any]:
        self.order.append(self.name)
        speed = next(self.speeds)
        return {
            "engine": self.name,
            "bytes_per_token": 10**9,
            "decode_tokens_per_second": [speed],
            "prefill_tokens_per_second": [10 * speed],
            "first_tokens": [[1]],
        }


def test_everybody_runs_forth_and_back_with_a_look_at_the_memory_between() -> None:
    order: list[str] = []
    looks = itertools.count(1)

    def bandwidth() -> float:
        order.append("|")
        return float(next(looks))

    workers = {name: Recorded(name, order, [1, 2, 3, 4]) for name in "ABC"}
    told: list[str] = []
    series = in_turn(workers, 2, bandwidth, told.append)
    assert "".join(order) == "|A|B|C|C|B|A|" * 2
    assert series["A"].decode == [1, 2, 3, 4] and series["A"].bandwidth == [1.5, 6.5, 8.5, 13.5]
    assert series["C"].description == {"engine": "C", "bytes_per_token": 10**9}
    assert len(told) == 2 and told[0].startswith("round 1 of 2: A 2.0, B 2.0")


def test_the_ratio_is_paired() -> None:
    """The machine slows to a half; the ratio of each pair is the same."""
    theirs = [10.0, 9.0, 7.0, 6.0, 5.0, 5.0]
    found = paired_ratio([2 * speed for speed in theirs], theirs)
    assert (found.low, found.mid, found.high) == (2.0, 2.0, 2.0)
    noisy = paired_ratio([20.0, 22.0, 19.0, 21.0], [10.0, 10.0, 11.0, 9.0])
    assert noisy.mid == pytest.approx(2.05) and noisy.low < 2.05 < noisy.high
    assert paired_ratio([1.0, 2.0], [2.0, 1.0], seed=3) == paired_ratio([1.0, 2.0], [2.0, 1.0], seed=3)


def test_rows_say_who_was_faster_and_how_near_the_memory_s_limit(fake: Peer) -> None:
    ours, theirs = Contender(name="snello-bf16", weights="bf16"), fake_contender(fake)
    facts = {"engine": "x", "bytes_per_token": 2 * 10**9}
    series = {
        ours.name: Series(facts, decode=[8.0, 8.0], prefill=[30.0, 30.0], bandwidth=[10.0, 10.0]),
        theirs.name: Series(facts, decode=[4.0, 4.0], prefill=[60.0, 60.0], bandwidth=[10.0, 10.0]),
    }
    rows = judge([ours, theirs], series, streams=2)
    assert rows["snello-bf16"]["gigabytes_per_second"] == 8.0  # four steps a second
    assert rows["snello-bf16"]["share_of_bandwidth"] == 0.8 and "ours" not in rows["snello-bf16"]
    assert rows["fake-one"]["ours_over_this"] == 2.0 and rows["fake-one"]["ours_over_this_95"] == [2.0, 2.0]
    assert rows["fake-one"]["prefill_ours_over_this"] == 0.5
    alone = judge([theirs], series)["fake-one"]
    assert alone["ours"] == "snello-bf16"
    lines = peer_table(rows)
    assert "snello-bf16" in lines[1] and "2.00x (2.00-2.00)" in lines[2] and "0.50x" in lines[2]


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_the_command_line_compares_and_prints(
    fake: Peer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_subject(fake)
    monkeypatch.setitem(PEERS, "fake", fake)
    (name,) = (one.name for one in contenders([fake], "bf16")[1:])
    command = ["bench", "demo", "--against", "fake", "--prompt", "8", "--generate", "6", "--repeats", "1"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "demo" and document["rows"].keys() == {"snello-bf16", name}
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "prompt 8, answer 6" in out and name in out and "memory reads" in out
    assert main([*command, "--prompt", "2000"]) == 2
    assert "too long together" in capsys.readouterr().err


@pytest.mark.parametrize("streams", [1, 3])
def test_ours_and_a_peer_are_compared(fake: Peer, streams: int) -> None:
    subject, told = demo_subject(fake), []
    asked = [Contender(name="snello-bf16", weights="bf16"), fake_contender(fake)]
    lengths = Lengths(prompt=8, generate=6, threads=1, streams=streams, rounds=2)
    result = compare(subject, asked, lengths, lambda: 10.0, told.append)
    assert told[:2] == ["loaded snello-bf16", "loaded fake-one"] and len(told) == 4
    ours, theirs = result["rows"]["snello-bf16"], result["rows"]["fake-one"]
    assert len(ours["decode"]["runs"]) == len(theirs["decode"]["runs"]) == 4
    assert ours["engine"] == "snello" and ours["bytes_per_token"] > 10**6 and ours["decode"]["min"] > 0
    assert theirs["decode"]["median"] == pytest.approx(500 * streams, rel=1e-6)
    assert theirs["settings"]["threads"] == 1 and theirs["settings"]["model"].endswith("bf16.bin")
    low, high = theirs["ours_over_this_95"]
    assert low <= theirs["ours_over_this"] <= high
    assert json.loads(json.dumps(result)) == result


def test_a_peer_that_breaks_ends_the_run_with_its_last_words(fake: Peer) -> None:
    subject = demo_subject(fake)
    lengths = Lengths(prompt=8, generate=6, threads=1, rounds=1)
    with pytest.raises(SnelloError, match="fake-one ended while it was measured") as found:
        compare(subject, [fake_contender(fake, **{"break": "yes"})], lengths, lambda: 10.0, lambda text: None)
    assert "the fake breaks" in str(found.value.hint)


def test_models_that_do_not_fit_into_memory_together_are_refused(fake: Peer) -> None:
    subject, one = demo_subject(fake), fake_contender(fake)
    os.truncate(one.converted(subject), 1 << 43)
    with pytest.raises(SnelloError, match="take 8796.1 GB together"):
        compare(subject, [one], Lengths(prompt=8, generate=6, threads=1), lambda: 10.0, lambda text: None)


@pytest.mark.parametrize(("hidden", "width", "group"), [(2048, 5632, 128), (576, 1536, 64), (96, 256, 32)])
def test_the_exporter_gets_a_group_size_without_remainder(tmp_path: Path, hidden: int, width: int, group: int) -> None:
    config = {"hidden_size": hidden, "num_attention_heads": 3, "head_dim": 128, "intermediate_size": width}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert group_size(tmp_path) == group


def test_a_width_that_no_group_divides_is_refused(tmp_path: Path) -> None:
    config = {"hidden_size": 100, "num_attention_heads": 1, "intermediate_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SnelloError, match="no group size"):
        group_size(tmp_path)
