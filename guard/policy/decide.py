"""From scores to an action: the pack's thresholds, overridden by the caller's policy."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from guard.config import PolicyConfig
from guard.errors import ConfigError
from guard.records import Action, PolicyInfo

Thresholds = tuple[float | None, float | None]  # flag at, block at


def thresholds(pack: Mapping[str, Thresholds], policy: PolicyConfig) -> dict[str, Thresholds]:
    """The pack's own thresholds by head name, overridden by the policy's.

    Raises ConfigError for a head that the pack does not have.
    """
    result = dict(pack)
    for name, given in policy.thresholds.items():
        if name not in result:
            raise ConfigError(f"policy.thresholds: unknown head {name!r}, expected one of {', '.join(result)}")
        flag_at, block_at = result[name]
        merged = (given.get("flag", flag_at), given.get("block", block_at))
        if merged[0] is not None and merged[1] is not None and merged[0] > merged[1]:
            raise ConfigError(f"policy.thresholds.{name}: flag at {merged[0]} is above block at {merged[1]}")
        result[name] = merged
    return result


def info(policy: PolicyConfig, chosen: dict[str, Thresholds]) -> PolicyInfo:
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
    return PolicyInfo(version=policy.version, hash=digest)


def decide(heads: Sequence[tuple[float, Thresholds]]) -> Action:
    """The strongest action that any head of a domain calls for; a score at its threshold counts."""
    action = Action.ALLOW
    for score, (flag_at, block_at) in heads:
        if block_at is not None and score >= block_at:
            return Action.BLOCK
        if flag_at is not None and score >= flag_at:
            action = Action.FLAG
    return action
