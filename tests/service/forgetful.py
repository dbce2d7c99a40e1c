"""A stand-in whose streams are judged by their latest chunk alone, as a long stream's mean forgets what it began with."""

from guard.records import Phase
from tests.service.standin import StandIn, StandInSession


class Forgetful(StandIn):
    def open_session(self, options=None):
        return ForgetfulSession(self, options)


class ForgetfulSession(StandInSession):
    def feed(self, phase: Phase, text: str, *, last: bool = False):
        self.text = ""
        return super().feed(phase, text or "(end)", last=last)
