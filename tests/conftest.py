"""The real model and the shipped pack, loaded once. `make test` fetches the weights first."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported, and transformers may import it before any test of ours does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests speak to servers of their own; a proxy is for whatever fetches from elsewhere.
os.environ["no_proxy"] = ",".join(["127.0.0.1,localhost", *filter(None, [os.environ.get("no_proxy")])])

from guard.reader import weights

REPOSITORY = Path(__file__).resolve().parent.parent
PACK = REPOSITORY / "detectors" / "smollm2-135m-instruct" / "safety-residual"


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return weights.resolve(weights.DEFAULT_MODEL)


@pytest.fixture(scope="session")
def config():
    from guard.config import load_config

    return load_config(overrides={"pack": str(PACK)})


@pytest.fixture(scope="session")
def assessor(config) -> Iterator["object"]:
    from guard.assessor import Assessor

    loaded = Assessor.load(config)
    yield loaded
    loaded.close()
