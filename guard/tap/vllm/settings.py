"""What `--additional-config '{"guard": {...}}'` may say. The whole of it enters vLLM's key of compiled graphs."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import ConfigError

KEY = "guard"
NOTED = "hook_points"  # within it, written by checks.note_hook_points


class TapSettings(BaseModel):
    """The one setting that turns the tap on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack: Path = Field(description="the pack's folder")
    taps: str = Field(min_length=1, description="where the sidecar takes taps: unix:/path or host:port")
    backend: str = Field("auto", description="which implementation encodes, as the setting encode.backend")
    stop: bool = Field(True, description="end a blocked request in the engine; else only its caller can")
    gather: int = Field(
        8, strict=True, ge=1, le=64, description="tokens of a running answer that are read together at most"
    )
    store_mib: int = Field(
        512, strict=True, ge=0, description="memory of the hits of cached prefixes at most; 0 keeps none"
    )
    allow_unverified: bool = Field(False, description="serve a model that the pack was not made for")
    allow_untested: bool = Field(False, description="run on versions and layouts that the tap was not tested with")


def read(additional_config: Any) -> TapSettings | None:
    """The tap's settings; None where the engine is started without. Raises ConfigError naming the key."""
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    given = additional_config[KEY]
    if not isinstance(given, dict):
        raise ConfigError(f"additional_config.{KEY}: found {given!r}, expected an object with pack and taps")
    own = {key: value for key, value in given.items() if key != NOTED}
    try:
        return TapSettings(**own)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(TapSettings.model_fields)
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"additional_config.{KEY}.{key}: found an unknown key, expected one of {known}") from None
        if first["type"] == "missing":
            raise ConfigError(f"additional_config.{KEY}.{key}: found nothing, expected a value") from None
        raise ConfigError(f"additional_config.{KEY}.{key}: found {first['input']!r}: {first['msg']}") from None
