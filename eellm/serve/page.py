"""The playground's files: one page that asks this server, without a build step and without any other host.

They are read once, under a fixed table of names: no path from a request is ever opened. They hold nothing that is
worth a key, and the page is where a key is typed in, so they want none.
"""

import hashlib
from importlib.resources import files

from fastapi import FastAPI, Request, Response

_SCRIPT = "text/javascript; charset=utf-8"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground/style.css": ("style.css", "text/css; charset=utf-8"),
    "/playground/app.js": ("app.js", _SCRIPT),
    "/playground/api.js": ("api.js", _SCRIPT),
    "/playground/state.js": ("state.js", _SCRIPT),
    "/playground/view.js": ("view.js", _SCRIPT),
}
"""By path: the file beside this module, and its type."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, and asked about each time: a new version is seen at once
}


def add_playground(app: FastAPI) -> None:
    folder = files("eellm.serve") / "playground"
    for path, (name, kind) in FILES.items():
        _add(app, path, (folder / name).read_bytes(), kind)


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    headers = HEADERS | {"etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    @app.get(path, include_in_schema=False)
    async def file(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if headers["etag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)
