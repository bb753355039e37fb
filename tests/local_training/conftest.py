"""The clients of these tests."""

import pytest
from step_client import Client, make_client


@pytest.fixture(scope="session")
def mixed() -> Client:
    return make_client([0, 0.3, 0, 0.7, 0])


@pytest.fixture(scope="session")
def smoothed() -> Client:
    return make_client([0.02, 0.02, 0.92, 0.02, 0.02], head_bias=True)
