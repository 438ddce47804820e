"""The exit loss node against a plain sum of losses: every gradient, in fp64. And what it costs in memory."""

import pytest
import torch
import torch.nn.functional as F

import eellm
from eellm.exits.loss import IGNORE, CrossEntropy, count_targets, exit_loss_node
from tests.models import tiny_config

WEIGHTS = {1: 0.3, 3: 0.7, 4: 0.1}


def model_with(kind, head, *, tie_embeddings=False, norm="own"):
    exits = tuple(eellm.ExitConfig(layer=n, kind=kind, head=head, norm=norm) for n in WEIGHTS)
    return eellm.build(tiny_config(exits=exits, tie_embeddings=tie_embeddings, init_std=0.2), seed=3, dtype="float64")


def batch(num_rows=13):
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 29, (2, num_rows), generator=generator)
    labels = torch.randint(0, 29, (2, num_rows), generator=generator)
    labels[0, :4] = IGNORE
    return tokens, labels


def plain_loss(logits, labels, *, temperature=1.0, confidence_weighting=False):
    """The same loss without node, chunks or masks: one row after the other."""
    total = logits.new_zeros(())
    for row, label in zip(logits.flatten(0, 1), labels.flatten(), strict=True):
        if label != IGNORE:
            loss = -(row / temperature).log_softmax(-1)[label]
            total = total + loss * (row.detach().softmax(-1).max() if confidence_weighting else 1)
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference_gradients(model, tokens, labels, repeat=1, **options):
    model.zero_grad()
    logits = model(tokens)
    losses = {layer: plain_loss(value, labels, **options) for layer, value in logits.items()}
    plain_final = plain_loss(logits[6], labels)
    total = plain_final + sum(repeat * WEIGHTS[layer] * losses[layer] for layer in WEIGHTS)
    (total / count_targets(labels)).backward()
    return gradients(model), {layer: losses[layer].detach() for layer in WEIGHTS}


def node_gradients(model, tokens, labels, *, chunk_size=5, repeat=1, **options):
    """Forward and backward as any training loop would do them: it sees one final loss."""
    model.zero_grad()
    scale, reported = 1 / count_targets(labels), {}
    objective = CrossEntropy(labels.flatten(), **options)
    rows = model.decoder.rows(tokens.shape[1])
    h, done = model.decoder.embed(tokens), 0
    for layer, weight in WEIGHTS.items():
        h, done = model.decoder.run(h, done + 1, layer, rows), layer
        for _ in range(repeat):
            h = exit_loss_node(
                h,
                model.head(layer, rows),
                objective,
                weight=weight * scale,
                chunk_size=chunk_size,
                report=lambda loss, layer=layer: reported.__setitem__(layer, loss),
            )
    h = model.decoder.run(h, done + 1, 6, rows)
    logits = model.decoder.output(model.decoder.norm(h))
    (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum") * scale).backward()
    return gradients(model), reported


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-30)
        assert error < 1e-12, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("head", ["tied", "own"])
@pytest.mark.parametrize("kind", ["embed", "norm", "mlp", "layer"])
def test_every_gradient_equals_that_of_the_plain_sum_of_losses(kind, head, tie_embeddings):
    model = model_with(kind, head, tie_embeddings=tie_embeddings)
    expected, losses = reference_gradients(model, *batch())
    found, reported = node_gradients(model, *batch())
    assert_equal_gradients(found, expected)
    for layer, loss in losses.items():
        assert reported[layer] == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 7, 25, 26, 1000])
def test_the_chunk_size_changes_nothing_whether_it_divides_the_rows_or_not(chunk_size):
    model = model_with("mlp", "own")
    expected, _ = reference_gradients(model, *batch())
    assert_equal_gradients(node_gradients(model, *batch(), chunk_size=chunk_size)[0], expected)


def test_two_exits_behind_one_layer_add_up():
    model = model_with("mlp", "tied")
    expected, _ = reference_gradients(model, *batch(), repeat=2)
    assert_equal_gradients(node_gradients(model, *batch(), repeat=2)[0], expected)


