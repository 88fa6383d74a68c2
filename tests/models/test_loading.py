"""`load`: what a name stands for, and one clear line for what it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import errors

from snello.engine.native import NativeExecutor
from snello.errors import SnelloError, Unsupported
from snello.models import hub, load, loading
from snello.models.loading import no_vectors
from snello.models.reference import Reference
from snello.models.spec import Deployment
from tests.checkpoints import ENCODER, make_checkpoint, write_tokenizer

NOVELS = Path(__file__).parents[3] / "shared/data/models/novels-16m"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "is a GGUF file"),
        ("model.onnx", "is a ONNX file"),
        ("pytorch_model.bin", "is a pickled file"),
        ("model.pt", "is a pickled file"),
        ("model.safetensors", "is only the weights"),
        ("song.mp3", "is not a model"),
    ],
)
def test_files_that_are_no_model(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff" * 100)
    with pytest.raises(SnelloError, match=message) as caught:
        load(tmp_path / name)
    assert caught.value.hint


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(SnelloError, match="is not a model folder: it holds no config.json"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Unsupported, match="is an adapter"):
        load(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(Unsupported, match="GGUF"):
        load(tmp_path)


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("absent", "/absent/folder/model", "./a/b", "a/b/c", Path("org/name")):
        with pytest.raises(SnelloError, match="does not exist"):
            load(name)


def test_a_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(SnelloError, match=r"config.json is not valid JSON"):
        load(tmp_path)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "DEMO", tmp_path / "demo")
    with pytest.raises(SnelloError, match="no demo model"):
        load("demo")
    make_checkpoint(tmp_path / "demo", "llama")
    assert load("demo").name == "demo"


def test_generation_settings_are_kept(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [3, 0]}))
    model = load(folder)
    assert model.generation["temperature"] == 0.6 and model.spec.eos_tokens == (3, 0)
    assert (model.name, model.history, model.path) == ("m", (), folder)


@pytest.mark.parametrize(
    ("variant", "architecture"), [("lfm2", "Lfm2Model"), ("llama", "LlamaModel"), ("bert-mlm", "BertModel")]
)
def test_what_a_model_without_vectors_lacks(tmp_path: Path, variant: str, architecture: str) -> None:
    """The hint is true: with that architecture in its config.json the same folder embeds."""
    folder = make_checkpoint(tmp_path / "m", variant)
    error = no_vectors(load(folder), "m")
    assert "gives no vectors of texts" in error.message and f'["{architecture}"]' in str(error.hint)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).spec.head.kind == "embed" and load(folder).spec == load(folder, task="embedding").spec


def test_gpt2_gives_vectors_where_python_asks_for_them(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "gpt2")
    assert no_vectors(load(folder), "m").hint == 'load it in Python with task="embedding"'
    assert load(folder, task="embedding").spec.head.pooling == "last"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("temperature", True),
        ("top_p", 7),
        ("top_p", 0),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", [1.1]),
        ("do_sample", "false"),
        ("eos_token_id", "x"),
        ("eos_token_id", [2, None]),
        ("pad_token_id", 1.5),
        ("max_length", -1),
        ("max_new_tokens", "all"),
    ],
)
@pytest.mark.parametrize("sampled", [True, False])
def test_generation_settings_that_cannot_be_meant_are_named(
    tmp_path: Path, key: str, value: object, sampled: bool
) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": sampled} | {key: value}))
    with pytest.raises(SnelloError, match=f"generation_config.json: {key} is .*, expected") as caught:
        load(folder)
    assert caught.value.hint is not None and key in caught.value.hint


def test_generation_settings_of_null_or_of_no_matter_here_pass(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    settings = {"temperature": None, "eos_token_id": None, "max_length": None, "transformers_version": 5, "top_k": -1}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"watermark": {"x": 1}, "pad_token_id": -1}))
    assert load(folder).spec == load(make_checkpoint(tmp_path / "plain", "llama")).spec


@pytest.mark.skipif(not NOVELS.exists(), reason="../shared/data is not here")
def test_a_real_model() -> None:
    model = load(NOVELS)
    assert model.num_parameters == 15_736_192 and model.spec.default_format.weights == "bf16"
    assert model.spec.eos_tokens == (0,) and model.tokenizer.vocab_size == 8192


def test_running_needs_no_torch(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    code = "import sys; from snello.models import load; m = load(sys.argv[1])"
    code += "; m.tokenizer; m.weights.values('norm.weight')"
    code += (
        "; bad = {'torch', 'transformers', 'huggingface_hub', 'safetensors'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


# ---- sentence-transformers ------------------------------------------------------------------------------------------

MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


def sentence_folder(path: Path, *, modules: list[tuple[str, str]] = MODULES, encoder: str = "", **pooling: Any) -> Path:
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**ENCODER)).save_pretrained(path / encoder)
    write_tokenizer(path / encoder, 307)
    (path / encoder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 50, "do_lower_case": False})
    )
    return write_modules(path, modules, **pooling)


def write_modules(path: Path, modules: list[tuple[str, str]] = MODULES, **pooling: Any) -> Path:
    (path / "1_Pooling").mkdir()
    mode = pooling or {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (path / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 96, **mode}))
    listed = [{"idx": i, "path": p, "type": f"sentence_transformers.models.{t}"} for i, (p, t) in enumerate(modules)]
    (path / "modules.json").write_text(json.dumps(listed))
    return path


def test_a_sentence_folder(tmp_path: Path) -> None:
    spec = load(sentence_folder(tmp_path / "m")).spec
    assert (spec.task, spec.head.kind, spec.head.pooling, spec.head.normalize) == ("embedding", "embed", "mean", True)
    assert spec.max_positions == 50 and spec.embedding.learned_positions == 128
    assert load(tmp_path / "m", task="embedding").spec == spec


def test_other_poolings_and_places(tmp_path: Path) -> None:
    modules = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    old = load(sentence_folder(tmp_path / "a", modules=modules, encoder="0_Transformer", pooling_mode_cls_token=True))
    assert (old.spec.head.pooling, old.spec.head.normalize) == ("cls", False)
    assert old.tokenizer.vocab_size > 256
    assert load(sentence_folder(tmp_path / "b", pooling_mode="mean")).spec.head.pooling == "mean"


@pytest.mark.parametrize("headless", [True, False])
@pytest.mark.parametrize("mode", ["lasttoken", "cls", "mean"])
def test_a_decoder_that_is_pooled(headless: bool, mode: str, tmp_path: Path) -> None:
    """As Qwen3-Embedding is: causal rows, one of them (or their mean) for the text, saved with a head or without."""
    folder = make_checkpoint(tmp_path / "m", "qwen3")
    stock = transformers.AutoModel.from_pretrained(folder).eval()
    if headless:
        stock.save_pretrained(folder)
    write_modules(folder, pooling_mode=mode)
    model = load(folder)
    assert (model.spec.task, model.spec.head.kind, model.spec.causal) == ("embedding", "embed", False)
    assert all(layer.mixer.causal for layer in model.spec.layers)
    tokens = torch.randint(0, model.spec.vocab_size, (1, 23), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        rows = stock(tokens).last_hidden_state[0]
    pooled = {"lasttoken": rows[-1], "cls": rows[0], "mean": rows.mean(0)}[mode]
    expected = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    with NativeExecutor(model, Deployment(threads=1)) as executor:
        found = executor.encode(tokens[0].tolist())
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(Reference.from_model(model).embed(tokens)[0].detach().numpy() - expected).max() < 1e-5


def test_what_a_sentence_folder_may_not_say(tmp_path: Path) -> None:
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    with pytest.raises(Unsupported, match="pooling_mode_mean_tokens, pooling_mode_max_tokens"):
        load(sentence_folder(tmp_path / "a", **both))
    with pytest.raises(Unsupported, match="lists Transformer, Pooling, Dense"):
        load(sentence_folder(tmp_path / "b", modules=[*MODULES[:2], ("2_Dense", "Dense")]))
    folder = sentence_folder(tmp_path / "c")
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"q": "query: "}, "default_prompt_name": "q"}'
    )
    with pytest.raises(Unsupported, match="default prompt"):
        load(folder)
    (folder / "config_sentence_transformers.json").write_text(
        '{"prompts": {"q": "query: "}, "default_prompt_name": null}'
    )
    load(folder)
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(Unsupported, match="do_lower_case"):
        load(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": "long"}')
    with pytest.raises(SnelloError, match="max_seq_length"):
        load(folder)
    (folder / "modules.json").write_text("{}")
    with pytest.raises(SnelloError, match="modules.json"):
        load(folder)


# ---- the Hub --------------------------------------------------------------------------------------------------------


def test_a_hub_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "snapshot", "llama")
    asked: list[Any] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or folder
    )
    model = load("org/some-model")
    assert (model.name, model.path) == ("org/some-model", folder)
    [(name, options)] = asked
    assert name == "org/some-model"
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in options["allow_patterns"])


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda name: pytest.fail("asked the Hub"))
    make_checkpoint(tmp_path / "org" / "name", "llama")
    assert load("org/name").name == "name"


def test_the_local_cache_is_used_offline(tmp_path: Path) -> None:
    """The Hub's own cache layout, read with HF_HUB_OFFLINE, in a process of its own as these are read at import."""
    repo = tmp_path / "hub" / "models--org--tiny"
    commit = "0" * 40
    make_checkpoint(repo / "snapshots" / commit, "llama")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = """
import sys
from snello.errors import SnelloError
from snello.models import load
from snello.models.loading import no_vectors
print(load("org/tiny").num_parameters)
try:
    load("org/absent")
except SnelloError as error:
    print(error.message)
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    number, line = run.stdout.strip().splitlines()
    assert int(number) == load(repo / "snapshots" / commit).num_parameters
    assert line.startswith("org/absent is not a local folder, not in the Hub cache, and the Hub cannot be reached")


RESPONSE = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("403\nmore", response=RESPONSE), "the Hub model org/name is gated"),
        (
            errors.RepositoryNotFoundError("404\nmore", response=RESPONSE),
            "neither a local folder nor a model on the Hub",
        ),
        (errors.LocalEntryNotFoundError("offline"), "the Hub cannot be reached"),
        (errors.HFValidationError("bad name"), "neither a local folder nor a Hub name"),
        (
            errors.HfHubHTTPError("500 Server Error\nlong text", response=RESPONSE),
            "downloading org/name failed: 500 Server",
        ),
        (ConnectionError("no route"), "downloading org/name failed: no route"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_hub_errors_are_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SnelloError, match=message) as caught:
        load("org/name")
    assert "\n" not in caught.value.message
