"""Text ↔ token ids, from the files that Hugging Face tools keep beside a model.

In: `tokenizer.json`, which holds the whole pipeline, and where present `tokenizer_config.json` (named special tokens,
chat template), `special_tokens_map.json` and `chat_template.jinja`. Out: the ids that transformers gives for the same
directory. The files' bytes are kept and handed on unchanged, so a model that we write has the tokenizer that we read.
"""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from eellm.errors import CheckpointError, RequestError
from eellm.text.chat import ChatTemplate, Messages

PIPELINE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
FILES = (PIPELINE, CONFIG, SPECIAL_TOKENS, TEMPLATE)

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes, decodes and renders chats. Made by `from_dir` or `from_files`; never changes afterwards."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named_tokens: Mapping[str, str],
        chat_template: str | None,
        files: Mapping[str, bytes],
    ) -> None:
        self._backend = backend
        self._files = dict(files)
        self._special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._chat = None if chat_template is None else ChatTemplate(chat_template, named_tokens)
        self.chat_template = chat_template
        """Jinja source of the model's chat template, if it has one."""
        self.bos_id = self._id_of(named_tokens.get("bos_token"))
        """Beginning of text, if named. Whether `encode` adds it is for the pipeline to say."""
        self.eos_id = self._id_of(named_tokens.get("eos_token"))
        """End of text, if named."""

    @classmethod
    def from_dir(cls, path: Path) -> Self | None:
        """Reads a model's directory. None where it has no `tokenizer.json`; CheckpointError for a corrupt file."""
        if not (path / PIPELINE).is_file():
            return None
        try:
            return cls.from_files({name: (path / name).read_bytes() for name in FILES if (path / name).is_file()})
        except CheckpointError as error:
            raise CheckpointError(f"{path}/{error}") from None

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """Reads files given as name → content; the names are those of `FILES`. CheckpointError for a corrupt one."""
        try:
            backend = tokenizers.Tokenizer.from_buffer(files[PIPELINE])
        except ValueError as error:
            raise CheckpointError(f"{PIPELINE}: not a tokenizer: {error}; fetch the file again") from None
        backend.no_truncation()  # lengths are for the caller to judge
        backend.no_padding()
        config = _config(files)
        try:
            named = {name: _content(config[name]) for name in NAMED_TOKENS if config.get(name) is not None}
            _add_missing_tokens(backend, config, named)
            template = _template_source(files, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{CONFIG}: not as transformers writes it: {error!r}; fetch the file again") from None
        return cls(backend, named, template, files)

    def files(self) -> dict[str, bytes]:
        """What to write beside a model, name → content: the bytes that were read."""
        return dict(self._files)

    @cached_property
    def vocab_size(self) -> int:
        """The least number of embedding rows that has one for every id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what makes ids of text, however the files spell it: equal ones give equal ids."""
        return hashlib.sha256(f"{self.eos_id} {self._backend.to_str()}".encode()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. `add_special_tokens` lets the pipeline add what it adds around a text (often bos).

        Raises RequestError for text that no UTF-8 can hold.
        """
        return self._encode(text, add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, without any clean-up. Bytes that are no UTF-8 become U+FFFD; unknown ids, nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token; None for those that `decode` skips: special and unknown ones."""
        return None if token_id in self._special_ids else self._backend.id_to_token(token_id)

    def join(self, pieces: Sequence[str]) -> str:
        """The text of pieces, which is `decode` of their ids."""
        decoder = self._backend.decoder
        return " ".join(pieces) if decoder is None else decoder.decode(list(pieces))

    def token_text(self, token_id: int) -> str:
        """One token for the eye: its text with control characters escaped, its leading space kept."""
        if self._backend.id_to_token(token_id) is None:
            return f"<{token_id}>"
        once = self.decode([token_id], skip_special_tokens=False)
        twice = self.decode([token_id, token_id], skip_special_tokens=False)  # the first one may lose its space
        text = twice.removeprefix(once) or once
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def apply_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, by default up to where the assistant's next answer begins.

        Encode it with `add_special_tokens=False`: the template has written them. Raises RequestError.
        """
        if not messages:
            raise RequestError("messages = []: a conversation needs at least one message")
        return self._chat_or_refuse().render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation and, for each, whether it is of an assistant's answer.

        The token that ends an answer's turn is part of it; what the template writes behind that token is not. Raises
        DataError where the template doesn't let answers be told from the rest, RequestError where it refuses.
        """
        text, answers = self._chat_or_refuse().answers(messages)
        encoding = self._encode(text, add_special_tokens=False, offsets=True)
        ids, starts, ends = encoding.ids, *([place[side] for place in encoding.offsets] for side in (0, 1))
        is_answer = [False] * len(ids)
        for answer in answers:
            first, behind = bisect_right(ends, answer.start), bisect_left(starts, answer.content_end)
            template_s = range(behind, bisect_left(starts, answer.limit))
            last = next((i + 1 for i in template_s if ids[i] in self._special_ids), behind)
            is_answer[first:last] = [True] * (last - first)
        return ids, is_answer

    def _encode(self, text: str, add_special_tokens: bool, offsets: bool = False) -> tokenizers.Encoding:
        encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        try:
            return encode([text], add_special_tokens=add_special_tokens)[0]
        except TypeError:
            check_well_formed(text)
            raise

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _chat_or_refuse(self) -> ChatTemplate:
        if self._chat is None:
            raise RequestError(
                f"the model has no chat template; send a plain prompt, or put a {TEMPLATE} into the model's directory"
            )
        return self._chat


def _config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """`tokenizer_config.json`, under what an older `special_tokens_map.json` says where the former lists no tokens."""
    config = _json(files, CONFIG)
    return config if "added_tokens_decoder" in config else config | _json(files, SPECIAL_TOKENS)


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        data = json.loads(_text(files, name)) if name in files else {}
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{name}: not JSON: {error}; fetch the file again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{name}: must hold a JSON object, not {type(data).__name__}")
    return data


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name}: not UTF-8: {error}; fetch the file again") from None


def _content(token: Any) -> str:
    """A special token is written as its text, or as an object with it."""
    return token if isinstance(token, str) else token["content"]


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> None:
    """Special tokens that only the config knows get the next free ids, in the order in which transformers adds them."""
    listed = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokens = [tokenizers.AddedToken(**{k: v for k, v in token.items() if k != "__type"}) for _, token in listed]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    texts = [*named.values(), *map(_content, extra.values() if isinstance(extra, dict) else extra)]
    tokens += [tokenizers.AddedToken(text, special=True) for text in texts]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in tokens if token.content not in known])


def _template_source(files: Mapping[str, bytes], config: dict[str, Any]) -> str | None:
    """A template in its own file goes before one in the config, which may hold several by name."""
    if TEMPLATE in files:
        return _text(files, TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise TypeError(f"chat_template = {template!r}")
    return template


def check_well_formed(text: str) -> None:
    """Raises RequestError for a text that is no Unicode: JSON can hold one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the text holds half of a surrogate pair; send well-formed Unicode") from None
