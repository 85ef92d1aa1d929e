from collections.abc import Iterator

import hypothesis
import jax
import pytest

# The same examples in every run. A fixture here sets a global switch, the same for each example.
hypothesis.settings.register_profile(
    "stam",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("stam")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
