"""What the server is doing, as one JSON table: for its page, and for who watches it by hand."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from snello.measure.machine import ceiling, known_machine
from snello.serve.caches.lookup import Lookups
from snello.serve.metrics import facts
from snello.serve.served import Served

if TYPE_CHECKING:
    from snello.serve.app import App


def status_of(app: App) -> dict[str, Any]:
    """Models with their counts since the start; who asks twice can take differences for speeds."""
    from snello import __version__

    return {
        "snello": __version__,
        "ready": app.ready,
        "seconds": time.monotonic() - app.started,
        "requests_inside": app.inside,
        "answers_on_disk": vars(app.models.exact.counters) if app.models.exact is not None else None,
        "similar_questions": _similar(app.models.similar) if app.models.similar is not None else None,
        "models": [_model(served) for served in app.models.values()],
    }


def _similar(lookups: Lookups) -> dict[str, Any]:
    similar = lookups.similar
    assert similar.certificate is not None, "a server has none without"
    return {
        "serves": similar.serves,
        "entries": len(similar),
        "certificate": asdict(similar.certificate),
        "counts": vars(similar.counters),
    }


def _model(served: Served) -> dict[str, Any]:
    llm, gate = served.llm, served.gate
    return {
        "name": served.name,
        "parent": served.parent,
        "parameters": llm.model.num_parameters,
        "context": served.context,
        "answers": list(served.urls),
        "functions": served.call_format,
        "queue": {"tokens": gate.inside, "most_tokens": gate.queue_tokens, "refused": dict(gate.refused)},
        "counts": facts(served),
        "ceiling": _ceiling(served),
    }


def _ceiling(served: Served) -> dict[str, float] | None:
    """Tokens a second that this machine allows, with as many streams as run; None where it was never probed."""
    executor = served.llm.executor
    here = known_machine(executor.threads, executor.isa)
    if here is None or not served.llm.model.spec.causal:
        return None
    streams = max(1, served.worker.engine.num_running)
    limit = ceiling(executor.spec, here, streams=streams, measured_bytes=executor.bytes_per_token())
    return {
        "streams": streams,
        "decode_tokens_per_second": limit.decode_tokens_per_second,
        "prefill_tokens_per_second": limit.prefill_tokens_per_second,
    }
