"""What a client may ask: OpenAI's fields, and a few of ours. Strict: unknown fields are refused by name, true is no
number, "1" is none either, a whole number is one. null is the default, as OpenAI has it.

What a request means to the engine is said in `eellm.serve.ask`; the bounds here are those that need no model.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator

from eellm.config.infer import Method, Metric, PolicyName
from eellm.errors import did_you_mean
from eellm.serve.refusals import Refusal

Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenId = Annotated[int, Field(ge=0)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_OTHERS = """
    annotations audio best_of function_call functions include_obfuscation logit_bias metadata modalities moderation
    parallel_tool_calls prediction prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort refusal
    response_format safety_identifier service_tier store suffix tool_call_id tool_calls tool_choice tools verbosity
    web_search_options
"""
UNSERVED = frozenset(_OTHERS.split())
"""What OpenAI's clients may send besides, of requests and of messages."""


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair; send well-formed Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_well_formed)]


class Strict(BaseModel):
    """A table whose keys are all known and whose values are what they are."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """OpenAI's own fields among them that aren't served: null asks for nothing."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        unset = UNSERVED | {name for name, field in fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name not in unset}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Says so."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, about in schema["properties"].items():
            if name not in schema.get("required", ()) and {"type": "null"} not in about.get("anyOf", ()):
                kept = {key: about.pop(key) for key in ("title", "default") if key in about}
                kinds = about.pop("anyOf", None) or [about.copy()]
                about.clear()
                about |= {"anyOf": [*kinds, {"type": "null"}], **kept}
        return schema


class EarlyExit(Strict):
    """Where tokens may leave the model, and whether the answer says where they did."""

    method: Method | None = None
    """Unset: `early` where any of the next five is given, else what the server is set to."""
    policy: PolicyName | None = None
    threshold: Annotated[float, Field(ge=0)] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    """One, or one per exit layer: {"10": 0.9, "20": 0.7}."""
    exits: list[int] | None = None
    risk: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of policy, threshold and exits: those of the model's certificate with the largest risk up to this one."""
    max_deferred: Annotated[int, Field(ge=1)] | None = None
    risk_metric: Metric | None = None
    """What the risk is measured in; unset, disagreement."""
    report: bool = False
    """Every token's log-probability entry tells its exit, and how sure each exit asked was."""

    @property
    def is_lossy(self) -> bool:
        """Whether it asks for exits to answer."""
        rule = (self.policy, self.threshold, self.exits, self.risk, self.max_deferred)
        return any(value is not None for value in rule)


class StreamOptions(Strict):
    include_usage: bool = False
    """Before the end, one more chunk with what was used."""


class Asked(Strict):
    """What completions and chats have in common."""

    model: Text
    """One of /v1/models."""
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Text | list[Text] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    """Taken and not used."""
    early_exit: EarlyExit = EarlyExit()

    @model_validator(mode="after")
    def _check_stream_options(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream = true")
        return self


class CompletionRequest(Asked):
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    """0 with `echo`: only the prompt is scored."""
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 makes nothing; it is for echo = true")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates know it; they know no developers."""
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Unset: as much as there is room for."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_names(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are for logprobs = true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one number; give one")
        return self


def refusal_of_errors(errors: list[Any], schema: type[Strict] | None) -> Refusal:
    """What pydantic found wrong with a body, as one sentence about the first field."""
    error = min(errors, key=lambda error: (error["type"] != "extra_forbidden", -len(error["loc"])))
    is_unknown = error["type"] == "extra_forbidden"
    place = [
        str(part)[:100] for part in error["loc"][1:]
    ]  # behind "body"; a name that we don't know can be of any size
    place = [
        part
        for i, part in enumerate(place)
        if i == 0 or (is_unknown and i == len(place) - 1) or not _ALTERNATIVE.match(part)
    ]
    param = ".".join(place) or None
    if error["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}")
    if is_unknown:
        nearest = schema if len(place) == 1 else _TABLES.get(place[0])
        hint = did_you_mean(place[-1], () if nearest is None else nearest.model_fields)
        if place[-1] in UNSERVED:
            hint = ": OpenAI has it, this server doesn't; leave it out"
        return Refusal(400, f"unknown field '{param}'{hint}", param=param, code="unknown_field")
    if error["type"] == "missing":
        return Refusal(400, "the body is empty" if param is None else f"'{param}' is missing", param=param)
    if param is None and error["type"] in ("model_type", "model_attributes_type"):
        is_text = isinstance(error["input"], bytes)  # what isn't sent as JSON isn't read as such
        header = ", sent with the header Content-Type: application/json" if is_text else ""
        return Refusal(400, f"the body must be a JSON object{header}")
    message = error["msg"].removeprefix("Value error, ")
    if place and place[0] in _SEVERAL and error["type"] != "value_error":
        param, message = place[0], _SEVERAL[place[0]]
    return Refusal(400, message if param is None else f"{param}: {message}", param=param)


_TABLES: dict[str, type[Strict]] = {"early_exit": EarlyExit, "stream_options": StreamOptions, "messages": Message}
_SEVERAL = {
    "prompt": "must be a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "must be a string or a list of strings",
}
"""Fields of several types, where an error about one of them would mislead."""
_ALTERNATIVE = re.compile(r"(str|int|float|bool|constrained-\w+|(list|dict|function-after)\[.*)$")
"""How pydantic names the types that a field may have, in the place of an error."""
