"""What every test shares: the event loop that async tests run on, and that no example has a time limit."""

import pytest
from hypothesis import settings

# How long one example takes says how busy the machine is: pytest's deadline is the bound.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as the gateway does."""
    return "asyncio"
