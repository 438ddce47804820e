"""A model whose logits are no numbers says so, in place of being perfect; others in the same engine go on."""

import math

import numpy as np
import pytest
import torch

import eellm
from eellm.data.documents import Document
from eellm.data.packing import pack
from eellm.errors import ModelError
from eellm.evaluate.perplexity import evaluate
from tests.models import afraid_of, needs_compiler, tiny_model

WAYS = [pytest.param(True, marks=needs_compiler), False]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def model_of():
    return tiny_model(dtype="float32", head_dim=16)


@torch.no_grad()
def broken(*, layer=6, rows=slice(None)):
    """The exit after that layer is broken, in all logits or in some."""
    model = model_of()
    if layer == 6:
        model.decoder.output.weight[rows] = math.nan
    elif model.exit(layer).output is None:
        model.exit(layer).norm.weight[:] = math.nan
    else:
        model.exit(layer).output.weight[rows] = math.nan
    return model


@pytest.mark.parametrize("compile", WAYS)
@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), slice(7, 8), slice(28, 29)])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "full"},
        {"threshold": 0.9},
        {"method": "speculative", "always_draft": True},
        {"method": "full", "sampling": eellm.Sampling(temperature=0.7, seed=1)},
        {"method": "full", "sampling": eellm.Sampling(repetition_penalty=1.2)},
    ],
)
def test_a_request_that_gets_no_numbers_fails_and_names_the_exit(compile, rows, options):
    model = broken(rows=rows)
    with eellm.Engine(model, compile=compile) as engine:
        handle = engine.submit(PROMPT, max_new_tokens=100, **options)
        with pytest.raises(
            ModelError, match=r"exit after layer (3|5|6) are no numbers \(NaN\).*load the model in float32"
        ):
            handle.result()
        assert handle.finish_reason == "failed"
        assert engine.stats().num_running == 0
        with pytest.raises(ModelError):
            engine.generate([PROMPT], max_new_tokens=20, **options)


@pytest.mark.parametrize("compile", WAYS)
def test_one_request_that_fails_leaves_nothing_behind_for_those_beside_and_after_it(compile):
    model = afraid_of(model_of(), 7)
    options = {"threshold": 0.5, "max_new_tokens": 20}
    prompts = [[token for token in range(1, 29) if token % 7][i : i + 9] for i in range(6)]

    def generate(engine):
        return [engine.generate([prompt], **options)[0].tokens for prompt in prompts]

    with eellm.Engine(model, compile=compile, max_batch=8) as alone:
        expected = generate(alone)
    with eellm.Engine(model, compile=compile, max_batch=8) as engine:
        for _ in range(3):
            bad = [engine.submit([*prompts[0], 7, *range(8, 20)], **options) for _ in range(3)]
            good = [engine.submit(prompt, **options) for prompt in prompts]
            for handle in bad:
                with pytest.raises(ModelError):
                    handle.result()
            assert [handle.result().tokens for handle in good] == expected
            assert all(not kv.isnan().any() for kv in engine.backend.memory.layers.values())


@pytest.mark.parametrize("compile", WAYS)
@pytest.mark.parametrize(
    ("layer", "fields"),
    [
        (6, {}),
        (3, {"threshold": 0.9}),
        (5, {"exit": 5}),
        (3, {"threshold": 0.5}),
        (2, {"policy": "gate", "threshold": 0.0, "exits": (2,)}),
    ],
)
def test_a_text_is_not_scored_by_an_exit_that_says_no_numbers(compile, layer, fields):
    engine = eellm.Engine(broken(layer=layer), compile=compile)
    with pytest.raises(ModelError, match=f"exit after layer {layer} are no numbers"):
        engine.score([PROMPT], **fields)


@pytest.mark.parametrize("layer", [1, 3, 5, 6])
def test_an_exit_that_says_no_numbers_has_no_quality(layer):
    tokens = np.arange(60).astype(np.int32) % 29
    rows = pack([Document(tokens=tokens, is_target=np.ones(60, bool))], 16)
    with pytest.raises(ModelError, match=f"exit after layer {layer if layer < 6 else '(3|5|6)'} are no numbers"):
        evaluate(broken(layer=layer), rows)