@pytest.mark.parametrize("options", [{"temperature": 2.5}, {"confidence_weighting": True}])
def test_temperature_and_confidence_weighting_follow_their_formulas(options):
    model = model_with("norm", "own")
    expected, _ = reference_gradients(model, *batch(), **options)
    assert_equal_gradients(node_gradients(model, *batch(), **options)[0], expected)


def test_an_exit_that_shares_the_final_norm_sends_it_its_gradient():
    model = model_with("norm", "tied", norm="final")
    expected, _ = reference_gradients(model, *batch())
    found, _ = node_gradients(model, *batch())
    assert_equal_gradients(found, expected)
    assert not [name for name in found if name.startswith("exits.")], "such an exit has no weights of its own"


def test_a_frozen_backbone_still_trains_the_exit():
    model = model_with("mlp", "own")
    tokens, labels = batch()
    rows = model.decoder.rows(tokens.shape[1])
    with torch.no_grad():
        _, h = next(iter(model.hiddens(tokens, rows)))
    y = exit_loss_node(h, model.head(1, rows), CrossEntropy(labels.flatten()), weight=1.0)
    y.backward(torch.zeros_like(y))
    found = gradients(model)
    assert set(found) == {name for name, _ in model.named_parameters() if name.startswith("exits.1.")}
    model.zero_grad()
    plain_loss(model(tokens)[1], labels).backward()
    assert_equal_gradients(found, {name: p.grad for name, p in model.named_parameters() if name in found})


def test_a_split_backward_asks_for_inputs_and_for_weights_apart_and_gets_the_same():
    model = model_with("mlp", "own")
    tokens, labels = batch()
    rows = model.decoder.rows(tokens.shape[1])
    reports = []
    x = model.decoder.embed(tokens).detach().requires_grad_()
    head = model.head(1, rows)
    y = exit_loss_node(x, head, CrossEntropy(labels.flatten()), weight=1.0, report=reports.append)
    parameters = list(head.parameters)
    together = torch.autograd.grad(y.sum(), [x, *parameters], retain_graph=True)
    for_x = torch.autograd.grad(y.sum(), [x], retain_graph=True)
    for_weights = torch.autograd.grad(y.sum(), parameters)
    for one, other in zip(together, (*for_x, *for_weights), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len({float(loss) for loss in reports}) == 1, "each part of a split backward sees the same loss"


def test_rows_without_any_target_give_zero_and_no_nan():
    model = model_with("norm", "own")
    tokens, labels = batch()
    labels[:] = IGNORE
    rows = model.decoder.rows(tokens.shape[1])
    h = model.decoder.embed(tokens)
    y = exit_loss_node(h, model.head(1, rows), CrossEntropy(labels.flatten()), weight=1 / count_targets(labels))
    y.backward(torch.zeros_like(y))
    assert model.exits["1"].output.weight.grad.abs().max() == 0


def peak_bytes(run):
    """Peak of live CPU memory that `run` allocates, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_the_node_s_peak_memory_does_not_grow_with_length_times_vocabulary():
    vocab, width = 8192, 16
    config = tiny_config(vocab_size=vocab, hidden_size=width, exits=(eellm.ExitConfig(layer=1),), max_seq_len=4096)
    model = eellm.build(config, seed=0)

    def peak(num_rows, chunk_size):
        rows = model.decoder.rows(num_rows)
        x = torch.randn(1, num_rows, width, requires_grad=True)
        objective = CrossEntropy(torch.zeros(num_rows, dtype=torch.long))

        def run():
            y = exit_loss_node(x, model.head(1, rows), objective, weight=1.0, chunk_size=chunk_size)
            y.backward(torch.zeros_like(y))

        return peak_bytes(run)

    logits_bytes = vocab * 4
    chunked, longer = peak(1024, 256), peak(4096, 256)
    unchunked = peak(4096, 4096)
    assert unchunked > 4096 * logits_bytes, "the measure sees the logits"
    assert chunked < 2 * 256 * logits_bytes
    assert longer - chunked < 0.2 * 3072 * logits_bytes, "four times the rows cost hidden states, not logits"
    assert longer < unchunked / 5
