"""Weights laid out for decoding: other strides, the same model, still trainable, saved as before."""

import torch

import eellm
from eellm.infer.layout import lay_out_for_decoding
from tests.models import tiny_model

TOKENS = torch.randint(0, 29, (2, 11), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model):
    return torch.stack(list(model(TOKENS).values()))


def test_the_layout_changes_strides_and_neither_values_nor_logits():
    for changes in ({}, {"qkv_bias": True}, {"qk_norm": True, "tie_embeddings": True}):
        model = tiny_model(**changes)
        before, logits = {n: p.clone() for n, p in model.named_parameters()}, logits_of(model)
        lay_out_for_decoding(model)
        assert (model.decoder.layer(1).attn.fused is None) == ("qkv_bias" in changes)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        torch.testing.assert_close(logits_of(model), logits, rtol=0, atol=1e-12)
        storage = model.decoder.layer(1).mlp.up.weight.data_ptr()
        lay_out_for_decoding(model)
        assert model.decoder.layer(1).mlp.up.weight.data_ptr() == storage, "the second time it does nothing"


def test_weights_changed_or_replaced_afterwards_are_the_ones_that_count():
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    lay_out_for_decoding(model)
    model.load_state_dict(other.state_dict())  # in place
    torch.testing.assert_close(logits_of(model), logits_of(other), rtol=0, atol=1e-12)
    third = tiny_model(seed=2)
    model.decoder.layer(2).mlp.up.weight = third.decoder.layer(2).mlp.up.weight
    other.decoder.layer(2).mlp.up.weight = third.decoder.layer(2).mlp.up.weight
    torch.testing.assert_close(logits_of(model), logits_of(other), rtol=0, atol=1e-12)
    model.load_state_dict(third.state_dict(), assign=True)
    torch.testing.assert_close(logits_of(model), logits_of(third), rtol=0, atol=1e-12)


def test_gradients_after_decoding_are_those_of_the_parts():
    model, fresh = tiny_model(), tiny_model()
    lay_out_for_decoding(model)
    for each in (model, fresh):
        sum(value.square().sum() for value in each(TOKENS).values()).backward()
    for (name, one), two in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_a_model_saved_after_decoding_is_the_one_saved_before(tmp_path):
    model = tiny_model(dtype="float32")
    eellm.save(model, tmp_path / "before")
    eellm.generate(model, [[1, 2, 3]], max_new_tokens=3)
    eellm.save(model, tmp_path / "after")
    for name in ("model.safetensors", "exits.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
