"""What was made of a model's weights is used as long as they are the same, however they were changed."""

import pytest
import torch

import eellm
from eellm.exits.certified import weights_sha256
from eellm.infer.packing import Packed
from eellm.infer.prepare import network_of
from eellm.model.fingerprint import SAMPLE, states
from tests.models import needs_compiler, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@torch.no_grad()
def scaled_data(model):
    model.decoder.layer(3).attn.q.weight.data.mul_(-1)


def other_data(model):
    model.decoder.layer(2).mlp.up.weight.data = 3 * model.decoder.layer(2).mlp.up.weight.data


def through_numpy(model):
    model.decoder.norm.weight.detach().numpy()[:] *= 2


def assigned(model):
    other = tiny_model(dtype="float32", head_dim=16, seed=7)
    model.load_state_dict(other.state_dict(), assign=True)


def loaded(model):
    model.load_state_dict(tiny_model(dtype="float32", head_dim=16, seed=7).state_dict())


def swapped_rows(model):
    weight = model.decoder.output.weight.data
    weight[[1, 2]] = weight[[2, 1]]


CHANGES = (scaled_data, other_data, through_numpy, assigned, loaded, swapped_rows)


def copy_of(model):
    copy = tiny_model(dtype="float32", head_dim=16)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("compile", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_were_changed_behind_torchs_back_are_decoded_with(change, compile):
    model = tiny_model(dtype="float32", head_dim=16)
    packed = Packed()

    def logprobs(model):
        with eellm.Engine(model, compile=compile, packed=packed) as engine:
            return engine.score([PROMPT])[0].logprobs

    before, digest = logprobs(model), weights_sha256(model, ())
    assert logprobs(model) == before
    change(model)
    found = logprobs(model)
    assert found != before
    assert found == logprobs(copy_of(model))
    assert weights_sha256(model, ()) == weights_sha256(copy_of(model), ()) != digest


def test_a_network_is_found_again_as_long_as_nothing_changes():
    model = tiny_model(dtype="float32")
    network = network_of(model)
    assert network_of(model) is network
    with torch.inference_mode():
        assert network_of(model) is network


def test_models_made_in_inference_mode_are_followed_too():
    with torch.inference_mode():
        model = tiny_model(dtype="float32")
    network = network_of(model)
    assert network_of(model) is network
    with torch.inference_mode():
        model.decoder.norm.weight.mul_(2)
    assert network_of(model) is not network


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("size", [0, 1, SAMPLE - 1, SAMPLE, SAMPLE + 1, 7 * SAMPLE + 3])
def test_a_state_is_that_of_the_sampled_values(dtype, size):
    values = torch.arange(size).fmod(97).sub(48).to(dtype).reshape(1, -1)
    (state,) = states([values])
    assert states([values.clone()])[0][2] == state[2], "wherever they lie"
    if size > 1:
        assert states([values.flip(1)])[0][2] != state[2], "order counts"
        assert states([-values])[0][2] != state[2], "so do signs"
    if 0 < size <= SAMPLE:
        values.data[0, -1] = 63
        assert states([values])[0][2] != state[2], "of few values every one"
