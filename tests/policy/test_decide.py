import pytest

from guard.config import PolicyConfig
from guard.errors import ConfigError
from guard.policy.decide import decide, info, thresholds
from guard.records import Action, worst

PACK = {"violence.harm": (0.5, 0.9), "violence.presence": (None, None)}


@pytest.mark.parametrize(
    ("scores", "action"),
    [
        ([(0.49, (0.5, 0.9))], Action.ALLOW),
        ([(0.5, (0.5, 0.9))], Action.FLAG),
        ([(0.9, (0.5, 0.9))], Action.BLOCK),
        ([(0.6, (0.5, None)), (0.95, (0.5, 0.9))], Action.BLOCK),
        ([(1.0, (None, None))], Action.ALLOW),
        ([], Action.ALLOW),
    ],
)
def test_the_strongest_action_wins_and_a_score_at_its_threshold_counts(scores, action):
    assert decide(scores) is action


def test_unknown_is_never_allow_and_never_hides_a_block():
    assert worst([Action.ALLOW, Action.NOT_ASSESSED]) is Action.NOT_ASSESSED
    assert worst([Action.FLAG, Action.NOT_ASSESSED]) is Action.NOT_ASSESSED
    assert worst([Action.BLOCK, Action.NOT_ASSESSED]) is Action.BLOCK
    assert worst([]) is Action.NOT_ASSESSED


def test_a_policy_overrides_one_threshold_and_keeps_the_other():
    chosen = thresholds(PACK, PolicyConfig(thresholds={"violence.harm": {"flag": 0.2}}))
    assert chosen == {"violence.harm": (0.2, 0.9), "violence.presence": (None, None)}


def test_none_switches_an_action_off():
    for never in (None, "never"):
        policy = PolicyConfig(thresholds={"violence.harm": {"block": never}})
        assert thresholds(PACK, policy)["violence.harm"] == (0.5, None)


def test_an_unknown_head_is_named():
    with pytest.raises(
        ConfigError, match=r"policy\.thresholds: unknown head 'weather\.harm', expected one of violence"
    ):
        thresholds(PACK, PolicyConfig(thresholds={"weather.harm": {"flag": 0.5}}))


def test_flag_above_block_is_refused():
    with pytest.raises(ConfigError, match=r"policy.thresholds.violence.harm: flag at 0.95 is above block at 0.9"):
        thresholds(PACK, PolicyConfig(thresholds={"violence.harm": {"flag": 0.95}}))


def test_the_policy_hash_follows_the_thresholds():
    plain = info(PolicyConfig(), thresholds(PACK, PolicyConfig()))
    changed = info(PolicyConfig(), thresholds(PACK, PolicyConfig(thresholds={"violence.harm": {"flag": 0.2}})))
    assert plain.hash != changed.hash
