"""Ctrl-C at any moment of a tick: what ran ends with the tokens it has, and the engine serves on."""

import sys
from pathlib import Path

import pytest

import eellm
from tests.models import tiny_model

MODEL = tiny_model(seed=0)
PROMPTS = [[*range(1, 21), last] for last in (3, 5, 7)]
"""They begin with the same block, which a slot keeps."""
OPTIONS = ({"method": "early", "threshold": 0.3}, {"method": "speculative", "always_draft": True}, {"method": "full"})
INFER = str(Path(eellm.__file__).parent / "infer")


def start(engine):
    return [engine.submit(prompt, max_new_tokens=6, **fields) for prompt, fields in zip(PROMPTS, OPTIONS, strict=True)]


@pytest.fixture(scope="module")
def expected():
    with eellm.Engine(MODEL) as engine:
        return [handle.result().tokens for handle in start(engine)]


def assert_goes_on(engine, handles, expected):
    """Every request ends, and the same ones again get what they should."""
    for handle, tokens in zip(handles, expected, strict=True):
        out = handle.result()
        if out.finish_reason == "interrupted":
            assert len(out.tokens) < len(tokens), "an answer that was whole is not called broken off"
            assert out.tokens == tokens[: len(out.tokens)]
        else:
            assert out.tokens == tokens
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_slots) == (0, 0, len(engine.places.slots))
    assert [handle.result().tokens for handle in start(engine)] == expected


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_an_interrupted_pass_ends_those_in_it_and_the_others_go_on(expected, nth, monkeypatch):
    engine = eellm.Engine(MODEL, max_batch=2)
    handles, run, calls = start(engine), engine.network.run, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(engine.network, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handles[0].result()
    assert [handle.finish_reason for handle in handles] == ["interrupted", "interrupted", None]
    assert engine.stats().memory_bytes == 0
    assert_goes_on(engine, handles, expected)
    assert handles[2].finish_reason == "length"


def test_a_request_whose_memory_can_t_be_had_ends_and_those_behind_it_are_served(expected, monkeypatch):
    engine = eellm.Engine(MODEL, max_batch=2)
    handles, reserve = start(engine), engine.backend.memory.reserve

    def full(num_slots, capacity):
        monkeypatch.setattr(engine.backend.memory, "reserve", reserve)
        raise RuntimeError("no memory left")

    monkeypatch.setattr(engine.backend.memory, "reserve", full)
    with pytest.raises(RuntimeError, match="no memory left"):
        engine.step()
    assert [handle.finish_reason for handle in handles] == ["interrupted", None, None]
    assert_goes_on(engine, handles, expected)


def interrupt(call, num_lines, *, counts=lambda frame: True):
    """KeyboardInterrupt before that many more lines of `eellm.infer` have run, of the frames that count; False: there
    weren't so many."""

    def trace(frame, event, _):
        nonlocal num_lines
        if not frame.f_code.co_filename.startswith(INFER) or not counts(frame):
            return None
        num_lines -= event == "line"
        if num_lines == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("start_line", range(1, 12, 2))
def test_whatever_line_is_interrupted_the_engine_goes_on(expected, start_line):
    num_lines, num_interrupted = start_line, 0
    while True:
        engine = eellm.Engine(MODEL, max_batch=2)
        handles = start(engine)
        was_interrupted = interrupt(handles[0].result, num_lines)
        num_interrupted += was_interrupted
        assert_goes_on(engine, handles, expected)
        if not was_interrupted:
            break
        num_lines += 97
    assert num_interrupted > 10


def test_whatever_line_of_the_last_token_s_way_out_is_interrupted_the_answer_is_whole_or_called_broken_off(expected):
    num_lines = 1
    reasons = []

    def is_last(frame):
        return frame.f_code.co_name == "emit" and frame.f_locals["self"].room <= 1

    while True:
        engine = eellm.Engine(MODEL, max_batch=2)
        handles = start(engine)
        was_interrupted = interrupt(handles[0].result, num_lines, counts=is_last)
        assert_goes_on(engine, handles, expected)
        if not was_interrupted:
            break
        reasons.append(handles[0].finish_reason)
        num_lines += 1
    assert {"interrupted", "length"} <= set(reasons)
    assert len(reasons) > 15
