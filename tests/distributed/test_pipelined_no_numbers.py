"""A request that gets no numbers leaves nothing behind in any worker's memory."""

import pytest

import eellm
from eellm.errors import ModelError
from tests.models import afraid_of, tiny_model

PROMPTS = [[1, 2, 3, 4, 5, 6], [8, 9, 10], [5, 4, 3, 2, 1, 8, 9, 10, 11]]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("workers", "tp"), [(2, 1), (3, 1), (2, 2)])
def test_one_request_that_fails_leaves_nothing_behind_for_those_after_it(workers, tp):
    """The torch way, where rows beyond a sequence's own are read under a mask."""
    model = afraid_of(tiny_model(vocab_size=32), 7)
    options = {"threshold": 0.5, "max_new_tokens": 12}
    with eellm.Engine(model, max_batch=3) as alone:
        expected = [out.tokens for out in alone.generate(PROMPTS, **options)]
    with eellm.Engine(model, max_batch=3, workers=workers, tp=tp, timeout_s=20.0) as engine:
        for method in ("early", "pipelined"):
            bad = [engine.submit([*range(8, 28), 7, *range(8, 28)], method=method, **options) for _ in range(3)]
            for handle in bad:
                with pytest.raises(ModelError, match="no numbers"):
                    handle.result()
            assert [out.tokens for out in engine.generate(PROMPTS, method=method, **options)] == expected
