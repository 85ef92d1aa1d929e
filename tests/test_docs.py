"""The page of methods keeps its word."""

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
from stam_jax import quantized_leaves
from stam_jax._groups import Groups
from tests.methods import METHODS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "methods.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)

PARAMS = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}

# What stands in the first column of a row, and what it builds.
ROWS = {
    "`stam(lr, penalty=rho)` (proximal)": ["proximal"],
    "`stam(lr)` (inertial)": ["default", "inertial"],
    "`binary_connect`": ["binary_connect"],
    "`binary_relax`": ["binary_relax"],
    "`prox_quant`": ["prox_quant"],
    "`parq`": ["parq"],
    "`md_tanh`": ["md_tanh"],
    "`straight_through`": ["straight_through", "straight_through_clipped"],
    "`admm_quant`": ["admm_quant"],
    "`bop`": ["bop"],
}
BUILDS = [(row, method) for row, methods in ROWS.items() for method in methods]


def table(first):
    """The table whose first column has that head: by first cell, each row's cells by their heads."""
    lines = PAGE[PAGE.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in rows}


def in_code(text):
    """What stands between the first two backticks."""
    return re.findall(r"`(.+?)`", text)[0]


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_every_example_runs(block):
    exec(BLOCKS[block], {})


def test_there_is_an_example_of_each_kind():
    uses = ("def project", "def at", "optax.scale_by_adam")
    assert [sum(use in block for block in BLOCKS) for use in uses] == [1, 1, 1]


def test_every_method_has_a_row():
    transforms = {name for name in stam_jax.__all__ if "GradientTransformation" in annotated_return(name)}
    methods = transforms - {"trace_diagnostics"}  # A wrapper around any of them.
    assert {in_code(row).split("(")[0] for row in table("method")} == methods
    assert set(table("method")) == set(ROWS)


def annotated_return(name):
    return str(getattr(getattr(stam_jax, name), "__annotations__", {}).get("return", ""))


def test_every_quantiser_has_a_row_that_says_its_bits():
    rows = table("quantiser")
    quantizers: dict[str, Any] = {
        name: thing
        for name in stam_jax.__all__
        if isinstance(thing := getattr(stam_jax, name), type) and issubclass(thing, Groups)
    }
    assert {in_code(row) for row in rows} == set(quantizers)
    for row, cells in rows.items():
        few, *most = map(int, cells["bits"].split(" to "))
        quantizer = quantizers[in_code(row)]
        if not most:
            assert quantizer().bits == few
            continue
        for bits in (few, *most):
            assert quantizer(bits=bits).bits == bits
        for bits in (few - 1, most[0] + 1):
            with pytest.raises(ValueError, match="bits"):
                quantizer(bits=bits)


@pytest.mark.parametrize(("row", "method"), BUILDS)
def test_the_state_is_as_large_as_the_table_says(row, method):
    state = METHODS[method](0.1).init(PARAMS)
    arrays = [
        leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 0
    ]
    copies = sum(leaf.size for leaf in arrays) / PARAMS["kernel"].size
    assert copies == float(table("method")[row]["state, in copies"])


@pytest.mark.parametrize(("row", "method"), BUILDS)
def test_the_default_quantiser_is_the_one_in_the_table(row, method):
    state = METHODS[method](0.1).init(PARAMS)
    cell = in_code(table("method")[row]["default quantiser"])
    assert quantized_leaves(state, PARAMS)["kernel"].quantizer == eval(cell, vars(stam_jax).copy())


@pytest.mark.parametrize("name", ["binary_connect", "prox_quant"])
def test_the_box_in_the_table_is_the_default(name):
    width = float(table("method")[f"`{name}`"]["constraint"].removeprefix("box of half-width "))
    optimizer = METHODS[name](1.0)
    state = optimizer.init(PARAMS)
    updates, state = optimizer.update({"kernel": -PARAMS["kernel"], "bias": PARAMS["bias"]}, state, PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    np.testing.assert_array_equal(quantized_leaves(state, after)["kernel"].latent, width)


def test_the_script_draws_the_picture_of_the_page(tmp_path):
    picture = re.findall(r"!\[.+?\]\((.+?)\)", PAGE)[0]
    script = re.findall(r"`python docs/(.+?)`", PAGE)[0]
    runpy.run_path(str(DOCS / script))["draw"](tmp_path / picture)
    for path in (tmp_path / picture, DOCS / picture):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert 50_000 < path.stat().st_size < 400_000


def test_the_picture_has_every_relaxation_soft_at_first_and_hard_at_last():
    script = runpy.run_path(str(DOCS / "relaxations.py"))
    quantizer, w = stam_jax.Ternary(scale=None), jnp.linspace(-2, 2, 100)
    y = quantizer.project(w)
    first, *_, last = script["STAGES"]
    for name, (relaxation, *_) in script["PANELS"].items():
        assert name in stam_jax.__all__
        start, end = (relaxation.at(stage)(w, y, lambda: quantizer.levels(w)) for stage in (first, last))
        assert jnp.array_equal(start, y) == (name == "Hard")
        np.testing.assert_array_equal(end, y)
