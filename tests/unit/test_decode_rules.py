"""What exits allow, whatever runs them: the bound that `benchmarks/decode.py` prints beside what it measured."""

import pytest
import torch

from eellm.exits.metrics import ExitRows, ExitTable
from tests.bench_suite import decode_rules

NUM_ROWS = 1000


def study(num_right, scores=None):
    """Of text on which an exit after layer 2 of 4 makes the end's choice in the first `num_right` rows, and says so."""
    right_N = torch.arange(NUM_ROWS) < num_right
    final = ExitRows(
        nll_N=torch.ones(NUM_ROWS),
        choice_N=torch.zeros(NUM_ROWS, dtype=torch.long),
        scores={"max_prob": torch.ones(NUM_ROWS)},
    )
    early = ExitRows(
        nll_N=torch.where(right_N, 1.0, 2.0),
        choice_N=(~right_N).long(),
        scores={"max_prob": torch.linspace(0.9, 0.1, NUM_ROWS) if scores is None else scores},
    )
    made = object.__new__(decode_rules.Study)  # without a model that is asked
    made.tables = (ExitTable(final.choice_N, {2: early, 4: final}),) * 2
    made.bytes_per_token = (4.0, 4.0)
    return made


@pytest.mark.parametrize("bound", ["agreement", "bits"])
def test_where_every_row_may_leave_half_the_layers_are_left_and_asking_costs_as_it_does_at_the_end(bound):
    found = study(NUM_ROWS)
    assert found.limit(bound) == pytest.approx(4 / 2)
    assert found.limit(bound, 1.0) == pytest.approx((4 + 1) / (2 + 1))


def test_exits_that_are_never_right_allow_what_the_bound_lets_them_be_wrong():
    assert 1 < study(0).limit("agreement") <= 1 / (1 - 0.02 * 2 / 4)
    assert 1 < study(0).limit("bits") <= 1 / (1 - 0.01 * 2 / 4)
    assert study(0).limit("agreement", 1.0) == 1, "asked of every row, an exit costs more than it gives"


def test_half_of_the_rows_may_leave_with_as_many_wrong_ones_as_the_bound_takes():
    found = study(NUM_ROWS // 2)
    allowed = 1 / (1 - 0.52 * 2 / 4)  # 2% of all rows wrong, beside the half that is right
    assert allowed * 0.99 < found.limit("agreement") <= allowed
    assert 1 / (1 - 0.5 * 2 / 4) * 0.99 < found.limit("bits") < found.limit("agreement")


def test_no_rule_that_is_chosen_is_faster_than_the_limit():
    found = study(NUM_ROWS // 2, torch.linspace(0, 1, NUM_ROWS).flip(0) ** 2)
    rules = found.rules("agreement")
    for head in (0.0, 1.0):
        best = min(decode_rules._cost(rule.threshold, rule.chosen_on, head) for rule in rules)
        assert (4 + head) / best <= found.limit("agreement", head)
