"""Who may ask, and how much they may send: keys, names of hosts, sizes. All of it before any handler runs.

Keys are compared by their digests, each with all, in constant time. A body is read here, whole and counted, whatever
its headers say; handlers find it ready.
"""

import asyncio
import hashlib
import hmac
import tomllib
from collections.abc import Mapping
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eellm.config.serve import ServeConfig
from eellm.errors import ConfigError
from eellm.serve.observe import note, send_json
from eellm.serve.page import FILES
from eellm.serve.refusals import Refusal

OPEN = frozenset({"/health", *FILES})
"""The paths that never want a key."""
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def read_keys(path: Path) -> dict[str, str]:
    """Keys by their owners' names, from lines `name = "key"`. Raises ConfigError."""
    try:
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    if not keys:
        raise ConfigError(f'{path}: holds no keys; write lines such as alice = "a long random word"')
    for name, key in keys.items():
        if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{path}: the key of {name!r} must be a string of visible ASCII characters")
    if len(set(keys.values())) < len(keys):
        raise ConfigError(f"{path}: two names have the same key; give each its own")
    return keys


class Keys:
    def __init__(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: hashlib.sha256(key.encode()).digest() for name, key in keys.items()}

    def owner(self, authorization: bytes) -> str | None:
        """The name of whose key this header holds."""
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for name, known in self._digests.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(digest, known):
                found = name
        return found if scheme.lower() == b"bearer" else None


class Gate:
    """Around the app: refuses, or lets in with the body read."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys | None) -> None:
        self.app, self.keys = app, keys
        self.max_body_bytes, self.body_s = config.max_body_bytes, config.body_s
        hosts = config.allowed_hosts or (_LOOPBACK if config.is_local and keys is None else ())
        self.hosts = frozenset(host.lower().encode() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            assert scope["type"] == "lifespan", "no other protocol is served"
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            replay = await self._with_body(scope, receive)
        except Refusal as refusal:
            headers = {**refusal.headers, "connection": "close"}  # what else is on its way isn't read
            await send_json(send, refusal.status, refusal.body, headers)
        else:
            if replay is not None:
                await self.app(scope, replay, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").lower()
        name = host.rpartition(b":")[0] if not host.endswith(b"]") and b":" in host else host
        if self.hosts and name not in self.hosts:
            # else a web page whose name was made to point here could read the answers
            message = "this server isn't known by that name; see allowed_hosts"
            raise Refusal(403, message, code="unknown_host")
        if self.keys is not None and scope["path"] not in OPEN:
            owner = self.keys.owner(headers.get(b"authorization", b""))
            if owner is None:
                message = "a valid API key is needed: Authorization: Bearer KEY"
                raise Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            note(scope, key=owner)

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive | None:
        """A `receive` that gives the whole body first, and then what the client does; None: it has left."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.body_s):
                body = await self._read(receive)
        except TimeoutError:
            raise Refusal(408, f"the request didn't arrive within {self.body_s:g} s") from None
        if body is None:
            return None
        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _read(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self.max_body_bytes} bytes", code="too_large")
