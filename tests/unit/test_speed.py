"""What is compared in `eellm bench` and in curves starts equal: counted in rows, never in time."""

import pytest

import eellm
from eellm.evaluate import curve, speed
from eellm.evaluate.curve import CurveConfig
from tests.models import tiny_model


def entered(monkeypatch):
    """Of every request with 20 or 32 tokens (others measure costs), the rows that aren't there yet, in order."""
    counts = []
    place = eellm.infer.sequence.Sequence.place

    def placed(seq, slot, num_reused):
        if len(seq.request.tokens) in (20, 32):
            counts.append(len(seq.request.tokens) - num_reused)
        place(seq, slot, num_reused)

    monkeypatch.setattr("eellm.infer.sequence.Sequence.place", placed)
    return counts


def test_no_setting_of_a_benchmark_finds_rows_of_another_in_its_engine(monkeypatch):
    model = tiny_model(dtype="float32")
    rows = speed.settings(model, (1, 2), 0.5, quantized=True)
    counts = entered(monkeypatch)
    found = speed.measure_speed(model, rows, num_tokens=2, rounds=2)
    assert [row.name for row in found] == [row.name for row in rows]
    assert len(counts) == sum(2 * 3 * row.batch_size for row in rows)
    assert all(one.same_tokens == 1 for one in found if one.name == "full")
    assert set(counts) == {32}, "every prompt goes through the model whole"


def test_no_setting_finds_rows_or_drafts_that_another_has_left(monkeypatch):
    made = []

    class Watched(eellm.Engine):
        def close(self):
            made.append((self.stats().reused_tokens, self.recall.num_tokens, self.stats().num_finished))
            super().close()

    monkeypatch.setattr(speed, "Engine", Watched)
    model = tiny_model(seed=4, dtype="float32")
    rows = speed.settings(model, (1, 2), 0.5, quantized=False)
    speeds = speed.measure_speed(model, rows, num_tokens=6, rounds=1)
    assert [row.name for row in speeds] == [row.name for row in rows]
    assert all(reused == recalled == 0 for reused, recalled, _ in made)
    assert sum(finished for *_, finished in made) == 2 * 2 * sum(row.batch_size for row in rows)


def test_no_run_of_a_curve_finds_rows_of_the_run_before(monkeypatch):
    model, config = tiny_model(), CurveConfig(num_prompts=1, new_tokens=4)
    counts = entered(monkeypatch)
    with eellm.Engine(model, max_batch=1) as engine:
        for threshold in (0.5, 0.3, 0.5):
            curve._run(model, list(range(20)), config.options(threshold), engine)
        assert counts == [20, 20, 20]
        handle = engine.submit([1, 2, 3], max_new_tokens=9)
        engine.step()
        with pytest.raises(AssertionError, match="nobody has a slot"):
            engine.places.forget()
        handle.cancel()
