"""What OpenAPI says of the answers. Handlers write them as plain dicts (`eellm.serve.forms`); tests compare."""

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Status(BaseModel):
    status: str


class CardExits(BaseModel):
    """What the playground needs besides."""

    methods: list[str]
    """Those that can be asked for here."""
    default_method: str
    """What who names none gets."""
    has_chat_template: bool
    """Whether chats are answered."""


class ModelCard(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str
    max_tokens: int
    """Of prompt and answer together."""
    num_layers: int
    exit_layers: list[int]
    """Where tokens can leave, but for the last layer."""
    policies: list[str]
    early_exit: CardExits


class ModelList(BaseModel):
    object: str
    data: list[ModelCard]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    early_exit: dict[str, float | None] | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, list[Any] | None] | None
    finish_reason: str | None


class Completion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    role: str
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: dict[str, list[Any] | None] | None
    finish_reason: str | None


class ChatCompletion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "Something in the request can't be served.",
        401: "No valid API key.",
        403: "The server isn't known by this name.",
        404: "No such model.",
        408: "The request came too slowly.",
        413: "The body is too large.",
        429: "Too many requests wait.",
        500: "The server failed.",
        503: "The server is shutting down, or a worker is lost.",
        504: "It took longer than it may.",
    }.items()
}
