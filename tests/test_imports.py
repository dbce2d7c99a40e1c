"""The ground floor stays light at run time too: import-linter reads what a file says, not what an import brings along."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "grpc"}


@pytest.mark.parametrize(
    "module",
    [
        "guard.errors",
        "guard.records",
        "guard.config",
        "guard.pack.manifest",
        "guard.pack.loader",
        "guard.assessor",
        "guard.kernels.arrays",
        "guard.reader.onnx",
    ],
)
def test_import_brings_neither_torch_nor_grpc(module):
    program = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
