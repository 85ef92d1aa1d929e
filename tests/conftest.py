import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

from tests import helpers

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-users", action="store_true", help="compile with all optimizations, as users do")


def pytest_configure(config: pytest.Config) -> None:
    if CACHE not in os.environ:
        cache = getattr(config, "cache", None)  # Pytest may be told to keep none.
        os.environ[CACHE] = str(cache.mkdir("jax")) if cache else tempfile.mkdtemp()
    # By default only what took a second is kept; here hundreds of small functions add up.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if not config.getoption("as_users"):
        # Most of the time would go into making thousands of small programs fast.
        os.environ |= helpers.quick_compilation()
        jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# The files whose tests take the longest begin, so that no worker is left with one of them at the end.
LONGEST = ("test_results", "test_processes", "test_notebooks", "test_benchmarks", "test_cli", "test_training")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(Path(item.path).stem, len(rank)))


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
