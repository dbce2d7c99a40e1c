"""A tap's sink in the same process: no server, and a verdict as soon as a step has been handed over."""

import logging

from guard.assessor.core import Assessor
from guard.assessor.limits import chosen_domains
from guard.records import CheckOptions, Verdict
from guard.tap.protocol import Step, TapInfo

_log = logging.getLogger("guard.tap")


class LocalSink:
    """Hands a tap's steps to an assessor; each is judged before `send` returns.

    Raises ConfigError for a tap that does not fit the assessor's pack; `guard.tap.describe` makes `info` of a model.
    """

    def __init__(self, assessor: Assessor, info: TapInfo) -> None:
        self._assessor = assessor
        self._link = assessor.observed.connect(info)
        self._dropped = 0

    def send(self, step: Step) -> None:
        try:
            self._link.take(step, dropped=self._dropped)
        except Exception:  # noqa: BLE001 - the engine must go on
            self._dropped += 1
            _log.exception("a tap's step could not be judged")

    def stops(self) -> frozenset[str]:
        return frozenset(self._link.stops)

    @property
    def dropped(self) -> int:
        return self._dropped

    def close(self) -> None:
        self._link.close()

    def verdict(self, request_id: str, options: CheckOptions | None = None) -> Verdict | None:
        """The running verdict of a request, the last one when it has ended; None where no row of it has come.

        Raises NotFound for a domain that the pack does not have.
        """
        asked = options or CheckOptions()
        domains = chosen_domains(asked, self._assessor.pack.domains)
        named = CheckOptions(domains, asked.max_attributions, request_id=request_id)
        observed = self._assessor.observed
        request = observed.find(request_id)
        return observed.progress(request, named, domains, full=True).verdict if request else None
