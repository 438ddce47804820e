"""The HTTP application: routes, and the layers around them.

Observed (log, metrics, 500) → CORS where asked for → Gate (keys, hosts, sizes) → FastAPI → Answer → Worker
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import eellm
from eellm.config.infer import Method
from eellm.config.serve import ServeConfig
from eellm.errors import EellmError, did_you_mean
from eellm.serve.access import Gate, Keys, read_keys
from eellm.serve.answer import Answer
from eellm.serve.ask import make_ask
from eellm.serve.metrics import Meters
from eellm.serve.models import Served, serve_models
from eellm.serve.observe import Observed, note, noted
from eellm.serve.page import FILES, add_playground
from eellm.serve.refusals import Refusal, dump, refusal_of
from eellm.serve.responses import REFUSALS, CardExits, ChatCompletion, Completion, ModelCard, ModelList, Status
from eellm.serve.schema import ChatRequest, CompletionRequest, refusal_of_errors

SCHEMAS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}


class Server:
    """What the handlers share."""

    def __init__(self, config: ServeConfig, served: Mapping[str, Served]) -> None:
        self.config, self.served = config, served
        self.meters = Meters()
        self.is_draining = False
        self.num_open = 0
        """Requests for answers that aren't answered yet."""

    @property
    def failure(self) -> Refusal | None:
        """Of the first model that is lost."""
        return next((s.worker.failure for s in self.served.values() if s.worker.failure is not None), None)

    def model(self, name: str) -> Served:
        if name not in self.served:
            known = ", ".join(self.served)
            asked = name[:100]
            message = f"model {asked!r} is not served here{did_you_mean(asked, self.served)}; there is {known}"
            raise Refusal(404, message, param="model", code="model_not_found")
        return self.served[name]

    async def answer(self, request: Request, body: CompletionRequest | ChatRequest) -> Response:
        """Checks all that can be checked before the engine hears of it."""
        if self.is_draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})
        served = self.model(body.model)
        if self.config.log_prompts:
            note(request.scope, prompt=body.prompt if isinstance(body, CompletionRequest) else _dumped(body))
        served.worker.check_room()  # before anything is spent on it
        limits = (served.engine.max_tokens, served.worker.capacity)
        ask = await asyncio.to_thread(make_ask, served.model, body, self.config, *limits)
        return Answer(
            served, ask, self.meters, key=noted(request.scope, "key") or "", deadline_s=self.config.deadline_s
        )

    async def ready(self) -> Status:
        if self.is_draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down")
        if self.failure is not None:
            raise self.failure.again()
        return Status(status="ready")

    async def health(self) -> Status:
        """Whether it is worth to go on: a lost worker takes a new process."""
        if self.failure is not None and not self.is_draining:
            raise self.failure.again()
        return Status(status="ok")

    def card(self, served: Served) -> ModelCard:
        config, tokenizer = served.model.config, served.model.tokenizer
        gated = bool(config.exit_layers) and all(served.model.exit(n).gate is not None for n in config.exit_layers)
        return ModelCard(
            id=served.name,
            object="model",
            created=served.created,
            owned_by="eellm",
            max_tokens=served.engine.max_tokens,
            num_layers=config.num_layers,
            exit_layers=list(config.exit_layers),
            policies=["max_prob", "margin", "entropy", *(["gate"] if gated else [])],
            early_exit=CardExits(
                methods=[name for name in get_args(Method) if name != "pipelined" or self.config.workers > 1],
                default_method=self.config.method,
                has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
            ),
        )


def load_app(config: ServeConfig, *, cache_dir: Path | None) -> tuple[Server, ASGIApp]:
    """Models, engines and application of a configuration, for an ASGI server of any kind that runs its lifespan.

    What `eellm.serve.run` does besides is the ASGI server's own: sockets, bounds on heads, signals. Raises ConfigError,
    CheckpointError.
    """
    config.served()
    config.check_open()
    keys = None if config.api_keys is None else Keys(read_keys(config.api_keys))
    server = Server(config, serve_models(config, cache_dir=cache_dir))
    return server, make_app(server, keys)


def make_app(server: Server, keys: Keys | None) -> ASGIApp:
    """The whole; its lifespan starts and ends the workers' threads."""
    app = FastAPI(
        title="eellm",
        version=eellm.__version__,
        lifespan=_lifespan(server),
        docs_url=None,
        redoc_url=None,
        responses=REFUSALS,
    )
    _add_routes(app, server)
    add_playground(app)
    _add_refusals(app)
    paths = [path for path in app.openapi()["paths"] if "{" not in path]
    gate: ASGIApp = Gate(_Headed(_Counted(app, server)), server.config, keys)
    if server.config.cors_origins:
        gate = CORSMiddleware(
            gate,
            allow_origins=server.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's clients send a dozen of their own; what may be asked doesn't hang on them
            expose_headers=["x-request-id", "retry-after"],
        )
    return Observed(gate, server.meters, [*paths, "/openapi.json", *FILES])


def _add_routes(app: FastAPI, server: Server) -> None:
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    stream: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": event}}}}

    @app.post("/v1/completions", response_model=Completion, responses=stream)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continues prompts."""
        return await server.answer(request, body)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=stream)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answers the last message of a chat."""
        return await server.answer(request, body)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """What is served, and where its exits are."""
        return ModelList(object="list", data=[server.card(served) for served in server.served.values()])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """One of the models."""
        return server.card(server.model(name))

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        text = server.meters.text((name, served.worker) for name, served in server.served.items())
        return Response(text, media_type="text/plain; version=0.0.4")

    app.get("/ready")(server.ready)
    app.get("/health")(server.health)


def _add_refusals(app: FastAPI) -> None:
    """Every refusal gets OpenAI's body."""

    async def known(_: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        return Response(dump(refusal.body), refusal.status, refusal.headers, "application/json")

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), "registered for these"
        return await known(request, refusal_of_errors(list(error.errors()), SCHEMAS.get(request.url.path)))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for these"
        return await known(request, Refusal(error.status_code, str(error.detail), headers=error.headers))

    app.add_exception_handler(Refusal, known)
    app.add_exception_handler(EellmError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, known)


class _Counted:
    """Counts the requests for answers that are open, for the drain."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        counts = scope["type"] == "http" and scope["path"] in SCHEMAS
        self.server.num_open += counts
        try:
            await self.app(scope, receive, send)
        finally:
            self.server.num_open -= counts


class _Headed:
    """HEAD is answered wherever GET is: as GET, and the ASGI server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app(scope | {"method": "GET"} if is_head else scope, receive, send)


def _lifespan(server: Server) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for served in server.served.values():
            served.worker.start()
        try:
            yield
        finally:
            for served in server.served.values():
                served.worker.stop()
            for served in server.served.values():
                await asyncio.to_thread(served.worker.join, 60.0)

    return lifespan


def _dumped(body: ChatRequest) -> list[dict[str, str]]:
    return [message.plain() for message in body.messages]
