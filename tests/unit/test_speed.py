"""Methods are compared on what they do themselves: no side finds what the other has left."""

import eellm
from eellm.evaluate import speed
from tests.models import tiny_model


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
