import os
import tempfile
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


# What one test has compiled, the others and the command lines they drive need not compile again, nor need the
# next run of the tests: it lies with the cache of pytest, and goes with `pytest --cache-clear`.
CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    if CACHE not in os.environ:
        cache = getattr(config, "cache", None)  # Pytest may be told to keep none.
        os.environ[CACHE] = str(cache.mkdir("jax")) if cache else tempfile.mkdtemp()
    # By default only what took a second is kept; here hundreds of small functions add up.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if config.getoption("markexpr") == "not slow":
        # Most of the time would go into making thousands of small programs fast. The slow tests compile as
        # users do.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)
        # XLA's older way to compile on a CPU takes two thirds of the time.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
