"""Many requests at once: whatever mix, each gets what a decoder without any cache gives it alone."""

import gc
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eellm
from eellm.errors import ConfigError, RequestError
from tests.models import oracle, tiny_model
from tests.traffic import LOCAL_REQUESTS, LONG, events, play

MODEL = tiny_model(seed=0)
WINDOWED = tiny_model(seed=3, sliding_window=5, sliding_layers=(2, 5, 6), qk_norm=True)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def expected(model, prompt, options):
    """The oracle's tokens, exits and log-probabilities."""
    thresholds = {}
    if options["method"] == "early":
        thresholds = dict.fromkeys(options.get("exits") or model.config.exit_layers, options["threshold"])
    rows = oracle(
        model,
        prompt,
        num_tokens=options["max_new_tokens"],
        thresholds=thresholds,
        policy=options.get("policy", "max_prob"),
    )
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def assert_is(out, model, prompt, options):
    tokens, exits, logprobs = expected(model, prompt, options)
    num = len(out.tokens)
    assert out.tokens == tokens[:num]
    if options["method"] != "speculative":
        assert out.exits == exits[:num]
    assert out.logprobs == pytest.approx(logprobs[:num], abs=1e-5)
    if out.finish_reason == "length":
        assert num == options["max_new_tokens"]


@settings(max_examples=60, deadline=None)
@given(
    events=events(LOCAL_REQUESTS),
    max_batch=st.integers(1, 5),
    chunk=st.sampled_from([3, 7, 256]),
    windowed=st.booleans(),
)
def test_requests_that_come_go_and_are_cancelled_at_random_get_the_oracle_s_tokens(events, max_batch, chunk, windowed):
    model = WINDOWED if windowed else MODEL
    engine = eellm.Engine(model, max_batch=max_batch)
    engine.scheduler.max_prompt_rows = chunk
    for handle, prompt, options in play(engine, events):
        assert_is(handle.result(), model, prompt, options)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_slots) == (0, 0, max_batch)


def test_a_batch_of_ragged_prompts_with_mixed_methods_equals_each_alone():
    options = [
        {"method": method, "threshold": threshold, "max_new_tokens": 20, "always_draft": True}
        for method in ("full", "early", "speculative")
        for threshold in (0.1, 0.3, 0.6)
    ]
    with eellm.Engine(MODEL, max_batch=16) as engine:
        handles = [engine.submit(LONG[: 3 + 6 * i], **chosen) for i, chosen in enumerate(options)]
        for i, (handle, chosen) in enumerate(zip(handles, options, strict=True)):
            assert_is(handle.result(), MODEL, LONG[: 3 + 6 * i], chosen)
    drafted = [handle.stats().drafted for handle in handles]
    assert all(drafted[-3:])
    assert not any(drafted[:-3])


def test_rows_of_a_prompt_that_another_request_has_had_are_not_computed_again():
    with eellm.Engine(MODEL, max_batch=3) as engine:
        first = engine.submit(LONG, max_new_tokens=4, method="full")
        first.result()
        assert engine.stats().reused_tokens == 0
        (again,) = engine.generate([[*LONG[:40], 1, 2]], max_new_tokens=6, method="full")
        assert engine.stats().reused_tokens == 32  # whole blocks of 16
        assert_is(again, MODEL, [*LONG[:40], 1, 2], {"method": "full", "max_new_tokens": 6})
        running = engine.submit(LONG, max_new_tokens=20, method="full")
        next(running)
        beside = engine.submit(LONG, max_new_tokens=20, method="full")  # copied from a slot that is in use
        next(beside)
        assert engine.stats().reused_tokens > 32 + 48
        assert beside.result().tokens == running.result().tokens


def test_rows_without_an_exit_s_own_keys_are_no_use_to_a_request_that_takes_that_exit():
    with eellm.Engine(MODEL, max_batch=2) as engine:
        engine.generate([LONG], max_new_tokens=2, method="full")
        options = {"method": "early", "threshold": 0.2, "max_new_tokens": 12}
        (out,) = engine.generate([LONG], **options)
        assert engine.stats().reused_tokens == 0
        assert_is(out, MODEL, LONG, options)


def test_a_request_longer_than_the_engine_s_memory_is_refused_and_the_others_go_on():
    with eellm.Engine(MODEL, max_batch=2, max_tokens=40) as engine:
        running = engine.submit(PROMPT, max_new_tokens=20, method="full")
        next(running)
        with pytest.raises(RequestError, match=r"needs room for 80 tokens .60 of the prompt., and the engine has 40"):
            engine.submit(LONG, max_new_tokens=20)
        with pytest.raises(ConfigError, match="no exit at layer 4"):
            engine.submit(PROMPT, exits=[4])
        assert running.result().tokens == expected(MODEL, PROMPT, {"method": "full", "max_new_tokens": 20})[0]


