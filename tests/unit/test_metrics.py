"""The table of exits against one forward pass per document and a loop over rows, and against generation."""

import math

import numpy as np
import pytest
import torch

import eellm
from eellm.data.documents import Document
from eellm.data.loader import batches
from eellm.data.packing import pack
from eellm.errors import ConfigError, DataError
from eellm.exits.metrics import POLICIES, exit_table
from eellm.exits.policy import SCORES
from tests.models import tiny_model

LENGTHS = (9, 5, 13, 2, 7)  # 36 tokens: two rows of 16, and one with padding


def documents(lengths=LENGTHS, *, seed=0, vocab_size=29):
    """Random tokens; of every second document, only the later half is to be predicted."""
    generator = np.random.default_rng(seed)
    for number, length in enumerate(lengths):
        is_target = np.arange(length) >= (length // 2 if number % 2 else 0)
        tokens = generator.integers(vocab_size, size=length).astype(np.int32)
        yield Document(tokens=tokens, is_target=is_target)


def table_of(model, *, batch_size=2, **options):
    return exit_table(model, batches(pack(documents(), 16), batch_size), **options)


@torch.inference_mode()
def naive(model):
    """(label, {layer: (logits, gate)}) of every target row, each piece of a document run on its own."""
    found = []
    rows = pack(documents(), 16)
    for tokens, labels, numbers in zip(rows.tokens_NT, rows.labels_NT, rows.documents_NT, strict=True):
        for number in np.unique(numbers):
            piece = torch.from_numpy(tokens[numbers == number].astype(np.int64))[None]
            logits = model(piece)
            plain = model.decoder.rows(piece.shape[1])
            gates = {
                layer: model.exit(layer).gate(model.normed(layer, h, plain))
                for layer, h in model.hiddens(piece, plain)
                if layer < model.config.num_layers and model.exit(layer).gate is not None
            }
            for t, label in enumerate(labels[numbers == number]):
                if label != -100:
                    at_row = {n: (x[0, t].float(), gates[n][0, t] if n in gates else None) for n, x in logits.items()}
                    found.append((int(label), at_row))
    return found


@pytest.mark.parametrize("chunk_size", [1, 3, 512])
def test_every_row_of_packed_documents_equals_its_document_run_alone(chunk_size):
    model = tiny_model(seed=1)
    table, rows = table_of(model, chunk_size=chunk_size), naive(model)
    assert list(table.exits) == [1, 2, 3, 5, 6]
    assert table.labels_N.tolist() == [label for label, _ in rows]
    for layer, exit in table.exits.items():
        logits_NV = torch.stack([at_row[layer][0] for _, at_row in rows])
        nll = [-float(row.log_softmax(-1)[label]) for row, label in zip(logits_NV, table.labels_N, strict=True)]
        assert exit.nll_N.tolist() == pytest.approx(nll, abs=1e-5)
        assert exit.choice_N.tolist() == logits_NV.argmax(-1).tolist()
        for policy, score in SCORES.items():
            assert exit.scores[policy].tolist() == pytest.approx(score(logits_NV).tolist(), abs=1e-5)
        gates = [1.0 if layer == 6 else float(at_row[layer][1].sigmoid()) for _, at_row in rows]
        assert exit.scores["gate"].tolist() == pytest.approx(gates, abs=1e-5)


def test_the_batches_that_rows_come_in_change_nothing():
    model = tiny_model(seed=1)
    whole = table_of(model, batch_size=3)
    for layer, exit in table_of(model, batch_size=1).exits.items():
        torch.testing.assert_close(exit.nll_N, whole.exits[layer].nll_N)
        assert torch.equal(exit.choice_N, whole.exits[layer].choice_N)


def test_measures_of_an_exit_are_their_definitions():
    table, rows = table_of(tiny_model(seed=2)), naive(tiny_model(seed=2))
    for layer in table.exits:
        nll = [-float(at_row[layer][0].log_softmax(-1)[label]) for label, at_row in rows]
        choices = [int(at_row[layer][0].argmax()) for _, at_row in rows]
        finals = [int(at_row[6][0].argmax()) for _, at_row in rows]
        assert table.nll(layer) == pytest.approx(sum(nll) / len(nll), abs=1e-5)
        assert table.perplexity(layer) == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
        assert table.agreement(layer) == pytest.approx(np.mean(np.equal(choices, finals)))
        assert table.accuracy(layer) == pytest.approx(np.mean([c == r[0] for c, r in zip(choices, rows, strict=True)]))
    assert table.agreement(6) == 1


def rule(at_row, thresholds, policy):
    """The layer at which a row leaves: the rule in its own words."""
    for layer in sorted(at_row):
        logits, gate = at_row[layer]
        if layer == max(at_row):
            return layer
        score = float(gate.float().sigmoid()) if policy == "gate" else float(SCORES[policy](logits))
        if thresholds.get(layer, 1) < 1 and score >= thresholds[layer]:
            return layer


@pytest.mark.parametrize("policy", POLICIES)
def test_a_point_is_that_of_the_first_exit_that_is_sure_enough(policy):
    model = tiny_model(seed=1)
    table, rows, seen = table_of(model), naive(model), set()
    for threshold in (0.1, 0.3, 0.5, {1: 0.6, 3: 0.2}, {2: 0.4, 5: 1.0}):
        thresholds = threshold if isinstance(threshold, dict) else dict.fromkeys((1, 2, 3, 5), threshold)
        taken = [rule(at_row, thresholds, policy) for _, at_row in rows]
        seen |= set(taken)
        point = table.at_threshold(threshold, policy)
        assert table.exit_taken(threshold, policy).tolist() == taken
        assert point.taken == pytest.approx({n: taken.count(n) / len(taken) for n in (1, 2, 3, 5, 6)})
        assert point.mean_exit_layer == pytest.approx(sum(taken) / len(taken))
        logits = [at_row[n][0] for n, (_, at_row) in zip(taken, rows, strict=True)]
        choices = [int(row.argmax()) for row in logits]
        agrees = [c == int(at_row[6][0].argmax()) for c, (_, at_row) in zip(choices, rows, strict=True)]
        assert point.agreement == pytest.approx(np.mean(agrees))
        for n in set(taken):
            assert point.agreement_by_exit[n] == pytest.approx(np.mean(np.array(agrees)[np.array(taken) == n]))
        assert point.accuracy == pytest.approx(np.mean([c == r[0] for c, r in zip(choices, rows, strict=True)]))
        nll = np.mean([-float(x.log_softmax(-1)[label]) for x, (label, _) in zip(logits, rows, strict=True)])
        assert point.nll == pytest.approx(nll, abs=1e-5)
        assert point.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert len(seen) >= 4, "the models' logits must be spread enough that most exits are taken"


@pytest.mark.parametrize("policy", POLICIES)
def test_exits_that_are_not_in_use_are_passed_by(policy):
    model = tiny_model(seed=1)
    table, rows = table_of(model), naive(model)
    for exits, threshold in (([5, 2], 0.3), ([3], 0.5), ([1, 3, 5], 0.6)):
        thresholds = dict.fromkeys(exits, threshold)
        expected = [rule(at_row, thresholds, policy) for _, at_row in rows]
        assert table.exit_taken(threshold, policy, exits).tolist() == expected
        assert len(set(expected)) > 1


def test_a_threshold_of_one_takes_the_final_exit_and_of_zero_the_first():
    table = table_of(tiny_model(seed=0, sureness=200.0))
    assert max(float(exit.scores["max_prob"].max()) for exit in table.exits.values()) == 1
    for threshold in (1, 1.5):
        point = table.at_threshold(threshold)
        assert point.taken == {1: 0, 2: 0, 3: 0, 5: 0, 6: 1}
        assert (point.agreement, point.mean_exit_layer) == (1, 6)
        assert point.perplexity == pytest.approx(table.perplexity(6))
    assert table.at_threshold(0).taken[1] == 1
    assert table.at_threshold(0).agreement == table.agreement(1)
    assert table.at_threshold(0, exits=[5, 3]).taken[3] == 1
    assert table.at_threshold(0).agreement_by_exit[2] == 1, "none of no rows disagrees"


@pytest.mark.parametrize("policy", POLICIES)
def test_on_tokens_that_early_exit_generated_the_table_takes_the_same_exits(policy):
    seen = set()
    for seed, threshold in ((0, 0.4), (1, 0.6), (2, 0.8)):
        model, prompt = tiny_model(seed=seed), [3, 1, 4, 1, 5, 9]
        (out,) = eellm.generate(model, [prompt], max_new_tokens=40, policy=policy, threshold=threshold)
        seen |= set(out.exits)
        tokens = np.array([*prompt, *out.tokens], np.int32)
        document = Document(tokens=tokens, is_target=np.arange(len(tokens)) >= len(prompt))
        table = exit_table(model, batches(pack([document], 64), 1))
        taken = table.exit_taken(threshold, policy)
        assert taken.tolist() == out.exits
        logprobs = [-float(table.exits[int(n)].nll_N[row]) for row, n in enumerate(taken)]
        assert logprobs == pytest.approx(out.logprobs, abs=1e-5)
    assert len(seen) >= 4, "the models' logits must be spread enough that most exits are taken"


def test_a_score_that_equals_the_threshold_is_sure_enough():
    table = table_of(tiny_model(seed=0))
    score_N = table.exits[5].scores["max_prob"]
    middle = float(score_N.median())
    assert table.at_threshold(middle, exits=[5]).taken[5] == float((score_N >= score_N.median()).double().mean())


def test_a_threshold_is_not_rounded_to_the_scores_precision():
    table = table_of(tiny_model(seed=0))
    score_N = table.exits[5].scores["max_prob"]
    score_N[:] = torch.tensor(0.7)  # in float32, a little below 0.7
    assert float(score_N[0]) < 0.7
    assert table.at_threshold(0.7, exits=[5]).taken[5] == 0


def test_exits_and_scores_that_are_not_there_are_named():
    exits = (eellm.ExitConfig(layer=2, kind="norm"), eellm.ExitConfig(layer=4, kind="norm", gate_size=8))
    table = table_of(tiny_model(exits=exits))
    assert "gate" not in table.exits[2].scores
    with pytest.raises(ConfigError, match=r"'gate'.*layer 2"):
        table.at_threshold(0.5, "gate")
    assert table.at_threshold(0, "gate", exits=[4]).taken[4] == 1
    with pytest.raises(ConfigError, match="no exit at layer 3"):
        table.at_threshold(0.5, exits=[3])
    with pytest.raises(ConfigError, match="max_prob"):
        table.at_threshold(0.5, "max_probe")
    assert set(table_of(tiny_model(), policies=("margin",)).exits[1].scores) == {"margin"}


def test_batches_without_a_target_add_nothing_and_a_text_without_any_is_refused():
    model = tiny_model(seed=1)
    (batch,) = batches(pack(documents(), 16), 8)
    silent = type(batch)(
        tokens_BT=batch.tokens_BT,
        labels_BT=torch.full_like(batch.labels_BT, -100),
        positions_BT=batch.positions_BT,
        documents_BT=batch.documents_BT,
        is_packed=True,
    )
    table = exit_table(model, [silent, batch])
    torch.testing.assert_close(table.exits[2].nll_N, table_of(model).exits[2].nll_N)
    with pytest.raises(DataError, match="no token to be predicted"):
        exit_table(model, [silent])


def test_logits_exist_for_no_more_rows_than_a_chunk():
    model, sizes = tiny_model(seed=1), []
    model.decoder.output.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    table_of(model, chunk_size=4)
    assert max(shape[0] for shape in sizes) <= 4
    assert all(len(shape) == 2 for shape in sizes)
