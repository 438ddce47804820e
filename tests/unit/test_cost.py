"""FLOPs by part against torch's own count of what really runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eellm
from eellm.plan.cost import attention_flops, forward_flops_per_token, mean_attended, train_flops_per_token
from tests.models import tiny_config

SEQ_LEN = 64
EXITS = tuple(
    eellm.ExitConfig(layer=layer, kind=kind, head=head)
    for layer, kind, head in [(1, "embed", "own"), (2, "layer", "own"), (3, "mlp", "tied"), (5, "norm", "tied")]
)


def counted(model, *, exits, backward=False):
    """FLOPs per token of products that torch runs, with attention as plain products, which ignore the mask."""
    tokens = torch.zeros(2, SEQ_LEN, dtype=torch.long)
    rows = model.decoder.rows(SEQ_LEN)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = [
            model.logits(layer, model.normed(layer, h, rows))
            for layer, h in model.hiddens(tokens, rows)
            if layer in exits
        ]
        if backward:
            sum(logits.sum() for logits in outputs).backward()
    return counter.get_total_flops() / tokens.numel()


def hidden_by_the_mask(config, num_layers, window=None):
    """FLOPs per token that plain products spend on pairs of rows which the mask then hides."""
    per_pair = attention_flops(config, SEQ_LEN, window) / mean_attended(SEQ_LEN, window)
    return num_layers * per_pair * (SEQ_LEN - mean_attended(SEQ_LEN, window))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 4}, {"head_dim": 24}, {"tie_embeddings": True}, {"vocab_size": 301}],
    ids=["grouped", "not grouped", "wide heads", "tied", "large vocabulary"],
)
def test_a_forward_pass_costs_what_torch_counts(changes):
    config = tiny_config(exits=EXITS, **changes)
    model = eellm.build(config)
    found = forward_flops_per_token(config, SEQ_LEN)
    without_exits = sum(found.layers) + found.final_head
    assert without_exits + hidden_by_the_mask(config, 6) == pytest.approx(counted(model, exits=[6]), rel=0.01)
    everything = counted(model, exits=[1, 2, 3, 5, 6])
    assert found.total + hidden_by_the_mask(config, 7) == pytest.approx(everything, rel=0.01)


@pytest.mark.parametrize("layer", [1, 2, 3, 5])
def test_each_kind_of_exit_costs_what_torch_counts_more_with_it(layer):
    config = tiny_config(exits=EXITS)
    model = eellm.build(config)
    more = counted(model, exits=[layer, 6]) - counted(model, exits=[6])
    hidden = hidden_by_the_mask(config, 1) if layer == 2 else 0
    assert forward_flops_per_token(config, SEQ_LEN).exits[layer] + hidden == pytest.approx(more, rel=0.01)


def test_a_training_step_costs_what_torch_counts():
    config = tiny_config(exits=EXITS)
    expected = counted(eellm.build(config), exits=[1, 2, 3, 5, 6], backward=True)
    found = train_flops_per_token(config, SEQ_LEN)
    assert found + 3 * hidden_by_the_mask(config, 7) == pytest.approx(expected, rel=0.01)


def test_recomputation_adds_one_forward_of_the_layers():
    config = tiny_config(exits=EXITS)
    more = train_flops_per_token(config, SEQ_LEN, recompute=True) - train_flops_per_token(config, SEQ_LEN)
    assert more == pytest.approx(sum(forward_flops_per_token(config, SEQ_LEN).layers))


@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
def test_the_rows_attended_to_are_those_of_the_mask(window):
    index = torch.arange(SEQ_LEN)
    distance = index[:, None] - index[None, :]
    mask = (distance >= 0) & (distance < (window or SEQ_LEN))
    assert mean_attended(SEQ_LEN, window) == pytest.approx(float(mask.sum()) / SEQ_LEN)


def test_only_layers_under_a_sliding_window_get_cheaper_by_it():
    config = tiny_config(exits=(), sliding_window=4, sliding_layers=(2, 6))
    whole = forward_flops_per_token(tiny_config(exits=()), SEQ_LEN).layers
    found = forward_flops_per_token(config, SEQ_LEN).layers
    assert [n for n in range(1, 7) if found[n - 1] < whole[n - 1]] == [2, 6]
    assert found[0] == whole[0]


def test_a_layer_exit_attends_through_the_last_layer_s_window():
    exits = (eellm.ExitConfig(layer=2, kind="layer"),)
    found = forward_flops_per_token(tiny_config(exits=exits, sliding_window=4, sliding_layers=(6,)), SEQ_LEN)
    assert found.exits[2] == pytest.approx(found.layers[5] + found.final_head)
