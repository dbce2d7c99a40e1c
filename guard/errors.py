"""Every error that Guard raises on purpose.

    GuardError                  reason, message, metadata
    ├── InvalidInput            the caller's text, chat or options
    ├── NotFound                an unknown latent, domain or pack
    ├── Exhausted               a bounded queue or store is full; says when to retry
    ├── SessionExpired          a stream was idle for too long
    ├── Unavailable             no server answers there, or it went away; a client raises it
    ├── ConfigError             settings: a misspelt key, a bad value, a port in use
    ├── WeightsError            a model's files: absent, incomplete, wrong hash
    └── PackError               detector data: a file, a key, what was found, what was expected

`reason` is an AIP-193 reason (UPPER_SNAKE_CASE): stable, for programs; the message is for people.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class GuardError(Exception):
    """Base class; raised itself where none of the others says it."""

    reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason or type(self).reason
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidInput(GuardError):
    reason = "INVALID_INPUT"


class NotFound(GuardError):
    reason = "NOT_FOUND"


class Exhausted(GuardError):
    reason = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_s: float, reason: str | None = None, **metadata: object) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.retry_after_s = retry_after_s


class SessionExpired(GuardError):
    reason = "SESSION_EXPIRED"


class Unavailable(GuardError):
    reason = "UNAVAILABLE"


class ConfigError(GuardError):
    reason = "INVALID_CONFIG"


class WeightsError(GuardError):
    reason = "INVALID_WEIGHTS"


class PackError(GuardError):
    """Names the file, the key, what was found and what was expected (style of every pack message)."""

    reason = "INVALID_PACK"

    @classmethod
    def at(cls, file: object, key: str, found: object, expected: object) -> "PackError":
        return cls(
            f"{file}: {key}: found {found}, expected {expected}", file=file, key=key, found=found, expected=expected
        )


def first_problem(error: "ValidationError") -> str:
    """Where a record's first fault lies, and what it is."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key}: {first['msg']}" if key else str(first["msg"])
