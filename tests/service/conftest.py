import pytest

from guard.service.client import GuardClient
from tests.service.running import make_config, running
from tests.service.standin import StandIn


@pytest.fixture
def standin():
    return StandIn(make_config())


@pytest.fixture
def server(standin):
    with running(standin.config, standin) as found:
        yield found


@pytest.fixture
def client(server):
    with GuardClient(server.address, timeout_s=10) as found:
        yield found
