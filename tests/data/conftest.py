"""Datasets that one test registers are not there in the next."""

import pytest

from tests.helpers.datasets import forgotten


@pytest.fixture(autouse=True)
def _forgotten():
    with forgotten():
        yield
