"""What a caller gives on the command line, on stdin and in files, as records."""

import codecs
import fcntl
import json
import os
import stat
import sys
import termios
from pathlib import Path
from typing import Any, BinaryIO

from guard.errors import InvalidInput
from guard.records import Message, Role


def decode(raw: bytes, where: str) -> str:
    """Raises InvalidInput naming the first bad byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{where} is not valid UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}",
            reason="INVALID_UNICODE",
        ) from None


def stdin() -> BinaryIO:
    """Raises InvalidInput where it is closed."""
    if sys.stdin is None:
        raise InvalidInput("stdin is closed: nothing can be read from it", reason="EMPTY_TEXT")
    return sys.stdin.buffer


def at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def stdin_text() -> str:
    """All of stdin, without the line end that a shell puts behind it."""
    return decode(stdin().read(), "stdin").removesuffix("\n").removesuffix("\r")


def text_waits_on_stdin() -> bool:
    """Whether stdin is a pipe that holds something now. Takes none of it."""
    try:
        pipe = stdin().fileno()
    except (InvalidInput, OSError):
        return False
    return stat.S_ISFIFO(os.fstat(pipe).st_mode) and any(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))


def chat(file: Path) -> tuple[Message, ...]:
    """A JSON list of `{"role", "content"}`; `-` reads stdin. Other keys of a message are ignored."""
    where = "chat (stdin)" if str(file) == "-" else f"chat {file}"
    raw = stdin().read() if str(file) == "-" else file.read_bytes()
    try:
        values = json.loads(decode(raw.removeprefix(codecs.BOM_UTF8), where))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, list):
        raise InvalidInput(f"{where}: found {kind(values)}, expected a list of {{role, content}}")
    if not values:
        raise InvalidInput(f"{where}: found an empty list, expected at least one message", reason="EMPTY_TEXT")
    return tuple(_message(value, f"{where}: message {index}") for index, value in enumerate(values))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: found {kind(value)}, expected an object with role and content")
    for key in ("role", "content"):
        if key not in value:
            raise InvalidInput(f"{where}: found no {key!r}, expected role and content")
        if not isinstance(value[key], str):
            raise InvalidInput(f"{where}: {key}: found {kind(value[key])}, expected a string")
    try:
        role = Role(value["role"])
    except ValueError:
        known = ", ".join(role.value for role in Role)
        raise InvalidInput(f"{where}: role: found {value['role']!r}, expected one of {known}") from None
    return Message(role, value["content"])


def kind(value: Any) -> str:
    """The JSON type of `value`, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
