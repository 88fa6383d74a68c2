"""All engines are held to the instructions of a lesser processor, each in its own way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snello.cli import main
from snello.errors import SnelloError
from snello.measure.peers.contenders import (
    PEERS,
    Peer,
    contenders,
    peers_named,
    subject_of_shape,
)
from snello.measure.peers.environments import LLAMACPP
from snello.measure.peers.holding import HELD, ONEDNN, held
from snello.native import core
from tests.measure.fake_peer import demo_subject


def test_all_are_held_to_an_instruction_set_each_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELLO_PEERS", "/peers")
    everybody = ",".join(PEERS)
    subject = subject_of_shape("tinyllama-1.1b", "int4")
    free, asked = ({one.name: one for one in contenders(peers_named(everybody, isa), "int4")} for isa in (None, "avx2"))
    assert asked.keys() == free.keys() - {"openvino-int4-bf16"}, "which needs AVX-512"
    for name, one in asked.items():
        assert one.model(subject) == free[name].model(subject), "one conversion for all"
        assert one.isa == "avx2" and not free[name].variables
        if one.peer:
            assert one.variables["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert asked["snello-int4"].variables == {"SNELLO_ISA": "avx2"}
    assert "dynamic_quantization=0" in asked["openvino-int4-f32"].command(subject)
    assert asked["ctranslate2-int8"].variables["CT2_FORCE_CPU_ISA"] == "AVX2"
    assert asked["transformers-f32"].variables["ATEN_CPU_CAPABILITY"] == "avx2"
    compiled = {isa: peers_named("llama.cpp", isa)[0].environment for isa in ONEDNN}
    assert compiled["avx512vnni"] == LLAMACPP, "compiled without AMX as it is"
    for isa, flag in (("avxvnni", True), ("avx2", False)):
        arguments = compiled[isa].variables["CMAKE_ARGS"]
        assert compiled[isa].folder == Path(f"/peers/llamacpp-{isa}") and compiled[isa].requirements.exists()
        assert arguments.index("GGML_NATIVE=OFF") > arguments.index("GGML_NATIVE=ON"), "the last one counts"
        assert ("GGML_AVX_VNNI=ON" in arguments) is flag and "AVX512" not in arguments


def test_a_peer_that_cannot_be_held_to_a_set_is_refused(fake: Peer) -> None:
    assert held(fake, None) == fake
    with pytest.raises(SnelloError, match="fake cannot be held to avx2"):
        held(fake, "avx2")
    with pytest.raises(SnelloError, match="openvino cannot be held to scalar") as found:
        peers_named("openvino", "scalar")
    assert found.value.hint == "choose from: avx512vnni, avxvnni, avx2"


@pytest.mark.parametrize("isa", ONEDNN)
def test_the_command_line_knows_every_set(isa: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "demo", "--isa", isa]) == 2
    assert "--isa goes with --against" in capsys.readouterr().err


def test_the_command_line_holds_all_to_an_instruction_set(
    fake: Peer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lesser = [isa for isa in core.available_isas() if isa in ONEDNN]
    if not lesser:
        pytest.skip("this processor has none of the sets")
    isa = lesser[-1]
    demo_subject(fake)
    monkeypatch.setitem(PEERS, "fake", fake)
    monkeypatch.setitem(HELD, "fake", {isa: {}})
    command = ["bench", "demo", "--against", "fake", "--prompt", "8", "--generate", "6", "--repeats", "1", "--isa"]
    assert main([*command, isa, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ours, theirs = document["rows"].values()
    assert document["held_to"] == ours["settings"]["isa"] == isa and theirs["settings"]["isa"] == ONEDNN[isa]
    monkeypatch.setattr(core, "available_isas", lambda: ["scalar"])
    assert main([*command, isa]) == 2
    assert f"this processor has no {isa}" in capsys.readouterr().err
