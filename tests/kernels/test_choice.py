"""Where `triton` cannot run it says so; what the interpreter accepts, the compiler accepts too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guard.errors import ConfigError
from guard.kernels import choice

REPOSITORY = Path(__file__).resolve().parents[2]


def run_without_interpreter(program, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, *program], capture_output=True, text=True, check=False, env=env, cwd=REPOSITORY
    )


def test_triton_without_a_device_is_an_error_and_auto_encodes_on_the_cpu(tmp_path):
    program = """
import sys
from guard.errors import ConfigError
from guard.kernels import choice
print(choice.choose("auto").name, "triton" in sys.modules)
try:
    choice.choose("triton")
except ConfigError as error:
    print(error)
"""
    done = run_without_interpreter(["-c", program], tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "cpu False"
    assert second.startswith("encode.backend: found no CUDA device for triton (torch 2.")
    assert "expected one, or TRITON_INTERPRET=1" in second


def test_triton_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"found no package 'triton', which it runs on, expected pip install"):
        choice.choose("triton")


def test_the_kernel_compiles_for_a_card_that_is_not_here(tmp_path):
    done = run_without_interpreter(["-m", "tests.kernels.compiling"], tmp_path)
    assert (done.returncode, done.stdout) == (0, "OK\n"), done.stderr
