"""Models and batches of `tests/support/families.py`; a test that takes `family` runs once for each family."""

from types import SimpleNamespace

import pytest
from families import CONFIGS, VOCAB, packed, padded, records, tiny_policy


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(CONFIGS))


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The makers of that file."""
    return SimpleNamespace(
        vocab=VOCAB, configs=CONFIGS, policy=tiny_policy, records=records, padded=padded, packed=packed
    )
