"""The certificate beside the answers: made once, kept for what it was shown for, refused for all else."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snello.errors import SnelloError
from snello.serve.caches import proof
from snello.serve.caches.certify import Certificate
from snello.serve.caches.embed import NgramEmbedder
from snello.serve.caches.proof import NAME, SimilarSettings, open_similar
from tests.serve.caches.test_labelled import pairs
from tests.serve.caches.test_similar import PARIS, SPACE, cache, certificate

SETTINGS = SimilarSettings(encoder="words", bound=0.05)


def write_pairs(path: Path, **names: Any) -> Path:
    rows = [{"text_a": one, "text_b": other, "label": int(same)} for one, other, same in pairs(**names)]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a certificate in it."""
    settings = replace(SETTINGS, pairs=write_pairs(tmp_path / "pairs.json", count=300))
    opened = open_similar(settings, tmp_path / "similar")
    assert opened is not None and opened.similar.serves
    assert "0 wrong of" in settings.outcome(opened)
    opened.close()
    return tmp_path / "similar"


def test_certified_once_and_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "certify_pairs", None)  # would fail
    for settings in (SETTINGS, replace(SETTINGS, pairs=folder.parent / "pairs.json"), replace(SETTINGS, bound=0.1)):
        opened = open_similar(settings, folder)
        assert opened is not None and opened.similar.serves
        opened.close()


def test_what_it_was_not_shown_for_is_refused(folder: Path) -> None:
    for settings in (replace(SETTINGS, bound=0.01), replace(SETTINGS, confidence=0.99)):
        with pytest.raises(SnelloError, match="less is asked for") as caught:
            open_similar(settings, folder)
        assert "--similar-pairs" in str(caught.value.hint)
    replace(Certificate.load(folder / NAME), embedder="another").save(folder / NAME)
    with pytest.raises(SnelloError, match="another embedder"):
        open_similar(SETTINGS, folder)
    with pytest.raises(SnelloError, match="nothing is certified"):
        open_similar(SETTINGS, folder.parent / "none")


def test_other_pairs_are_certified_anew(folder: Path) -> None:
    other = replace(SETTINGS, pairs=write_pairs(folder.parent / "others.json", count=250))
    opened = open_similar(other, folder)
    assert opened is not None and opened.similar.certificate is not None
    assert opened.similar.certificate.questions == 250 == Certificate.load(folder / NAME).questions
    opened.close()


def test_what_cannot_be_certified_stays_off(tmp_path: Path) -> None:
    settings = replace(SETTINGS, pairs=write_pairs(tmp_path / "pairs.json", count=300, wrong_every=5))
    assert open_similar(settings, tmp_path / "similar") is None
    assert settings.outcome(None).startswith("off: these pairs do not certify at most 0.05")
    assert not (tmp_path / "similar").exists()


def test_a_flipped_bit_in_a_certificate_is_refused(folder: Path) -> None:
    whole, source = (folder / NAME).read_bytes(), random.Random(5)
    meant = Certificate.load(folder / NAME)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << source.randrange(8)
        (folder / NAME).write_bytes(damaged)
        try:
            assert Certificate.load(folder / NAME) == meant  # a space that became another one
        except SnelloError as error:
            assert "no sound certificate" in error.message
    (folder / NAME).write_bytes(whole.replace(b'"hits": ', b'"hits": 9'))
    for settings in (SETTINGS, replace(SETTINGS, pairs=folder.parent / "pairs.json")):
        with pytest.raises(SnelloError, match="no sound certificate"):  # it might have been a revoked one
            open_similar(settings, folder)


def test_a_revoked_one_stays_so(folder: Path) -> None:
    opened = open_similar(SETTINGS, folder)
    assert opened is not None
    for _ in range(30):
        opened.judged(right=False)
    opened._thread.shutdown(wait=True)
    opened.close()
    again = open_similar(replace(SETTINGS, pairs=folder.parent / "pairs.json"), folder)
    assert again is not None and not again.similar.serves
    assert "audited hits were wrong" in SETTINGS.outcome(again)
    again.close()


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is served that could not be kept; and what cannot be revoked on disk is removed."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("snello.serve.caches.certify.write_atomically", full)
    settings = replace(SETTINGS, pairs=folder.parent / "pairs.json")
    with pytest.raises(SnelloError, match="cannot be kept: .*No space left"):
        open_similar(settings, folder.parent / "other")
    similar = cache(path=folder / NAME)
    for _ in range(30):
        similar.judged(right=False)
    assert not similar.serves and not (folder / NAME).exists() and "the certificate goes" in caplog.text


def test_an_encoder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SnelloError):
        open_similar(replace(SETTINGS, encoder=str(tmp_path)), tmp_path / "similar")
    with pytest.raises(SnelloError, match="gives no vectors of texts"):
        open_similar(replace(SETTINGS, encoder="demo"), tmp_path / "similar")


def test_a_demoted_cache_learns_nothing() -> None:
    similar = cache()
    similar.certificate = replace(certificate(NgramEmbedder().digest), revoked="by hand")
    assert not similar.keep(SPACE, PARIS, b"k", finish_reason="stop") and len(similar) == 0
