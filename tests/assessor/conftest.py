"""The real reader over the shipped pack."""

import threading
from contextlib import contextmanager

import pytest

from guard.assessor import Assessor
from guard.config import load_config
from tests.conftest import PACK


@pytest.fixture(scope="session")
def loading():
    """Opens an assessor with settings of its own, such as `reader={...}`, for a `with` block."""

    @contextmanager
    def load(observer=None, **sections):
        assessor = Assessor.load(load_config(overrides={"pack": str(PACK), **sections}), observer=observer)
        try:
            yield assessor
        finally:
            assessor.close()

    return load


@pytest.fixture(scope="session")
def narrow(loading):
    """Reads 64 tokens at once, so that a page of text crosses many windows."""
    with loading(reader={"window": 64, "overlap": 16}) as loaded:
        yield loaded


class Gate:
    """Holds the model at its door until opened, and counts what passes."""

    def __init__(self):
        self._open, self.arrived, self.passed = threading.Event(), threading.Event(), 0

    def __call__(self, *_):
        self.arrived.set()
        assert self._open.wait(30)
        self.passed += 1

    def open(self):
        self._open.set()


@pytest.fixture
def hooked():
    """Puts a torch forward hook on a layer below every hook point, for a `with` block: `(assessor, hook, layer=5)`."""

    @contextmanager
    def attach(assessor, hook, layer=5):
        handle = assessor.pipeline.reader._model.get_submodule(f"model.layers.{layer}").register_forward_hook(hook)
        try:
            yield hook
        finally:
            handle.remove()

    return attach


@pytest.fixture
def gated(hooked):
    """In a `with` block, batches wait in the model until its `gate.open()`, or the end of the block."""

    @contextmanager
    def attach(assessor):
        gate = Gate()
        with hooked(assessor, gate):
            try:
                yield gate
            finally:
                gate.open()

    return attach
