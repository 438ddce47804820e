"""Text that grows token by token: what can be shown already, and where it must end.

`StreamDecoder` turns ids into text as soon as no later token can change it; all that it gives is `decode` of all ids,
and each token is decoded a bounded number of times. `StopStrings` cuts a growing text before the first stop string and
holds back only what may yet become one. Both keep what they hold until `finish`.
"""

import codecs
import re
from functools import cache

from eellm.text.tokenizer import Tokenizer


class StreamDecoder:
    """The text of one growing list of ids, without its special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = _ByteLevel() if _is_byte_level(tokenizer) else _Window(tokenizer)

    def push(self, token_id: int) -> str:
        """The text that this token made certain; empty while a character or a run of bytes is unfinished."""
        piece = self._tokenizer.piece(token_id)
        return "" if piece is None else self._decoder.push(piece)

    def finish(self) -> str:
        """What was held back, as it decodes when nothing follows."""
        return self._decoder.finish()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What one token adds to a text, be it a part of a character; a special token is what it is called."""
    piece = tokenizer.piece(token_id)
    once = tokenizer.decode([token_id], skip_special_tokens=False)
    if piece is None:
        return once.encode()
    if _is_byte_level(tokenizer):
        return _spelt(piece)
    if _has_byte_fallback(tokenizer) and _BYTE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    twice = tokenizer.decode([token_id, token_id], skip_special_tokens=False)  # the first one may lose its space
    return (twice.removeprefix(once) or once).encode()


class _ByteLevel:
    """Each piece spells bytes; text is certain up to an unfinished UTF-8 character."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: str) -> str:
        return self._utf8.decode(_spelt(piece))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """Any other decoder: what a piece adds to the text of the pieces just before it, which it may lean on.

    With byte fallback a run of pieces such as `<0xE2>` is judged as a whole (one bad byte spoils it all), so it is
    held until it ends. A decoder that drops the first space sees at least one earlier piece, so it drops no other.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._has_byte_fallback = _has_byte_fallback(tokenizer)
        self._before: list[str] = []
        self._new: list[str] = []

    def push(self, piece: str) -> str:
        self._new.append(piece)
        is_byte = self._has_byte_fallback and _BYTE.fullmatch(piece)
        return "" if is_byte else self.finish()

    def finish(self) -> str:
        text = self._tokenizer.join(self._before + self._new)[len(self._tokenizer.join(self._before)) :]
        if text:
            self._before, self._new = self._new, []
        return text


class StopStrings:
    """Cuts a text before the stop string that begins first, however the text arrives in pieces."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False
        """A stop string was found: the text is complete."""

    def push(self, text: str) -> str:
        """The text that no stop string can begin in any more. Nothing once stopped."""
        return "" if self.stopped else self._cut(self._held + text, is_final=False)

    def finish(self) -> str:
        """What was held back, up to a stop string."""
        return "" if self.stopped else self._cut(self._held, is_final=True)

    def _cut(self, text: str, *, is_final: bool) -> str:
        found = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=len(text))
        safe = found if is_final else min(found, *(_first_hold(text, stop) for stop in self._stops), len(text))
        self.stopped = safe == found < len(text)
        self._held = "" if self.stopped else text[safe:]
        return text[:safe]


def _first_hold(text: str, stop: str) -> int:
    """Where the longest end of `text` begins that is a beginning of `stop`, but not all of it."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return len(text) - next((n for n in lengths if text.endswith(stop[:n])), 0)


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return tokenizer.join(["ĠĊ", "Ġ"]) == " \n "


def _has_byte_fallback(tokenizer: Tokenizer) -> bool:
    return tokenizer.join(["<0x41>"]) == "A"


def _spelt(piece: str) -> bytes:
    """The bytes that a byte-level piece spells."""
    table = _byte_of_char()
    spelt = all(char in table for char in piece)  # an added token may hold others, and then stands for itself
    return bytes(table[char] for char in piece) if spelt else piece.encode()


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling: printable Latin-1 characters stand for their bytes, those from U+0100 on for the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
