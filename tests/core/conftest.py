import jax
import pytest


@pytest.fixture(autouse=True)
def float64():
    """Mathematics is tested in double precision."""
    with jax.enable_x64(True):
        yield
