"""Fixtures of the sampling tests."""

import pytest
from sampling_models import TINY, random_lora, random_params

from ip_jax.models.decoder import split_decoder
from ip_jax.models.lora import LoraConfig


@pytest.fixture(scope="session")
def untrained():
    """(graphdef, lora, base) without adapters."""
    return split_decoder(TINY, random_params(TINY))


@pytest.fixture(scope="session")
def two_runs():
    """(graphdef, lora, base) with two adapters."""
    return split_decoder(
        TINY, random_params(TINY), random_lora(TINY, 4, 2), LoraConfig(rank=4, alpha=4.0)
    )
