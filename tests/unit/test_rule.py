"""What an exit rule asks of the engine when it scores and when it generates."""

import pytest

from eellm.errors import ConfigError
from eellm.evaluate.rule import ExitRule


def test_full_depth_one_exit_and_the_policy_ask_the_same_of_scoring_and_generating():
    assert ExitRule().scoring() == {}
    assert ExitRule().generating(6) == {"method": "full"}
    assert ExitRule(exit=3).scoring() == {"exit": 3}
    assert ExitRule(exit=3).generating(6) == {"method": "early", "exits": (3,), "threshold": 0.0}
    assert ExitRule(exit=6).generating(6) == {"method": "full"}
    policy = {"policy": "margin", "threshold": 0.7, "exits": (2,)}
    assert ExitRule(threshold=0.7, policy="margin", exits=(2,)).scoring() == policy
    assert ExitRule(threshold=0.7, policy="margin", exits=(2,)).generating(6) == {"method": "early", **policy}


def test_each_rule_has_a_name():
    rules = (ExitRule(), ExitRule(exit=3), ExitRule(threshold=0.8), ExitRule(threshold={2: 0.5}, policy="gate"))
    assert [rule.name for rule in rules] == ["full depth", "exit 3", "max_prob 0.8", "gate {2: 0.5}"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit": 3, "threshold": 0.8}, "exit = 3 takes one exit for all tokens"),
        ({"exits": (3,)}, "needs a threshold"),
        ({"threshold": 0.8, "policy": "max_probe"}, "max_prob"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ExitRule(**fields)
