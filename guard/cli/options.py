"""Options that several commands share, and the settings that come out of them."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli import exits
from guard.records import CheckOptions

if TYPE_CHECKING:
    from guard.config import GuardConfig
    from guard.service.client import GuardClient


class UsageError(typer.TyperException):
    """A command line that makes no sense: exit status 2."""

    exit_code = exits.USAGE


ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings, a TOML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one setting, such as reader.dtype=bfloat16. May be repeated."
    ),
]
PackFolder = Annotated[Path | None, typer.Option("--pack", metavar="PATH", help="The pack's folder.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT|unix:/PATH",
        help="Ask a running `guard serve` there, and load no model here.",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", metavar="PEM", help="With --address: use TLS, and trust what this CA signed."),
]
TlsCertificate = Annotated[
    Path | None, typer.Option("--tls-cert", metavar="PEM", help="With --address: our own certificate (mTLS).")
]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", metavar="PEM", help="The private key of --tls-cert.")]
Domain = Annotated[
    list[str] | None, typer.Option("--domain", metavar="D", help="Only this domain. May be repeated. Default: all.")
]
Attributions = Annotated[
    int,
    typer.Option("--attributions", metavar="N", min=0, max=100, help="Named features in the answer, for each head."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON (the proto3 JSON mapping, proto field names).")]


def settings(
    file: Path | None = None, sets: list[str] | None = None, pack: Path | None = None, **server: Any
) -> "GuardConfig":
    """The effective settings. Raises UsageError for a malformed `--set`, ConfigError for what it sets."""
    from guard.config import load_config

    overrides: dict[str, Any] = {}
    for given in sets or []:
        _put(overrides, _assignment(given))
    if pack is not None:
        overrides["pack"] = pack
    if named := {key: value for key, value in server.items() if value is not None}:
        _put(overrides, {"server": named})
    return load_config(file, overrides)


def check_options(domains: list[str] | None, attributions: int, *, tokens: bool, request_id: str = "") -> CheckOptions:
    return CheckOptions(tuple(domains or ()), attributions, tokens, request_id)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A running `guard serve`, and what it takes to talk to it. `timeout_s` is the deadline of an answer, if any."""

    address: str
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    timeout_s: float | None = None

    def connect(self) -> "GuardClient":
        """Raises ConfigError naming a file that cannot be read."""
        from guard.service.client import GuardClient

        return GuardClient(
            self.address,
            tls_ca=self.tls_ca,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            timeout_s=self.timeout_s,
        )


OF_CLIENTS = ("reader.queue_size",)  # settings that say how a sidecar is asked: rows on their way at once


def sidecar(
    address: str | None,
    pack: Path | None,
    config: Path | None,
    sets: Sequence[str] | None,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    timeout_s: float | None = None,
) -> Sidecar | None:
    """The sidecar to ask, or None where a model is loaded here. Raises UsageError for options at odds."""
    if address is None:
        remote = {"--tls-ca": tls_ca, "--tls-cert": tls_certificate, "--tls-key": tls_key, "--timeout": timeout_s}
        for name, value in remote.items():
            if value is not None:
                raise UsageError(f"{name} has no effect without --address")
        return None
    if not address.strip():
        raise UsageError(f"--address: found {address!r}, expected HOST:PORT or unix:/PATH")
    if pack:
        raise UsageError("--pack has no effect with --address: the sidecar has its own pack")
    foreign = [given for given in sets or () if given.partition("=")[0].strip() not in OF_CLIENTS]
    if config or foreign:
        name = "--config" if config else f"--set {foreign[0]}"
        raise UsageError(f"{name} has no effect with --address: the sidecar has its own settings")
    if (tls_certificate is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together: give both")
    return Sidecar(address, tls_ca, tls_certificate, tls_key, timeout_s)


def _assignment(given: str) -> dict[str, Any]:
    """`a.b=value` as nested settings. The value is TOML where it parses as TOML, else a string."""
    key, equals, value = given.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set: found {given!r}, expected KEY=VALUE, such as reader.dtype=bfloat16")
    text = json.dumps(value)
    for literal in (text,) if _means_text(key) else (value, text):
        try:
            parsed = tomllib.loads(f"{key}={literal}")
        except tomllib.TOMLDecodeError:
            continue
        if len(parsed) == 1 and _plain(parsed):
            return parsed
    raise UsageError(f"--set: found the key {key!r}, expected a dotted name, such as reader.dtype")


def _means_text(key: str) -> bool:
    """Whether the setting is a string, so that `--set policy.version=2.10` is no number."""
    from guard.config import GuardConfig

    model: Any = GuardConfig
    for part in key.split("."):
        field = getattr(model, "model_fields", {}).get(part.strip())
        model = field.annotation if field is not None else None
    return model is str


def _plain(value: Any) -> bool:
    """Dates are TOML too, but no setting is one: `--set policy.version=2026-01-01` means a string."""
    if isinstance(value, dict):
        return all(_plain(part) for part in value.values())
    return isinstance(value, (str, int, float, bool, list))


def _put(into: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _put(into[key], value)
        else:
            into[key] = value
