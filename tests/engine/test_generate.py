"""Generation: the right tokens in the right order, text that never splits, and every way to end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import snello
from snello.engine.request import SamplingParams
from snello.errors import SnelloError
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[snello.LLM]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNELLO_CACHE", str(folder / "cache"))
        with snello.LLM(make_checkpoint(folder / "llama", "llama"), context=256) as model:
            yield model


def test_greedy_is_the_argmax_of_the_logits(llm: snello.LLM) -> None:
    output = llm.generate("The rain in Spain", temperature=0, max_tokens=12, ignore_eos=True)
    ids = list(output.prompt_token_ids)
    for token in output.token_ids:
        assert token == int(llm.executor.logits(ids, [len(ids) - 1])[0].argmax())
        ids.append(token)
    assert output.finish_reason == "length"
    assert output.usage.completion_tokens == 12


def test_a_seed_repeats_and_seeds_differ(llm: snello.LLM) -> None:
    texts = [llm.generate("Once", seed=seed, max_tokens=24, ignore_eos=True).token_ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_n_answers_are_those_of_following_seeds(llm: snello.LLM) -> None:
    several = llm.generate("Once", seed=5, n=2, max_tokens=10, ignore_eos=True)
    alone = llm.generate("Once", seed=6, max_tokens=10, ignore_eos=True)
    assert several.outputs[1].token_ids == alone.token_ids


def test_streamed_text_is_the_text_and_never_splits_a_character(llm: snello.LLM) -> None:
    for seed in range(8):
        params = SamplingParams(seed=seed, max_tokens=60, ignore_eos=True, temperature=1.5)
        chunks = list(llm.stream("α and 猫", params))
        ids = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
        assert "".join(chunk.text for chunk in chunks) == llm.tokenizer.decode(ids)
        assert sum(chunk.finish_reason is not None for chunk in chunks) == 1
        assert chunks[-1].usage is not None


def test_stop_strings_end_the_answer_and_are_held_back(llm: snello.LLM) -> None:
    whole = llm.generate("Once", seed=3, max_tokens=60, ignore_eos=True).text
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    chunks = list(llm.stream("Once", seed=3, max_tokens=60, ignore_eos=True, stop=(stop,)))
    assert "".join(chunk.text for chunk in chunks) == expected
    assert chunks[-1].finish_reason == "stop"
    kept = llm.generate("Once", seed=3, max_tokens=60, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert kept.text == expected + stop


def test_an_end_token_ends_the_answer(llm: snello.LLM) -> None:
    first = llm.generate("Once", temperature=0, max_tokens=5, ignore_eos=True).token_ids
    ended = llm.generate("Once", temperature=0, max_tokens=5, stop_token_ids=(first[2],))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == first[: first.index(first[2])]
    biased = llm.generate("Once", temperature=0, logit_bias={0: 1000.0})
    assert biased.finish_reason == "stop" and biased.text == ""


def test_the_context_ends_the_answer(llm: snello.LLM) -> None:
    output = llm.generate("," * 250, temperature=0, max_tokens=100, ignore_eos=True)
    assert output.finish_reason == "length"
    assert len(output.prompt_token_ids) + len(output.token_ids) == llm.executor.context
    with pytest.raises(SnelloError, match="300 tokens and the context here is 256"):
        llm.generate("," * 300)


def test_logprobs_are_those_of_score(llm: snello.LLM) -> None:
    output = llm.generate("Once", seed=1, max_tokens=8, logprobs=3, ignore_eos=True)
    scores = llm.score([*output.prompt_token_ids, *output.token_ids]).log_probabilities
    given = output.outputs[0].logprobs
    assert given is not None and all(len(item.top) == 3 for item in given)
    np.testing.assert_allclose([item.logprob for item in given], scores[len(output.prompt_token_ids) - 1 :], atol=1e-5)


def test_a_token_among_the_most_likely_has_the_number_that_it_was_drawn_with(llm: snello.LLM) -> None:
    [answer] = llm.generate("Once", temperature=0, max_tokens=8, logprobs=3, ignore_eos=True).outputs
    assert answer.logprobs is not None
    assert [item.top[0] for item in answer.logprobs] == [(item.token_id, item.logprob) for item in answer.logprobs]


@pytest.mark.parametrize("top_k", [2**31, 2**32 + 1])
def test_a_top_k_beyond_the_vocabulary_means_all(llm: snello.LLM, top_k: int) -> None:
    asked = {"seed": 3, "max_tokens": 8, "temperature": 1.5, "ignore_eos": True}
    assert llm.generate("Once", top_k=top_k, **asked).token_ids == llm.generate("Once", **asked).token_ids


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"max_new_tokens": 5}, "unknown sampling parameter 'max_new_tokens'"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"min_p": float("nan")}, "min_p"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 5.5}, "max_tokens is 5.5"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"stop": ("",)}, "stop string is empty"),
        ({"logit_bias": {999: 1.0}}, "names token 999"),
    ],
)
def test_bad_parameters(llm: snello.LLM, names: dict[str, object], message: str) -> None:
    with pytest.raises(SnelloError, match=message) as caught:
        llm.generate("Once", **names)
    assert caught.value.hint


def test_pages_are_free_after_a_stream_is_dropped(llm: snello.LLM) -> None:
    stream = llm.stream("Once", max_tokens=50, ignore_eos=True)
    next(stream)
    stream.close()
    assert llm.executor.pages.num_free == llm.executor.pages.num_pages
