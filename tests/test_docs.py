"""The pages on methods and quantizers keep their word."""

import inspect
import math
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stam_jax
from stam_jax._packed import layout
from stam_jax.quantizers import Shared, levels_of, nearest
from tests.methods import METHODS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "methods.md").read_text()
QUANTIZED = (DOCS / "quantized.md").read_text()

PARAMS = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
SGD = optax.sgd(0.1)
# Rows of the table, by what tests.methods calls them where it has several of one.
ROWS = {
    name: name.removesuffix("_clipped")
    for name in METHODS
    if name not in ("home_made", "three_block_splitting")
}


def table(page, first):
    """The table of a page that begins so: each row by the code in its first cell."""
    lines = page[page.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {in_code(cells[0]): dict(zip(head, cells, strict=True)) for cells in rows}


def in_code(text):
    """What stands between the first two backticks."""
    return re.findall(r"`(.+?)`", text)[0]


METHOD_ROWS = table(PAGE, "method | inertia")


def test_every_method_has_a_row_and_a_section():
    returns = lambda name: str(inspect.get_annotations(getattr(stam_jax, name)).get("return", ""))
    methods = {
        name
        for name in stam_jax.__all__
        if callable(getattr(stam_jax, name)) and "GradientTransformation" in returns(name)
    }
    assert set(METHOD_ROWS) == methods - {"three_block_splitting"}
    for method in METHOD_ROWS:
        assert f"\n## {method}\n" in PAGE


def test_every_quantizer_has_a_row_that_says_its_bits():
    rows = table(QUANTIZED, "quantizer | values")
    quantizers: dict[str, Any] = {
        name: thing
        for name in stam_jax.__all__
        if isinstance(thing := getattr(stam_jax, name), type) and issubclass(thing, Shared)
    }
    assert set(rows) == set(quantizers)
    for name, cells in rows.items():
        few, *most = map(int, cells["bits"].split(" to "))
        if not most:
            assert layout(quantizers[name](), (8, 4)).bits == few
            continue
        for bits in range(few, most[0] + 1):
            assert layout(quantizers[name](bits=bits), (8, 4)).bits == bits
        for bits in (few - 1, most[0] + 1):
            with pytest.raises(ValueError, match="bits"):
                quantizers[name](bits=bits)


@pytest.mark.parametrize("method", ROWS)
def test_the_state_is_as_large_as_the_table_says(method):
    optimizer = METHODS[method](SGD)
    arrays = [leaf for leaf in jax.tree.leaves(optimizer.init(PARAMS)) if jnp.shape(leaf)]
    assert all(leaf.dtype == jnp.float32 for leaf in arrays)
    copies = sum(leaf.size for leaf in arrays) / PARAMS["kernel"].size
    assert copies == float(METHOD_ROWS[ROWS[method]]["copies of the weights in the state"])


@pytest.mark.parametrize("method", sorted(set(ROWS.values())))
def test_the_defaults_are_those_of_the_table(method):
    defaults = inspect.signature(getattr(stam_jax, method)).parameters
    cells = METHOD_ROWS[method]
    assert defaults["quantizer"].default == eval(in_code(cells["default quantizer"]), vars(stam_jax).copy())


def test_the_state_of_the_general_iteration_is_none_without_inertia():
    for inertia, copies in ((0, 0), (0.0, 0), (0.5, 1), (1, 1)):
        optimizer = stam_jax.three_block_splitting(
            SGD,
            quantizer=stam_jax.Binary(),
            relaxation=stam_jax.relaxations.SquaredDistance(math.inf),
            inertia=inertia,
        )
        sizes = [leaf.size for leaf in jax.tree.leaves(optimizer.init(PARAMS)) if leaf.ndim]
        assert sum(sizes) == copies * PARAMS["kernel"].size


def test_the_script_draws_the_picture_of_the_page(tmp_path):
    picture = re.findall(r"!\[.+?\]\((.+?)\)", PAGE)[0]
    script = re.findall(r"`python docs/(.+?)`", PAGE)[0]
    runpy.run_path(str(DOCS / script))["draw"](tmp_path / picture)
    for path in (tmp_path / picture, DOCS / picture):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_every_relaxation_soft_at_first_and_hard_at_last():
    script = runpy.run_path(str(DOCS / "relaxations.py"))
    w = jnp.linspace(-2, 2, 100)
    levels = levels_of(stam_jax.Ternary(axis=(), scale=1.0), w)
    y = nearest(w, levels)
    first, *_, last = script["STAGES"]
    maps = {
        name
        for name, thing in vars(stam_jax.relaxations).items()
        if isinstance(thing, type) and hasattr(thing, "at")
    }
    assert set(script["PANELS"]) == maps - {"Relaxation", "HardFrom"}
    for name, (relaxation, *_) in script["PANELS"].items():
        start, end = (relaxation.at(stage)(w, y, levels) for stage in (first, last))
        assert jnp.array_equal(start, y) == (name == "Hard")
        np.testing.assert_array_equal(end, y)
