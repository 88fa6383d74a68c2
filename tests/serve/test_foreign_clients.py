"""Clients that others wrote, unmodified and each in its own environment (`make test-clients` installs them): OpenAI's
for Node, LangChain, LiteLLM, and lm-eval, whose figures must be the ones that the engine computes. Absent ones skip."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import snello.models.demo
from snello.engine.llm import LLM
from snello.serve.keys import Keys
from snello.serve.options import ServeOptions
from tests.serve.test_clients import SCHEMA
from tests.serve.world import WEATHER, Running, make_chat, make_encoder, serving

pytestmark = pytest.mark.slow
CLIENTS = Path(os.environ.get("SNELLO_CLIENTS") or Path.home() / ".cache" / "snello" / "clients")
PROGRAMS = Path(__file__).parent / "clients"
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
KEY = "sk-local-0123456789"
SAY: Any = [{"role": "user", "content": "def area(r):"}]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    chat, encoder = make_chat(folder / "chat"), make_encoder(folder / "bert")
    keys = Keys({hashlib.sha256(KEY.encode()).digest(): "tests"})
    with serving(ServeOptions(models=(f"chat={chat}", f"bert={encoder}", "demo"), max_num_seqs=4), keys, KEY) as here:
        yield here


def run(here: Running, command: list[str | Path], **more: str) -> str:
    """What a client prints; it knows the server by the environment alone, as OpenAI's clients do."""
    address = {"OPENAI_BASE_URL": f"{here.address}/v1", "OPENAI_API_BASE": f"{here.address}/v1", "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        command, env=os.environ | OFFLINE | address | more, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def python_of(name: str) -> Path:
    python = CLIENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} is not installed: make test-clients")
    return python


def told(here: Running, command: list[str | Path], **more: str) -> dict[str, Any]:
    asked = json.dumps({"messages": SAY, "tool": WEATHER, "schema": SCHEMA})
    return dict(json.loads(run(here, [*command, asked], **more).splitlines()[-1]))


def check_talk(here: Running, said: dict[str, Any]) -> None:
    """What every chat client must have seen."""
    body = {"model": "chat", "messages": SAY, "max_tokens": 12, "seed": 4}
    expected = here.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert said["whole"] == said["streamed"] == expected and expected
    arguments = json.loads(said["call"]["arguments"])
    assert said["call"]["name"] == "weather" and arguments["town"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
    assert here.idle("chat")


def check_form(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"x", "kind"} and value["x"] in range(10) and value["kind"] in ("a", "b")


def test_openai_for_node(here: Running) -> None:
    node, home = shutil.which("node"), CLIENTS / "node"
    if node is None or not (home / "node_modules" / "openai").exists():
        pytest.skip("node or its openai is not installed: make test-clients")
    said = told(here, [node, PROGRAMS / "openai_node.mjs"], SNELLO_CLIENT_HOME=str(home))
    check_talk(here, said)
    check_form(said["held"])
    assert said["usage"][0] == said["usage"][1] and said["vectors"] == [96, 96] and said["response"]
    assert said["refused"] == ["NotFoundError", "model_not_found"]


def test_langchain(here: Running) -> None:
    said = told(here, [python_of("langchain"), PROGRAMS / "langchain_chat.py"])
    check_talk(here, said)
    check_form(said["held"])
    assert said["batch"] == [said["whole"]] * 3 and said["text"] and said["vectors"] == [96, 96]


def test_litellm(here: Running) -> None:
    said = told(here, [python_of("litellm"), PROGRAMS / "litellm_chat.py"], LITELLM_LOCAL_MODEL_COST_MAP="True")
    check_talk(here, said)
    assert said["refused"] == "NotFoundError"


# ---- lm-eval --------------------------------------------------------------------------------------------------------

LAST_WORD = """\
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
WHOLE_TEXT = """\
task: whole_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}{{{{target}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def documents(text: str, count: int) -> list[dict[str, str]]:
    """Passages, each with its last word apart; the blank before it is the word's, as lm-eval has it."""
    found = [" ".join(block.split()) for block in text.split("\n\n")]
    cut = [block[:400].rpartition(" ") for block in found if len(block) > 80][:count]
    return [{"context": context, "target": " " + word} for context, _, word in cut]


def evaluate(here: Running, folder: Path, model: str, tokenizer: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("last_word", LAST_WORD), ("whole_text", WHOLE_TEXT)):
        (folder / f"{name}.yaml").write_text(task.format(file=folder / "rows.json"))
    arguments = f"model={model},base_url={here.address}/v1/completions,tokenizer={tokenizer},max_length=1024"
    arguments += ",num_concurrent=2,max_retries=1"
    command: list[str | Path] = [python_of("lm-eval"), "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", arguments, "--tasks", "last_word,whole_text", "--include_path", folder]
    command += ["--batch_size", "3"]
    run(here, [*command, "--output_path", folder / "out"], HF_HOME=str(folder / "hf"))
    (result,) = (folder / "out").rglob("results_*.json")
    return dict(json.loads(result.read_text())["results"])


def check_figures(results: dict[str, Any], llm: LLM, rows: list[dict[str, str]]) -> None:
    """lm-eval's figures beside the engine's own log-probabilities of the same texts."""
    sums, hits, nats = list[float](), 0, 0.0
    (end, *_) = llm.model.spec.eos_tokens  # before each text: what lm-eval takes where there is no other beginning
    for row in rows:
        ids, length = llm.encode(row["context"] + row["target"]), len(llm.encode(row["context"]))
        scores = llm.score(ids)
        sums.append(float(scores.log_probabilities[length - 1 :].astype(float).sum()))
        hits += scores.top1[length - 1 :].tolist() == ids[length:]
        nats -= float(llm.score([end, *ids]).log_probabilities.astype(float).sum())
    words = sum(len(re.split(r"\s+", row["context"] + row["target"])) for row in rows)  # as lm-eval counts them
    size = sum(len((row["context"] + row["target"]).encode()) for row in rows)
    last, text = results["last_word"], results["whole_text"]
    assert last["perplexity,none"] == pytest.approx(math.exp(-sum(sums) / len(rows)), rel=1e-5)
    assert last["acc,none"] == pytest.approx(hits / len(rows))
    assert text["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert text["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_lm_eval_says_what_the_engine_says(here: Running, tmp_path: Path) -> None:
    home = Path(snello.models.demo.__file__).parent
    rows = documents((Path(__file__).parents[2] / "docs" / "serve.md").read_text(), 12)
    results = evaluate(here, tmp_path, "demo", home, rows)
    with LLM("demo") as llm:
        check_figures(results, llm, rows)


def test_lm_eval_on_novels(tmp_path: Path) -> None:
    home, text = DATA / "models" / "novels-16m", DATA / "text" / "english_novels_valid.txt"
    if not (home.exists() and text.exists()):
        pytest.skip("the test data is not here")
    with text.open(encoding="utf-8") as file:
        rows = documents(file.read(200_000), 60)
    keys = Keys({hashlib.sha256(KEY.encode()).digest(): "tests"})
    with serving(ServeOptions(models=(f"novels={home}",)), keys, KEY) as here:
        results = evaluate(here, tmp_path, "novels", home, rows)
    with LLM(str(home)) as llm:
        check_figures(results, llm, rows)
