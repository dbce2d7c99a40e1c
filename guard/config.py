"""Settings: defaults, then a TOML file, then `GUARD_*` environment variables, then command-line flags. No torch.

Every key is declared here once; a key that is not is refused by name. `GUARD_READER__DTYPE` sets `reader.dtype`; a list
or a table is written as JSON there, and an empty value counts as unset, but for `GUARD_SERVER__METRICS`, where it means
off. `GUARD_DEBUG` belongs to the command line.
"""

import json
import os
import re
import tomllib
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

from guard.errors import ConfigError

DEFAULT_PACK = Path("detectors/smollm2-135m-instruct/safety-residual")

# What Kubernetes sets for a Service named guard or guard-...: GUARD_PORT=tcp://..., GUARD_SERVICE_HOST, and the like.
_OF_KUBERNETES = re.compile(r"GUARD_([A-Z0-9]+_)*(SERVICE_(HOST|PORT)(_\w+)?=|PORT_\d+_[A-Z]+(_[A-Z]+)?=|PORT=\w+://)")
_EMPTY_COUNTS = {"GUARD_SERVER__METRICS"}


def _default_pack() -> Path:
    """The shipped pack: of this folder, else of the checkout that this file belongs to."""
    return DEFAULT_PACK if DEFAULT_PACK.is_dir() else Path(__file__).parents[1] / DEFAULT_PACK


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _no_boolean(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """pydantic takes booleans for numbers and numbers for booleans: `block = true` would be a threshold of 1."""
    result = read(value)
    if isinstance(value, bool) and not isinstance(result, bool):
        raise PydanticCustomError("number_type", "Input should be a number, not a boolean")
    if isinstance(result, bool) and isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be true or false, not a number")
    return result


_Threshold = Annotated[float, Field(ge=0, le=1), WrapValidator(_no_boolean)]
# TOML has no null.
_ThresholdOrNever = Annotated[_Threshold | None, BeforeValidator(lambda value: None if value == "never" else value)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    _numbers = field_validator("*", mode="wrap")(_no_boolean)


class ReaderConfig(_Section):
    """The model that Guard runs itself."""

    model: str = Field(
        "smollm2-135m-instruct",
        description="a Hugging Face folder, one that `guard export` made, or the default model's name",
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="float32 is exact; bfloat16 is faster where the processor has it"
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0 takes every core of this process")
    window: int = Field(1024, ge=16, description="tokens read at once; longer text is read in overlapping windows")
    overlap: int = Field(128, ge=0, description="tokens that a window shares with the one before it")
    batch_tokens: int = Field(512, ge=16, description="padded tokens in one batch, at most")
    step_tokens: int = Field(
        256,
        ge=16,
        description="tokens of one checked text read at once: others wait no longer; a stream's chunk is read whole",
    )
    queue_size: int = Field(256, ge=1, description="requests that may wait; one more is refused at once")
    queue_bytes: int = Field(
        16 << 20,
        ge=0,
        description="UTF-8 bytes of all their text, and no less than limits.text_bytes; one more is refused, but what "
        "a stream feeds first",
    )
    allow_unverified: bool = Field(False, description="run a model that the pack was not made for, and say so")


class SessionsConfig(_Section):
    """Open streams, each with a key-value cache."""

    limit: int = Field(1024, ge=1, description="open streams at most; one more is refused at once")
    cache_bytes: int = Field(
        1 << 30,
        ge=0,
        description="bytes of all caches; over it, the stream idle longest loses its own and reads its window again",
    )
    idle_seconds: float = Field(300.0, gt=0, description="a stream idle for longer is closed")


class TapsConfig(_Section):
    """Requests of served models, as taps observe them; `server.taps` says where taps connect."""

    stop: tuple[Literal["prompt", "completion"], ...] = Field(
        ("prompt", "completion"), description="phases whose block ends the generation; [] only says so"
    )
    least_tokens: int = Field(
        16, ge=1, description="tokens of a completion before it is judged, unless it ends: heads know whole texts"
    )
    sessions: int = Field(1024, ge=1, description="open requests at most; rows of one more are passed over")
    wait_seconds: float = Field(10.0, gt=0, description="an announced request without rows for so long is not assessed")
    idle_seconds: float = Field(600.0, gt=0, description="a request without rows for longer is taken as lost")
    keep_seconds: float = Field(60.0, ge=0, description="time for which an ended request can still be followed")
    allow_untested: bool = Field(False, description="accept taps of engine versions that no test ran with")


class PrefixesConfig(_Section):
    """Chats of checks kept for others that begin alike: a system prompt, earlier turns. A stream keeps its own."""

    limit: int = Field(32, ge=0, description="chats of checks kept at most; 0 keeps none")
    bytes: int = Field(256 << 20, ge=0, description="bytes of them all, at most")
    idle_seconds: float = Field(300.0, gt=0, description="one that no chat used for longer is let go")


class LimitsConfig(_Section):
    text_bytes: int = Field(1_048_576, ge=1, description="UTF-8 bytes of one request's text, at most")
    messages: int = Field(1024, ge=1, description="messages of one chat, at most")


class EncodeConfig(_Section):
    backend: Literal[
        "auto", "reference", "cpu", "cpu-bf16", "numpy", "triton", "triton-bf16", "triton-int8", "triton-fp8"
    ] = Field(
        "auto",
        description="which implementation encodes; numpy is for a reader that `guard export` made, and no other is",
    )


class ServerConfig(_Section):
    listen: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        ("127.0.0.1:50051",), min_length=1, description="addresses: host:port, or unix:/path for a unix socket"
    )
    metrics: str = Field("127.0.0.1:9464", description="host:port of /metrics; empty turns it off")
    taps: str = Field("", description="where taps connect, best a unix socket; callers must not reach it; empty: none")
    latent_metrics: bool = Field(True, description="count hits by latent (as many series as the pack has latents)")
    tls_certificate: Path | None = Field(None, description="PEM file of the server's certificate chain")
    tls_key: Path | None = Field(None, description="PEM file of the server's private key")
    tls_client_ca: Path | None = Field(None, description="PEM file; given, every client must show a certificate (mTLS)")
    grace_seconds: float = Field(10.0, ge=0, description="time that calls in flight have to end after SIGTERM")


class PolicyConfig(_Section):
    """Where a score turns into an action; a head that is not named keeps the pack's own thresholds."""

    version: str = Field("pack-default", description="shown in every verdict")
    thresholds: dict[str, dict[Literal["flag", "block"], _ThresholdOrNever]] = Field(
        default_factory=dict, description='by head: thresholds."violence.harm" = {flag = 0.5, block = "never"}'
    )


class GuardConfig(_Section):
    pack: Path = Field(default_factory=_default_pack, description="the pack's folder")
    reader: ReaderConfig = ReaderConfig()
    encode: EncodeConfig = EncodeConfig()
    sessions: SessionsConfig = SessionsConfig()
    taps: TapsConfig = TapsConfig()
    prefixes: PrefixesConfig = PrefixesConfig()
    limits: LimitsConfig = LimitsConfig()
    policy: PolicyConfig = PolicyConfig()
    server: ServerConfig = ServerConfig()


def load_config(file: Path | None = None, overrides: dict[str, Any] | None = None) -> GuardConfig:
    """Settings from `file` (TOML), the environment and `overrides` (nested, as in the file; the last word).

    Raises ConfigError naming the file, the key, and what is wrong with it.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"config {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            bad = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
            raise ConfigError(f"config {file}: is not valid UTF-8: {bad}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"config {file}: {error}") from None
    try:
        return GuardConfig(**_merge(values, _environment(), overrides or {}))
    except ValidationError as error:
        raise ConfigError(f"config {file or '(environment and flags)'}: {_explain(error)}") from None


def _environment() -> dict[str, Any]:
    """What the `GUARD_*` variables set, nested like the file. Raises ConfigError naming the variable that is wrong."""
    values: dict[str, Any] = {}
    for name, text in sorted(os.environ.items()):  # GUARD_READER, a whole section, before GUARD_READER__DTYPE
        if not name.startswith("GUARD_") or name == "GUARD_DEBUG" or _OF_KUBERNETES.match(f"{name}={text}"):
            continue
        path = name.removeprefix("GUARD_").lower().split("__")
        given = reduce(lambda inner, key: {key: inner}, reversed(path), _from_json(text))
        unset = not text and name not in _EMPTY_COUNTS
        try:
            GuardConfig.model_validate(given)
        except ValidationError as error:
            if not unset or any(problem["type"] == "extra_forbidden" for problem in error.errors()):
                raise ConfigError(f"environment variable {name}: {_explain(error)}") from None
        if not unset:
            values = _merge(values, given)
    return values


def _from_json(text: str) -> Any:
    """Lists and tables; any other setting is text, which its type reads, and so is an address like `[::1]:50051`."""
    try:
        return json.loads(text) if text.startswith(("[", "{")) else text
    except ValueError:
        return text


def _merge(*layers: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            known = merged.get(key)
            merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{_suggest(problem['loc'])}")
        else:
            lines.append(f"{key}: found {problem['input']!r}: {problem['msg']}")
    return "; ".join(lines)


def _suggest(location: tuple[int | str, ...]) -> str:
    import difflib

    fields: Any = GuardConfig.model_fields
    for part in location[:-1]:
        annotation: Any = fields[str(part)].annotation if str(part) in fields else None
        if not hasattr(annotation, "model_fields"):
            return ""
        fields = annotation.model_fields
    close = difflib.get_close_matches(str(location[-1]), fields, n=1)
    known = ", ".join(fields)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {known}"
