"""llama2.c files: read where they lie, their tokenizer, and what is wrong with one that is cut."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from snello.errors import SnelloError
from snello.interop.huggingface import export
from snello.models import load
from snello.models.parameters import parameter_shapes
from snello.models.plain_folder import write_plain_folder
from snello.models.reference import Reference
from snello.models.spec import Attention, Rope

STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K/stories260K.bin"
DIM, HIDDEN, LAYERS, HEADS, KV, WORDS, CONTEXT = 16, 12, 2, 4, 2, 265, 16
SIZES = {
    "embedding.tokens.weight": (WORDS, DIM), "attention.norm": (LAYERS, DIM), "attention.q": (LAYERS, DIM, DIM),
    "attention.k": (LAYERS, 8, DIM), "attention.v": (LAYERS, 8, DIM), "attention.o": (LAYERS, DIM, DIM),
    "ffn.norm": (LAYERS, DIM), "ffn.gate": (LAYERS, HIDDEN, DIM), "ffn.down": (LAYERS, DIM, HIDDEN),
    "ffn.up": (LAYERS, HIDDEN, DIM), "norm.weight": (DIM,), "rotary": (2, CONTEXT, 2),
}  # fmt: skip


def write(path: Path, *, tied: bool = True) -> dict[str, np.ndarray]:
    """A small file and what is in it."""
    rng = np.random.default_rng(0)
    blocks = {name: rng.standard_normal(shape, np.float32) for name, shape in SIZES.items()}
    if not tied:
        blocks["head.weight"] = rng.standard_normal((WORDS, DIM), np.float32)
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, WORDS if tied else -WORDS, CONTEXT)
    path.write_bytes(header + b"".join(values.tobytes() for values in blocks.values()))
    return blocks


def write_pieces(path: Path) -> None:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % value for value in range(256))]
    pieces += [b" ", b"a", b"b", b" a", b"ab", b" ab"]
    assert len(pieces) == WORDS
    entries = (struct.pack("<fi", -float(index), len(piece)) + piece for index, piece in enumerate(pieces))
    path.write_bytes(struct.pack("<i", 8) + b"".join(entries))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_where_the_layout_says(tied: bool, tmp_path: Path) -> None:
    blocks = write(tmp_path / "tiny.bin", tied=tied)
    model = load(tmp_path / "tiny.bin")
    assert {name: model.weights.shape(name) for name in model.weights.names()} == parameter_shapes(model.spec)
    for name in model.weights.names():
        parts = name.split(".")
        expected = blocks[".".join(parts[2:4])][int(parts[1])] if parts[0] == "layers" else blocks[name]
        if parts[-2] in ("q", "k"):  # heads of 4: rows 0 and 1 turn together, and 2 and 3
            expected = expected.reshape(-1, 4, DIM)[:, [0, 2, 1, 3]].reshape(expected.shape)
        np.testing.assert_array_equal(model.weights.values(name), expected, err_msg=name)
    mixer = model.spec.layers[0].mixer
    assert isinstance(mixer, Attention) and mixer.rope == Rope(base=10000.0, dims=4)
    assert (model.spec.head.tied, model.spec.max_positions, model.name) == (tied, CONTEXT, "tiny")


def test_other_programs_open_what_is_made_of_it(tmp_path: Path) -> None:
    """An ordinary Llama: its logits are those of the file's own pairs of rows, which lie side by side."""
    blocks = write(tmp_path / "tiny.bin")
    write_pieces(tmp_path / "tiny.tok265.bin")
    model = load(tmp_path / "tiny.bin")
    write_plain_folder(tmp_path / "made", model.spec, model, (), model.weights.values)
    made, tokens = load(tmp_path / "made"), torch.tensor([[1, 260, 261, 262, 263, 264, 7, 9]])
    assert made.tokenizer.encode("ab aab") == model.tokenizer.encode("ab aab")
    assert dataclasses.replace(made.spec, eos_tokens=()) == dataclasses.replace(model.spec, eos_tokens=())

    layer = model.spec.layers[0]
    assert isinstance(layer.mixer, Attention) and layer.mixer.rope is not None
    rope = dataclasses.replace(layer.mixer.rope, interleaved=True)
    beside = dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, rope=rope))
    as_it_lies = Reference.from_model(
        dataclasses.replace(model, spec=dataclasses.replace(model.spec, layers=(beside,) * LAYERS))
    )
    with torch.no_grad():
        for index in range(LAYERS):
            for part in ("q", "k"):
                weight = torch.from_numpy(blocks[f"attention.{part}"][index])
                as_it_lies.get_parameter(f"layers.{index}.attention.{part}.weight").copy_(weight)
        expected = as_it_lies(tokens)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)(
            tokens
        ).logits
        ours = Reference.from_model(model)(tokens)
    assert (ours - expected).abs().max() < 1e-4 * expected.std()
    assert (theirs - expected).abs().max() < 1e-4 * expected.std()


def test_export_is_proved_in_a_process_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "tiny.bin")
    write_pieces(tmp_path / "tiny.tok265.bin")
    done = export(load(tmp_path / "tiny.bin"), tmp_path / "made")
    assert "answers as in Transformers" in done.proof
    assert load(tmp_path / "made").tokenizer.encode("ab aab") == [1, 264, 262, 263]


def test_its_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "tiny.bin")
    write_pieces(tmp_path / "tiny.tok265.bin")
    tokenizer = load(tmp_path / "tiny.bin").tokenizer
    # " a" has a better score than "ab", so it is merged first; any pair that makes a token may follow
    assert tokenizer.encode("ab aab") == [1, 264, 262, 263]
    assert tokenizer.encode("é", add_special=False) == [259, 3 + 0xC3, 3 + 0xA9]
    for text in ("ab a", "é 日本 😀", "a\nb", "  a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.special_tokens["bos_token"]) == (WORDS, "<s>")


def test_faults(tmp_path: Path) -> None:
    path = tmp_path / "tiny.bin"
    write(path)
    with pytest.raises(SnelloError, match="has no tokenizer beside it"):
        _ = load(path).tokenizer
    write_pieces(tmp_path / "tokenizer.bin")
    raw = (tmp_path / "tokenizer.bin").read_bytes()
    (tmp_path / "tokenizer.bin").write_bytes(raw[:-1])
    with pytest.raises(SnelloError, match=f"ends before token {WORDS - 1} of {WORDS}"):
        _ = load(path).tokenizer
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(SnelloError, match=f"of {len(whole):,} bytes, it has {len(whole) - 4:,}"):
        load(path)


@pytest.mark.skipif(not STORIES.exists(), reason="../shared/data is not here")
def test_the_real_one() -> None:
    model = load(STORIES)
    assert model.num_parameters == 260_032
    ids = model.tokenizer.encode("Once upon a time, there was a little girl named Lily.")
    assert ids[:5] == [1, 403, 407, 261, 378]
    assert model.tokenizer.decode(ids) == "Once upon a time, there was a little girl named Lily."
