"""Where the server listens: addresses, TLS files, and what is said when one of them cannot be had."""

import contextlib
import re
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from guard.config import ServerConfig
from guard.errors import ConfigError

_UNIX = ("server.listen", "server.taps")  # what may be a unix socket
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^:\[\]/\s]+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens, with the ports that were found for port 0. What is off is empty."""

    grpc: tuple[str, ...]
    metrics: str
    taps: str = ""


def split_host_port(key: str, address: str) -> tuple[str, int]:
    """`127.0.0.1:80` or `[::1]:80`; brackets are taken off. Raises ConfigError naming `key`."""
    match = _HOST_PORT.fullmatch(address)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(f"{key}: found {address!r}, expected host:port" + (" or unix:/path" * (key in _UNIX)))
    return match[1].strip("[]"), int(match[2])


def unix_path(address: str) -> Path | None:
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None


def clear_stale_socket(address: str, path: Path, key: str = "server.listen") -> None:
    """grpc deletes whatever socket it finds, a living server's too: so look first. Raises ConfigError."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{key}: {address}: {error.strerror}") from None
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{key}: {address}: found a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ConfigError(f"{key}: {address}: {error.strerror or error}") from None
    raise ConfigError(f"{key}: {address}: Address already in use")


def check_server(server: ServerConfig) -> None:
    """Raises ConfigError for an address that cannot be listened on, and for TLS files that cannot be used."""
    credentials(server)
    taps = [("server.taps", server.taps)] if server.taps else []
    for key, address in [*(("server.listen", address) for address in server.listen), *taps]:
        path = unix_path(address)
        if path is not None:
            clear_stale_socket(address, path, key)
        if reason := why_not(key, address):
            raise ConfigError(f"{key}: {address}: {reason}")
    if server.metrics and (reason := why_not("server.metrics", server.metrics)):
        raise ConfigError(f"server.metrics: {server.metrics}: {reason}")


def why_not(key: str, address: str) -> str:
    """The reason why nothing can listen there; empty where something can. Raises ConfigError naming `key`."""
    path = unix_path(address) if key in _UNIX else None
    if path is not None:
        if not path.parent.is_dir():
            return f"no such folder: {path.parent}"
        candidates: list[tuple[int, Any]] = [(socket.AF_UNIX, str(path))]
    else:
        host, port = split_host_port(key, address)
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            return error.strerror or str(error)
        candidates = [(info[0], info[4]) for info in infos]
    reasons = []
    for family, where in candidates:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                probe.listen()
        except OSError as error:
            reasons.append(error.strerror or str(error))
            continue
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
        return ""  # one of a name's addresses is enough
    return reasons[0]


def credentials(server: ServerConfig) -> Any | None:
    """grpc.ServerCredentials, or None without TLS. Raises ConfigError naming the setting and the file."""
    files = {key: getattr(server, key) for key in ("tls_certificate", "tls_key", "tls_client_ca")}
    if not any(files.values()):
        return None
    for key in ("tls_certificate", "tls_key"):
        if files[key] is None:
            given = next(other for other, file in files.items() if file)
            raise ConfigError(f"server.{key}: found none, expected a PEM file, as server.{given} is set")
    pem = {key: _read(key, file) for key, file in files.items() if file}
    try:  # grpc would only say so when the first caller fails
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            files["tls_certificate"], files["tls_key"], password=lambda: ""
        )
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(
            f"server.tls_certificate {files['tls_certificate']}, server.tls_key {files['tls_key']}: "
            f"found no pair of PEM certificate and unencrypted key: {reason}"
        ) from None
    if files["tls_client_ca"]:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(files["tls_client_ca"])
        except ssl.SSLError:
            raise ConfigError(f"server.tls_client_ca: {files['tls_client_ca']}: found no PEM certificate") from None
    return grpc.ssl_server_credentials(
        [(pem["tls_key"], pem["tls_certificate"])],
        root_certificates=pem.get("tls_client_ca"),
        require_client_auth="tls_client_ca" in pem,
    )


def _read(key: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"server.{key}: {file}: {error.strerror}") from None
