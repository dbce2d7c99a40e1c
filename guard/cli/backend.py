"""Who answers: a model loaded here, or a running sidecar. The commands do not know which."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from guard.records import (
    CheckInput,
    CheckOptions,
    Feature,
    LatentId,
    ModelInfo,
    PackInfo,
    Phase,
    PolicyInfo,
    Verdict,
)

if TYPE_CHECKING:
    from guard.assessor import Assessor
    from guard.config import GuardConfig
