"""The waist: text in, verdict out. Every way in goes through here, and everything behind it is the same code.

    text -> tokens -> windows -> reader -> encode -> phase state -> heads -> policy -> verdict

`pipeline` wires the rooms together, `core` admits checks from many threads, `session` is one stream. What taps see
of served models comes in by `observed`, and joins at the phase state.
"""

from guard.assessor.core import Assessor
from guard.assessor.local import LocalSink
from guard.assessor.observer import Observer
from guard.assessor.session import Session

__all__ = ["Assessor", "LocalSink", "Observer", "Session"]
