"""What a program has told torch (default dtype, inference mode) changes nothing of what a model says."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

import eellm
from tests.models import needs_compiler, tiny_model
from tests.step_costs import step_costs
from tests.worlds import tiny_tokenizer

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7]]
WAYS = [pytest.param(True, marks=needs_compiler), False]


def model_of(dtype="float32"):
    model = tiny_model(dtype=dtype, head_dim=16, vocab_size=tiny_tokenizer().vocab_size)
    model.tokenizer = tiny_tokenizer()
    return model


@contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def everything(model, compile, quantize=None):
    """What an engine says, in every way that there is."""
    said = []
    with eellm.Engine(model, compile=compile, quantize=quantize) as engine:
        engine.network.costs = step_costs((1, 2, 3, 5, 6), layer_s=1.0, head_s=0.1)  # measured ones differ each time
        for options in (
            {"method": "full"},
            {"threshold": 0.3},
            {"policy": "gate", "threshold": 0.4},
            {"method": "speculative", "always_draft": True},
            {"threshold": 0.4, "sampling": eellm.Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=1)},
        ):
            outs = engine.generate(PROMPTS, max_new_tokens=24, top_logprobs=2, **options)
            said += [(out.tokens, out.exits, out.logprobs, out.confidences) for out in outs]
        scores = engine.score([("for x in", " range"), [3, 1, 4, 1, 5]], threshold=0.3)
        said += [(score.logprobs, score.exits) for score in scores]
    return said


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compile", WAYS)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_torchs_default_dtype_changes_nothing(tmp_path, dtype, compile, quantize):
    eellm.save(model_of(), tmp_path / "model")
    expected = everything(eellm.load(tmp_path / "model"), compile, quantize)
    with default(dtype):
        found = everything(eellm.load(tmp_path / "model"), compile, quantize)
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_drawn_alike_whatever_the_default_dtype(dtype):
    expected = tiny_model(dtype="float32").state_dict()
    with default(dtype):
        found = tiny_model(dtype="float32").state_dict()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("within", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("compile", WAYS)
def test_engines_work_within_torchs_modes_and_after_them(within, compile):
    expected = everything(model_of(), compile)
    with within():
        model = model_of()
        engine = eellm.Engine(model, compile=compile, max_batch=4)
        outs = engine.generate(PROMPTS[:1], threshold=0.3, max_new_tokens=8)
        assert eellm.generate(model, PROMPTS[:1], threshold=0.3, max_new_tokens=8)[0].tokens == outs[0].tokens
        assert everything(model, compile) == expected
    # NOTE more slots and rows, and a prompt that is copied: memory that was made within the mode grows outside of it
    outs = engine.generate([*PROMPTS, PROMPTS[0], PROMPTS[1]], threshold=0.3, max_new_tokens=24)
    assert [out.tokens for out in outs[:2]] == [said[0] for said in expected[2:4]]
    assert everything(model, compile) == expected
    for mode in (nullcontext, torch.inference_mode):
        with mode():
            assert everything(model_of(), compile) == expected
