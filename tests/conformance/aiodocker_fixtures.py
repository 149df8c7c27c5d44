"""What aiodocker's own conftest gives its network tests, without what its other tests need (registries, engines)."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest
from aiodocker.docker import Docker


@pytest.fixture
async def docker() -> AsyncIterator[Docker]:
    client = Docker()
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
def random_name() -> str:
    return "aiodocker-" + secrets.token_hex(4)
