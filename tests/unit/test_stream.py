import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from eellm.text.stream import StopStrings, StreamDecoder, token_bytes
from tests.worlds import sentencepiece_tokenizer, tiny_tokenizer, tokenizer_of


def odd_tokenizer(decoder: decoders.Decoder | None):
    """A few words and bytes, with added tokens that no byte-level alphabet spells."""
    pieces = ["▁a", "a", "▁", "b</w>", "##c", "Ġd", "Ã", "©", "<0x41>", "<0xC3>", ""]
    backend = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="a"))
    backend.decoder = decoder
    backend.add_tokens(["é à", "東", "é", "<tool>"])
    backend.add_special_tokens(["<s>"])
    return tokenizer_of(backend)


TOKENIZERS = {
    "byte-level": tiny_tokenizer(),
    "byte fallback": sentencepiece_tokenizer(),
    "odd byte-level": odd_tokenizer(decoders.ByteLevel()),
    "odd metaspace": odd_tokenizer(decoders.Metaspace()),
    "odd byte fallback": odd_tokenizer(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "odd word pieces": odd_tokenizer(decoders.WordPiece()),
    "no decoder": odd_tokenizer(None),
}


def stream(tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_the_stream_of_any_ids_is_their_text(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size)))  # one of them is unknown
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte-level", "byte fallback"])
@given(text=st.text(st.sampled_from("ab é東🙂\n\ufffd")))
def test_the_stream_of_a_text_never_shows_half_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_text_is_given_as_soon_as_it_is_certain():
    tokenizer = tiny_tokenizer()
    assert stream(tokenizer, tokenizer.encode("é!a")) == ["", "é", "!", "a", ""]
    llama = sentencepiece_tokenizer()
    assert stream(llama, llama.encode("ab ab")) == ["", "ab", " ab", ""]
    assert stream(llama, llama.encode("abé.")) == ["", "ab", "", "", "é.", ""]


@pytest.mark.parametrize("piece", ["ÿ", "<0xFF>"])
def test_a_flood_of_bad_bytes_takes_time_in_proportion(piece):
    tokenizer = TOKENIZERS["byte-level" if piece == "ÿ" else "byte fallback"]
    token = next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == piece)
    start = time.perf_counter()
    assert "".join(stream(tokenizer, [token] * 100_000)) == "\ufffd" * 100_000
    assert time.perf_counter() - start < 20  # minutes, were every push to decode what came before


TEXTS = st.text(st.sampled_from("abc"), max_size=12)
STOPS = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=3).map(tuple)


@given(pieces=st.lists(TEXTS), stops=STOPS)
def test_a_text_is_cut_before_the_first_stop_string_however_it_arrives(pieces, stops):
    text = "".join(pieces)
    first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    cutter = StopStrings(stops)
    assert "".join([cutter.push(piece) for piece in pieces] + [cutter.finish()]) == text[:first]
    assert cutter.stopped == any(stop in text for stop in stops)


@given(text=TEXTS, stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    cutter, sent = StopStrings(stops), ""
    for end, char in enumerate(text, start=1):
        sent += cutter.push(char)
        held = text[len(sent) : end]
        assert cutter.stopped or not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_what_may_become_a_stop_string_is_held_back_and_nothing_more():
    cutter = StopStrings(("\nUser:", "###"))
    assert [cutter.push(text) for text in ["Hi.\n", "Us", "ual #", "#", "! \nUser", ": x"]] == [
        "Hi.",
        "",
        "\nUsual ",
        "",
        "##! ",
        "",
    ]
    assert cutter.stopped
    assert cutter.push("more") == cutter.finish() == ""


def test_without_stop_strings_nothing_is_held_back():
    cutter = StopStrings(())
    assert cutter.push("abc") == "abc"
    assert cutter.finish() == ""
    assert not cutter.stopped


@pytest.mark.parametrize("name", ["byte-level", "byte fallback"])
@pytest.mark.parametrize("text", ["for x in y", "é 日本 😀", "ab.ab  a", "\x00\x7f"])
def test_the_bytes_of_tokens_are_those_of_their_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, i) for i in ids).decode().removeprefix(" ") == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_has_bytes(name):
    tokenizer = TOKENIZERS[name]
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.piece(i)
        spelt = token_bytes(tokenizer, i)
        assert isinstance(spelt, bytes)
        if piece is None:  # a special token is what it is called
            assert spelt.decode() == tokenizer.decode([i], skip_special_tokens=False)
