"""A model's chat template: messages → the text that the model was tuned on.

Templates are Jinja programs that come with a model, so they run in a sandbox that can change nothing. What they find
there is what Hugging Face gives them: `messages`, `add_generation_prompt`, the named special tokens (`bos_token`),
`raise_exception`, `strftime_now`, a `tojson` that escapes no HTML, `break` and `continue`, and the `generation` tag.
Whatever a template raises becomes a RequestError: it is the model's code, run on the user's messages.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eellm.errors import DataError, RequestError

Messages = Sequence[Mapping[str, Any]]


class Answer(NamedTuple):
    """Where an assistant's answer stands in a rendered conversation, in characters."""

    start: int
    """Its first character: where the model would begin to generate."""
    content_end: int
    """Behind the last character of its content. The token that ends the turn comes here or later."""
    limit: int
    """No token of this turn begins here or later."""


class ChatTemplate:
    """A compiled template. `special_tokens` maps names (`eos_token`) to texts; `now` is the clock it may ask."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._now = now

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The conversation as text. Raises RequestError where the template is broken or refuses the messages."""
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {**self._special_tokens, "messages": present, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(tools=None, documents=None, **variables)
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"the model's chat template is not valid Jinja: line {error.lineno}: {error}; mend it in the model's "
                "directory (chat_template.jinja or tokenizer_config.json)"
            ) from None
        except Exception as error:  # foreign code: it can raise anything
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error

    def answers(self, messages: Messages) -> tuple[str, list[Answer]]:
        """The whole conversation as text, and where each assistant's answer stands in it.

        An answer starts where the prompt for it ends, so the text up to there must be the same before and after the
        answer is known. Raises DataError where it isn't, RequestError as `render`.
        """
        text = self.render(messages, add_generation_prompt=False)
        turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        starts = []
        for turn in turns:
            prompt = self.render(messages[:turn], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise DataError(
                    f"message {turn + 1}: the model's chat template writes the prompt for this answer differently once "
                    "the answer is known, so it can't be told which tokens are the answer; tune on "
                    '{"text": ...} lines or give the model another template'
                )
            starts.append(len(prompt))
        limits = [*starts, len(text)][1:]
        ends = [
            _content_end(text, messages[turn].get("content"), start, limit)
            for turn, start, limit in zip(turns, starts, limits, strict=True)
        ]
        return text, [Answer(*places) for places in zip(starts, ends, limits, strict=True)]

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        return environment.from_string(
            self._source,
            globals={"raise_exception": _raise_exception, "strftime_now": lambda form: self._now().strftime(form)},
        )


def _content_end(text: str, content: object, start: int, limit: int) -> int:
    """Behind `content` in text[start:limit], or `start` where the template altered it (dropped its thoughts, say)."""
    words = content.strip() if isinstance(content, str) else ""
    place = text.find(words, start, limit)
    return start if place < 0 else place + len(words)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, with which newer templates mark answers. We find these ourselves."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
