"""Settings: defaults, then a TOML file, then `GUARD_*` environment variables, then command-line flags. No torch.

Every key is declared here once; a key that is not is refused by name.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from guard.errors import ConfigError

DEFAULT_PACK = Path("detectors/smollm2-135m-instruct/safety-residual")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReaderConfig(_Section):
    """The model that Guard runs itself."""

    model: str = Field("smollm2-135m-instruct", description="a Hugging Face folder, or the default model's name")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="float32 is exact; bfloat16 is faster where the processor has it"
    )
    threads: int = Field(0, ge=0, description="CPU threads; 0 takes every core of this process")
    window: int = Field(1024, ge=16, description="tokens read at once; longer text is read in overlapping windows")
    overlap: int = Field(128, ge=0, description="tokens that a window shares with the one before it")
    batch_tokens: int = Field(2048, ge=16, description="padded tokens in one batch, at most")
    queue_size: int = Field(256, ge=1, description="requests that may wait; one more is refused at once")
    allow_unverified: bool = Field(False, description="run a model that the pack was not made for, and say so")


class SessionsConfig(_Section):
    """Open streams, each with a key-value cache."""

    limit: int = Field(64, ge=1, description="open streams at most; one more is refused at once")
    idle_seconds: float = Field(300.0, gt=0, description="a stream idle for longer is closed")


class LimitsConfig(_Section):
    text_bytes: int = Field(1_048_576, ge=1, description="UTF-8 bytes of one request's text, at most")
    messages: int = Field(1024, ge=1, description="messages of one chat, at most")


class EncodeConfig(_Section):
    backend: Literal["auto", "reference", "cpu"] = Field("auto", description="which implementation encodes")


class ServerConfig(_Section):
    listen: tuple[str, ...] = Field(
        ("127.0.0.1:50051",), description="addresses: host:port, or unix:/path for a unix socket"
    )
    metrics: str = Field("127.0.0.1:9464", description="host:port of /metrics; empty turns it off")
    latent_metrics: bool = Field(True, description="count hits by latent (as many series as the pack has latents)")
    tls_certificate: Path | None = Field(None, description="PEM file of the server's certificate chain")
    tls_key: Path | None = Field(None, description="PEM file of the server's private key")
    tls_client_ca: Path | None = Field(None, description="PEM file; given, every client must show a certificate (mTLS)")
    grace_seconds: float = Field(10.0, ge=0, description="time that calls in flight have to end after SIGTERM")


class PolicyConfig(_Section):
    """Where a score turns into an action; a head that is not named keeps the pack's own thresholds."""

    version: str = Field("pack-default", description="shown in every verdict")
    thresholds: dict[str, dict[Literal["flag", "block"], Annotated[float, Field(ge=0, le=1)] | None]] = Field(
        default_factory=dict, description='by head: thresholds."violence.harm" = {flag = 0.5, block = 0.9}'
    )


class GuardConfig(BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="GUARD_", env_nested_delimiter="__", env_ignore_empty=True
    )

    pack: Path = Field(DEFAULT_PACK, description="the pack's folder")
    reader: ReaderConfig = ReaderConfig()
    encode: EncodeConfig = EncodeConfig()
    sessions: SessionsConfig = SessionsConfig()
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
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config {file}: {error.strerror}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"config {file}: {error}") from None
    try:
        return GuardConfig(**_merge(values, _environment(), overrides or {}))
    except ValidationError as error:
        raise ConfigError(_explain(file, error)) from None


def _environment() -> dict[str, Any]:
    """What the `GUARD_*` variables set, nested like the file."""
    from pydantic_settings import EnvSettingsSource

    return dict(EnvSettingsSource(GuardConfig)())


def _merge(*layers: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            known = merged.get(key)
            merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _explain(file: Path | None, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{_suggest(problem['loc'])}")
        else:
            lines.append(f"{key}: found {problem['input']!r}: {problem['msg']}")
    return f"config {file or '(environment and flags)'}: " + "; ".join(lines)


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
