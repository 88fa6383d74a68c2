"""The page at `/`, and the proof that it shows: files of this package as they are, and what a model's receipts say.

The files hold nothing of anybody, so they are open; every request that the page makes needs the key. The policy lets
the page load and call nothing but this server, and forbids making HTML from text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from snello.errors import SnelloError
from snello.optimize.receipts import read
from snello.report.sections import page
from snello.report.write import to_json
from snello.serve.errors import RequestError
from snello.serve.served import Served

if TYPE_CHECKING:
    from snello.serve.app import App

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
FILES = {path.name: path for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}


def is_page(path: str) -> bool:
    """Whether this is one of the page's own files, which hold nothing and ask for no key."""
    return path == "/" or path.removeprefix("/page/") in FILES


async def page_file(app: App, request: Request) -> Response:
    found = FILES.get(request.path_params.get("name", "index.html"))
    if found is None:
        raise RequestError(f"there is no {request.url.path}", code="not_found", status=404)
    return Response(found.read_bytes(), headers=HEADERS, media_type=TYPES[found.suffix])


def proof_of(served: Served) -> dict[str, Any]:
    """The sentence and the sections of a model's report; no sections where nothing was proved."""
    model = served.llm.model
    if served.parent is not None:
        sentence = f"{served.name} is {served.parent} with an adapter, made to answer otherwise: no proof of its own."
        return {"sentence": sentence, "sections": []}
    try:
        receipts = read(model.path)
    except SnelloError:
        changed = "changed, and without a proof" if model.history else "not made lean: nothing to prove"
        return {"sentence": f"{model.name} is {changed}.", "sections": []}
    sentence = receipts.proof.sentence if receipts.proof is not None else "This run ended before its proof."
    return {"sentence": sentence, "sections": to_json(page(receipts), receipts)["sections"]}
