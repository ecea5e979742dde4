"""What several tests of the gateway share."""

from collections.abc import Iterator

import httpx
import pytest

from store.settings import Settings
from tests.end_to_end.test_power_loss import gateway


@pytest.fixture(scope="session")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, httpx.Client, Settings]]:
    """Two gateways of one home, and neither worker nor model server."""
    settings = Settings(home=tmp_path_factory.mktemp("lone"), model_server="127.0.0.1:9")
    with gateway(settings) as one, gateway(settings) as other:
        yield one, other, settings