def test_pipelined_without_workers_says_what_it_needs():
    with eellm.Engine(MODEL) as engine, pytest.raises(RequestError, match="workers=2 or more"):
        engine.submit(PROMPT, method="pipelined")


def test_no_request_waits_for_ever_beside_others_that_leave_early():
    with eellm.Engine(MODEL, max_batch=6) as engine:
        quick = [engine.submit([i, 1], max_new_tokens=100, method="early", threshold=0.0) for i in range(5)]
        slow = engine.submit(PROMPT, max_new_tokens=3, method="full")
        slow.result()
        assert engine.stats().num_ticks < 5 * (engine.scheduler.max_wait + 2)
        assert all(handle.finish_reason is None for handle in quick)


def test_a_cancelled_request_ends_at_once_and_its_slot_serves_the_next():
    with eellm.Engine(MODEL, max_batch=1) as engine:
        first, second = (engine.submit(PROMPT, max_new_tokens=50, method="full") for _ in range(2))
        next(first)
        first.cancel()
        assert list(first) == []
        assert first.finish_reason == "cancelled"
        assert first.result().finish_reason == "cancelled"
        second.cancel()
        third = engine.submit(PROMPT, max_new_tokens=2, method="full")
        assert len(third.result().tokens) == 2
        assert second.result().tokens == []


def test_a_client_that_stops_reading_stops_nobody_and_finds_its_tokens_later():
    with eellm.Engine(MODEL, max_batch=2) as engine:
        idle = engine.submit(PROMPT, max_new_tokens=12, method="full")
        next(idle)
        (out,) = engine.generate([LONG[:9]], max_new_tokens=30, method="full")
        assert_is(out, MODEL, LONG[:9], {"method": "full", "max_new_tokens": 30})
        assert idle.finish_reason == "length"
        assert engine.stats().num_free_slots == 2
        assert len(list(idle)) == 11


def test_threads_that_iterate_at_the_same_time_share_the_engine():
    outs = {}
    with eellm.Engine(MODEL, max_batch=4) as engine:
        handles = [engine.submit(LONG[: 5 + i], max_new_tokens=20, method="early", threshold=0.3) for i in range(6)]

        def drain(i):
            outs[i] = [token.id for token in handles[i]]

        threads = [threading.Thread(target=drain, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for i in range(6):
        options = {"method": "early", "threshold": 0.3, "max_new_tokens": 20}
        assert outs[i] == expected(MODEL, LONG[: 5 + i], options)[0]


def test_a_closed_engine_cancels_what_runs_and_takes_nothing_more():
    with eellm.Engine(MODEL) as engine:
        running = engine.submit(PROMPT, max_new_tokens=50)
        next(running)
    assert running.finish_reason == "cancelled"
    with pytest.raises(RequestError, match="closed"):
        engine.submit(PROMPT)


def test_if_one_of_several_prompts_is_refused_none_stays_in_the_engine():
    with eellm.Engine(MODEL) as engine:
        with pytest.raises(RequestError, match="prompt token 99"):
            engine.generate([PROMPT, [99]])
        assert engine.stats().num_waiting == 0


def test_weights_that_change_are_seen():
    model = tiny_model(seed=8)
    options = {"method": "full", "max_new_tokens": 10}
    (before,) = eellm.generate(model, [PROMPT], **options)
    model.load_state_dict(tiny_model(seed=9).state_dict())
    (after,) = eellm.generate(model, [PROMPT], **options)
    assert before.tokens != after.tokens
    assert_is(after, model, PROMPT, options)


def test_ten_thousand_requests_leave_nothing_behind():
    model = tiny_model(
        seed=0, num_layers=2, exits=(eellm.ExitConfig(layer=1, kind="layer", head="own"),), dtype="float32"
    )
    with eellm.Engine(model, max_batch=16) as engine:

        def serve(numbers):
            options = (
                {"method": "early", "threshold": 0.1},
                {"method": "full"},
                {"method": "speculative", "always_draft": True},
            )
            prompts = [[n % 29, n // 29 % 29, n // 841 % 29, *([n % 7] * (n % 30))] for n in numbers]
            handles = [
                engine.submit(p, max_new_tokens=1 + n % 3, **options[n % 3])
                for n, p in zip(numbers, prompts, strict=True)
            ]
            for n, handle in zip(numbers, handles, strict=True):
                if n % 11 == 0:
                    handle.cancel()
                handle.result()

        for start in range(0, 2000, 50):
            serve(range(start, start + 50))
        gc.collect()
        before, held = len(gc.get_objects()), engine.stats().memory_bytes
        assert engine.recall.num_tokens > 30_000, "it is about full"
        for start in range(2000, 10000, 50):
            serve(range(start, start + 50))
        gc.collect()
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_slots) == (0, 0, 16)
        assert stats.memory_bytes == held
        assert len(gc.get_objects()) < before + 500
        assert engine.places.slots.num_known_rows <= 16 * 64
        assert engine.recall.num_tokens <= 32768
        assert engine.recall.num_ngrams <= 4 * 32768
