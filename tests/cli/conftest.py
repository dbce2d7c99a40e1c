import io
import sys
from types import SimpleNamespace

import pytest

from guard.cli.main import main
from tests.cli.given import make_pack


@pytest.fixture
def guard(capsys, monkeypatch):
    """Runs `guard` in this process: `guard("check", "text", stdin=b"...")` gives status, out and err.

    `stdin` is bytes or an open binary file; None stands for a terminal.
    """
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("GUARD_DEBUG", raising=False)

    def run(*arguments, stdin=None):
        raw = io.BytesIO(stdin or b"") if stdin is None or isinstance(stdin, bytes) else stdin
        stream = io.TextIOWrapper(raw, encoding="utf-8")
        stream.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        found = capsys.readouterr()
        return SimpleNamespace(status=status, out=found.out, err=found.err)

    return run


@pytest.fixture
def toy(tmp_path):
    """A sound pack on disk, for no model that exists."""
    return make_pack(tmp_path / "toy")
