"""What stands between a server and similar questions: an embedder, and a certificate that is kept beside the answers.

Labelled pairs are certified once; the certificate is found again at the next start, as long as embedder, guard, pairs
and bound are the same. One that was made for another embedder is refused, and one that an audit has revoked stays so
until somebody removes it. Where nothing can be certified the cache stays off, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snello.engine.llm import LLM
from snello.errors import SnelloError
from snello.serve.caches.certify import Certificate
from snello.serve.caches.embed import Embedder, EncoderEmbedder, NgramEmbedder, minilm_folder
from snello.serve.caches.guard import Guard
from snello.serve.caches.identity import digest
from snello.serve.caches.labelled import certify_pairs, read_pairs
from snello.serve.caches.lookup import Lookups
from snello.serve.caches.similar import SimilarAnswers, SimilarOptions

NAME = "certificate.json"
WORDS, MINILM = "words", "minilm"  # no folders: pieces of words without a model; the encoder of the extra
AGAIN = "--similar-pairs FILE certifies on labelled questions"


@dataclass(frozen=True, kw_only=True)
class SimilarSettings:
    """How similar questions are served.

    Attributes:
        encoder: "words", "minilm", or an encoder's folder or name.
        pairs: a file of labelled questions to certify on; None: what was certified before.
        bound, confidence: at most this share of hits is wrong, with this confidence.
        audit: share of hits that are computed too, after they were given, and judged.
    """

    encoder: str
    pairs: Path | None = None
    bound: float = 0.01
    confidence: float = 0.95
    audit: float = 0.05

    def outcome(self, opened: Lookups | None) -> str:
        """What became of it, in a line."""
        asked = f"at most {self.bound:.3g} wrong among hits at {self.confidence:.3g}"
        if opened is None:
            return f"off: these pairs do not certify {asked}"
        proof = opened.similar.certificate
        assert proof is not None
        if proof.revoked:
            return f"off: {proof.revoked}; who removes the certificate from --cache may certify anew"
        shown = f"{proof.wrong} wrong of {proof.hits} hits on {proof.questions} labelled questions"
        return f"{asked}, from a similarity of {proof.threshold:g} on ({shown})"


def open_similar(settings: SimilarSettings, folder: Path) -> Lookups | None:
    """Similar answers with their certificate in `folder`; None: nothing can be certified, so they stay off.

    Raises:
        SnelloError: no such encoder or pairs; nothing was certified yet, or for something else.
    """
    pairs = read_pairs(settings.pairs) if settings.pairs is not None else None
    embedder, close = _embedder(settings.encoder)
    try:
        guard, path = Guard(), folder / NAME
        found = _kept(path, embedder, guard, settings, None if pairs is None else digest(pairs))
        if found is None and pairs is not None:
            epsilon, confidence = settings.bound, settings.confidence
            found = certify_pairs(pairs, embedder, guard, epsilon=epsilon, confidence=confidence)
            if found is not None:
                _save(found, path)
        if found is None:
            close()
            return None
        similar = SimilarAnswers(embedder, guard, found, SimilarOptions(audit=settings.audit), path=path)
        return Lookups(similar, close=close)
    except BaseException:
        close()
        raise


def _embedder(encoder: str) -> tuple[Embedder, Callable[[], None]]:
    """One thread: the others are the model's that serves."""
    if encoder == WORDS:
        return NgramEmbedder(), lambda: None
    llm = LLM(minilm_folder() if encoder == MINILM else encoder, threads=1)
    try:
        return EncoderEmbedder(llm), llm.close
    except BaseException:
        llm.close()
        raise


def _kept(
    path: Path, embedder: Embedder, guard: Guard, settings: SimilarSettings, labels: str | None
) -> Certificate | None:
    """The certificate of this folder; None: there is none for these pairs, so that one must be made.

    Raises:
        SnelloError: it was changed; or there are no pairs to make one that fits.
    """
    if not path.exists():
        if labels is not None:
            return None
        raise SnelloError(f"nothing is certified for similar questions: there is no {path}", AGAIN)
    found = Certificate.load(path)
    fits = (found.embedder, found.guard) == (embedder.digest, guard.digest)
    if labels is not None:
        same = fits and (found.labels, found.epsilon, found.confidence) == (labels, settings.bound, settings.confidence)
        return found if same else None
    if not fits:
        raise SnelloError(f"{path} was certified for another embedder, or other rules", AGAIN)
    if found.epsilon > settings.bound or found.confidence < settings.confidence:
        shown = f"{found.epsilon:.3g} wrong among hits at {found.confidence:.3g}"
        raise SnelloError(f"{path} shows at most {shown}, and less is asked for", AGAIN)
    return found


def _save(found: Certificate, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        found.save(path)
    except OSError as error:
        message = f"the certificate cannot be kept: {path}: {error.strerror}"
        raise SnelloError(message, "give --cache a folder with room") from None
