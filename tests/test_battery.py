"""What holds for every method of the package alike, around an optimizer and, where it can be, behind one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stam_jax import (
    AdmmState,
    Binary,
    BopState,
    LeastSquares,
    PowerOfTwo,
    SplittingState,
    Ternary,
    Uniform,
    quantize,
    quantizers,
    tabulate,
)
from tests import helpers
from tests.methods import AROUND_ONLY, CHAINED, METHODS, STEPS

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_link = pytest.mark.parametrize("method", CHAINED.values(), ids=CHAINED)


def mostly_slow(methods: Any, always: Any) -> Any:
    """Every method, only these always and the others among the slow tests."""
    marks = {name: () if name in always else pytest.mark.slow for name in methods}
    params = [pytest.param(method, marks=marks[name], id=name) for name, method in methods.items()]
    return pytest.mark.parametrize("method", params)


# One for each kind of state.
every_state = mostly_slow(METHODS, ("stam", "admm_quant", "bop"))
any_link = mostly_slow(CHAINED, ("stam",))
every_dtype = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])

# Binary least squares: a planted sign pattern seen through noise, so that no float solution is binary.
rng = np.random.default_rng(0)
INPUTS = rng.normal(size=(128, 16)).astype(np.float32)
SIGNS = np.where(rng.normal(size=(16, 4)) > 0, 1.0, -1.0).astype(np.float32)
BIAS = rng.normal(size=4).astype(np.float32)
TARGETS = INPUTS @ SIGNS + BIAS + rng.normal(size=(128, 4)).astype(np.float32)
START = jax.tree.map(
    jnp.asarray, {"bias": np.zeros(4, np.float32), "kernel": np.float32(0.1 * rng.normal(size=(16, 4)))}
)

SGD = optax.sgd(0.05)
MOMENTUM = optax.sgd(0.05, momentum=0.9)


def loss(params: Any, inputs: Any = INPUTS, targets: Any = TARGETS) -> jax.Array:
    return jnp.sum((inputs @ params["kernel"] + params["bias"] - targets) ** 2) / (2 * len(inputs))


def train(optimizer: optax.GradientTransformation, steps: int) -> Any:
    def step(carry: Any, _: None) -> Any:
        params, state = carry
        return helpers.take_step(optimizer, jax.grad(loss)(params), state, params), None

    return helpers.quick_jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])(
        (START, optimizer.init(START))
    )


NOISE = [
    jax.tree.map(lambda x, k=k: jnp.asarray(np.cos(7 * k + 50 * np.asarray(x))), START) for k in range(6)
]


def steps(optimizer: Any, gradients: Any, start: Any = START) -> Any:
    """Parameters and state after a step along each of the gradients."""
    carry = start, optimizer.init(start)
    for gradient in gradients:
        carry = helpers.take_step(optimizer, gradient, carry[1], carry[0])
    return carry


def is_own(node: Any) -> bool:
    """Whether a node of a state is the method's own, wherever Optax has put it."""
    return isinstance(node, SplittingState | AdmmState | BopState)


def own(state: Any) -> Any:
    """The method's own state."""
    (found,) = (node for node in jax.tree.leaves(state, is_leaf=is_own) if is_own(node))
    return found


def latent(state: Any, params: Any) -> Any:
    """The weights that the next step starts from."""
    kept = getattr(own(state), "latent", None)
    return params if kept is None else params | {"kernel": kept["kernel"]}


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_planted(params: Any) -> None:
    """The network is hard, and its weights are the planted ones."""
    assert_same(quantize(params), params)
    np.testing.assert_array_equal(np.sign(params["kernel"]), SIGNS)
    np.testing.assert_allclose(np.abs(params["kernel"]), 1.0, atol=0.05)
    assert loss(params) < 1.01 * loss({"kernel": SIGNS, "bias": BIAS})


# Around an optimizer.


@every_method
def test_it_finds_the_planted_signs(method):
    assert_planted(train(method(optax.sgd(optax.linear_schedule(0.05, 0.0, STEPS))), STEPS)[0])


@every_state
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_what_is_not_quantized_takes_the_step_of_the_optimizer_exactly(method, dtype):
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    optimizer = optax.chain(optax.add_decayed_weights(0.1), MOMENTUM)
    params, _ = steps(method(optimizer), cast(NOISE[:3]), cast(START))
    alone, _ = steps(
        optimizer, cast([{"bias": noise["bias"]} for noise in NOISE[:3]]), {"bias": cast(START)["bias"]}
    )
    np.testing.assert_array_equal(params["bias"], alone["bias"])
    assert np.all(params["bias"] != 0)


@every_state
def test_jit_changes_nothing(method):
    optimizer = method(MOMENTUM)
    jitted = jax.jit(lambda gradients, state, params: helpers.take_step(optimizer, gradients, state, params))
    eager_carry = jitted_carry = (START, optimizer.init(START))
    for _ in range(3):
        gradients = jax.grad(loss)(eager_carry[0])
        eager_carry = helpers.take_step(optimizer, gradients, eager_carry[1], eager_carry[0])
        jitted_carry = jitted(gradients, jitted_carry[1], jitted_carry[0])
    assert_same(jitted_carry, eager_carry)


def assert_types_are_kept(optimizer: Any, dtype: str) -> Any:
    """A step changes neither the structure nor the types of parameters and state; the first state."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), START)
    before = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, before, params)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    types = lambda tree: [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]
    assert types(after) == types(before)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    return before


def kernel_dtypes(state: Any) -> list[Any]:
    """The dtypes of all that the method, and the optimizer inside it, keep of the quantized leaf."""
    return [leaf.dtype for leaf in jax.tree.leaves(own(state)) if leaf.shape == START["kernel"].shape]


@every_method
@every_dtype
def test_parameters_keep_their_types_and_what_is_kept_of_a_quantized_leaf_is_wide(method, dtype, x64):
    kept = kernel_dtypes(assert_types_are_kept(method(MOMENTUM), dtype))
    assert set(kept) <= {jnp.promote_types(dtype, jnp.float32)}
    # Latent weights, their momentum, or both; stam_proximal keeps neither, and stands behind the optimizer.
    assert bool(kept) == (method is not METHODS["stam_proximal"])


@every_state
def test_two_runs_are_the_same_bit_for_bit(method):
    assert_equal(train(method(MOMENTUM), 50), train(method(MOMENTUM), 50))


@every_state
def test_injected_hyperparameters_can_change_without_a_new_trace(method):
    rates = [0.05 / (k + 1) for k in range(len(NOISE))]
    expected, state = START, method(SGD).init(START)
    for rate, gradient in zip(rates, NOISE, strict=True):
        expected, state = helpers.take_step(method(optax.sgd(rate)), gradient, state, expected)
    around = method(optax.inject_hyperparams(optax.sgd)(learning_rate=0.05))
    outside = optax.inject_hyperparams(lambda learning_rate: method(optax.sgd(learning_rate)))(0.05)
    for optimizer in (around, outside):
        traces = []

        @jax.jit
        def step(state, params, gradient, optimizer=optimizer, traces=traces):
            traces.append(None)
            return helpers.take_step(optimizer, gradient, state, params)

        params, state = START, helpers.begin(optimizer, START)
        for rate, gradient in zip(rates, NOISE, strict=True):
            state = optax.tree.set(state, learning_rate=jnp.asarray(rate))
            params, state = step(state, params, gradient)
        assert_same(params, expected)
        assert len(traces) == 1


@every_state
def test_a_part_of_a_tree_can_be_its_own(method):
    expected, expected_state = steps(method(MOMENTUM), NOISE)
    parts = {"kernel": "quantized", "bias": "float"}
    partitioned = optax.partition({"quantized": method(MOMENTUM), "float": MOMENTUM}, parts)
    masked = optax.chain(
        optax.masked(method(MOMENTUM), {"kernel": True, "bias": False}),
        optax.masked(MOMENTUM, {"kernel": False, "bias": True}),
    )
    nothing_to_quantize = optax.chain(
        optax.masked(MOMENTUM, {"kernel": True, "bias": False}),
        optax.masked(method(MOMENTUM), {"kernel": False, "bias": True}),
    )
    for optimizer in (partitioned, masked):
        params, state = steps(optimizer, NOISE)
        assert_same(params, expected)
        assert_same(latent(state, params), latent(expected_state, expected))
    # The holes of Optax are no mistake, also where they leave nothing to quantize.
    assert_same(steps(nothing_to_quantize, NOISE)[0], steps(MOMENTUM, NOISE)[0])


def assert_two_small_batches_are_one_large_one(optimizer: Any) -> None:
    multiple = optax.MultiSteps(optimizer, 2).gradient_transformation()

    @helpers.quick_jit
    def both(small: Any, large: Any) -> Any:
        """Two small steps and a large one."""
        for rows in (slice(0, 64), slice(64, 128)):
            gradient = jax.grad(loss)(small[0], INPUTS[rows], TARGETS[rows])
            small = helpers.take_step(multiple, gradient, small[1], small[0])
        return small, helpers.take_step(optimizer, jax.grad(loss)(large[0]), large[1], large[0])

    small, large = (START, multiple.init(START)), (START, optimizer.init(START))
    for _ in range(3):
        small, large = both(small, large)
    assert_same((small[0], own(small[1])), (large[0], own(large[1])))


@every_state
def test_two_small_batches_are_one_large_one(method):
    assert_two_small_batches_are_one_large_one(method(MOMENTUM))


@every_state
def test_a_step_that_is_not_finite_changes_nothing(method):
    optimizer = optax.apply_if_finite(method(MOMENTUM), 3)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, NOISE[0])
    params, state = steps(optimizer, [NOISE[0], broken, NOISE[1]])
    expected, expected_state = steps(method(MOMENTUM), NOISE[:2])
    assert_same((params, own(state)), (expected, own(expected_state)))


KEEP_LATENT = {
    name: method
    for name, method in METHODS.items()
    if getattr(own(method(SGD).init(START)), "latent", None) is not None
}


@pytest.mark.parametrize("method", KEEP_LATENT.values(), ids=KEEP_LATENT)
def test_lookahead_does_not_work_as_a_step_starts_from_the_latent_weights(method):
    """Its slow weights are undone by the very next step, which is the one that was due without it."""
    params: Any = optax.LookaheadParams.init_synced(START)
    optimizer: Any = optax.lookahead(method(SGD), sync_period=3, slow_step_size=0.5)
    state = optimizer.init(params)
    for gradient in NOISE[:3]:
        params, state = helpers.take_step(optimizer, gradient, state, params)
    assert_same(params.fast, params.slow)
    before, _ = steps(method(SGD), NOISE[:3])
    assert np.max(np.abs(params.fast["kernel"] - before["kernel"])) > 0.01
    for gradient in NOISE[3:5]:
        params, state = helpers.take_step(optimizer, gradient, state, params)
    assert_same(params.fast["kernel"], steps(method(SGD), NOISE[:5])[0]["kernel"])


@every_method
def test_clipping_and_weight_decay_come_before_it(method):
    """In a chain they see the relaxed weights, as any transform there."""
    chained = optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.3), method(MOMENTUM))
    params, state = START, method(MOMENTUM).init(START)
    for gradient in NOISE[:3]:
        direction = jax.tree.map(lambda g, x: g + 0.3 * x, clipped(gradient), params)
        params, state = helpers.take_step(method(MOMENTUM), direction, state, params)
    assert_same(steps(chained, NOISE[:3])[0], params)


def clipped(gradient: Any) -> Any:
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda g: g / max(norm / 0.5, 1), gradient)


# To admm_quant the gradient is that of a Lagrangian, and the optimizer inside bop sees no quantized leaf.
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("admm_quant", "bop")])
def test_clipping_and_weight_decay_inside_it_see_the_latent_weights(name):
    method = METHODS[name]
    inside = method(optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.3), MOMENTUM))
    params, state = START, method(MOMENTUM).init(START)
    for gradient in NOISE[:3]:
        direction = jax.tree.map(lambda g, v: g + 0.3 * v, clipped(gradient), latent(state, params))
        params, state = helpers.take_step(method(MOMENTUM), direction, state, params)
    assert_same(steps(inside, NOISE[:3])[0], params)


@every_method
def test_functions_of_parameters_map_over_its_state(method):
    optimizer = method(MOMENTUM)
    _, state = steps(optimizer, NOISE[:2])
    doubled = optax.tree.map_params(optimizer, lambda leaf: 2 * leaf, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(doubled), strict=True):
        # Counts are not like parameters; all else that a state keeps is.
        np.testing.assert_array_equal(after, 2 * before if jnp.ndim(before) else before)


UNUSUAL = {
    "none": None,
    "scalar": {"w": jnp.array(2.0)},
    "empty": {"kernel": jnp.zeros((0, 3))},
    "zeros": {"weight": jnp.zeros((4, 2))},
    "ragged": [{"kernel": jnp.ones((2, 3))}, ({"w": jnp.ones(5)}, {"w": jnp.ones((1, 1, 4))}), {}],
    "integers": {"kernel": jnp.zeros((2, 2), jnp.int8)},
    "other": jnp.ones((2, 2)),
}


@every_state
def test_unusual_trees_stay_as_they_are(method):
    def two_steps(tree: Any) -> Any:
        after, state = steps(method(MOMENTUM), [tree, tree], tree)
        return after, state, quantize(after)

    assert [row.path for row in tabulate(UNUSUAL).rows if row.quantizer] == [
        "empty/kernel",
        "ragged/0/kernel",
        "ragged/1/1/w",
        "zeros/weight",
    ]
    after, state, quantized = helpers.quick_jit(two_steps)(UNUSUAL)
    assert jax.tree.structure(after) == jax.tree.structure(UNUSUAL)
    types = lambda tree: jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), tree)
    assert types(after) == types(UNUSUAL)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((after, state, quantized)))
    for nothing in ({}, (), {"none": None}):
        assert steps(method(MOMENTUM), [nothing], nothing)[0] == nothing


def assert_donated(optimizer: Any) -> None:
    step = lambda params, state, gradient: helpers.take_step(optimizer, gradient, state, params)
    params = jax.tree.map(jnp.copy, START)
    state = optimizer.init(params)
    donated = jax.tree.leaves((params, state))
    after = jax.jit(step, donate_argnums=(0, 1))(params, state, NOISE[0])
    assert all(leaf.is_deleted() for leaf in donated)
    assert_same(after, steps(optimizer, NOISE[:1]))


@every_state
def test_parameters_and_state_can_be_donated(method):
    assert_donated(method(MOMENTUM))


@every_state
def test_seeds_under_vmap_are_the_loop_over_seeds(method):
    optimizer = method(MOMENTUM)

    def run(scale: jax.Array) -> Any:
        params, state = steps(optimizer, NOISE[:2], jax.tree.map(lambda leaf: scale * leaf, START))
        return params, state, quantize(params)

    together = helpers.quick_jit(jax.vmap(run))(jnp.array([1.0, 0.5, -2.0]))
    for i, scale in enumerate([1.0, 0.5, -2.0]):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), run(jnp.array(scale)))


@every_method
def test_wrong_calls_say_what_and_where(method):
    optimizer = method(SGD)
    state = optimizer.init(START)
    with pytest.raises(ValueError, match=r"^\w+: the parameters are missing"):
        optimizer.update(NOISE[0], state)
    with pytest.raises(ValueError, match=r"^\w+: updates and params differ at the leaf 'kernel'"):
        optimizer.update({"bias": NOISE[0]["bias"]}, state, START)
    with pytest.raises(ValueError, match=r"^\w+: updates and params differ at the leaf 'head'"):
        optimizer.update(NOISE[0], state, START | {"head": jnp.ones(1)})
    foreign = jax.tree.map(lambda s: optax.EmptyState() if is_own(s) else s, state, is_leaf=is_own)
    with pytest.raises(ValueError, match=r"^\w+: update takes the state of its own init.*EmptyState"):
        optimizer.update(NOISE[0], foreign, START)
    with pytest.raises(ValueError, match=r"^\w+: nothing is quantized.*'bias'"):
        method(SGD).init({"bias": START["bias"]})
    with pytest.raises(ValueError, match=r"^\w+: the pattern 'head' .*no effect"):
        method(SGD, quantizer={"head": None, "*": Binary()}).init(START)
    for quantizer in (Binary, "kernel", {"kernel": Binary}):
        with pytest.raises(TypeError, match=r"^\w+: quantizer"):
            method(SGD, quantizer=quantizer)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "stam_proximal"])
def test_a_learning_rate_in_the_place_of_the_optimizer_is_told(name):
    with pytest.raises(TypeError, match=r"^\w+: optimizer .*0\.05"):
        METHODS[name](0.05)


@pytest.mark.parametrize("name", AROUND_ONLY)
def test_without_the_optimizer_that_it_needs_it_is_told(name):
    with pytest.raises(TypeError, match="optimizer"):
        METHODS[name](None)


# Behind an optimizer, as a link of a chain.


@any_link
def test_as_a_link_it_finds_the_planted_signs_too(method):
    sgd = optax.sgd(optax.linear_schedule(0.05, 0.0, STEPS))
    assert_planted(train(optax.chain(optax.clip_by_global_norm(10.0), sgd, method()), STEPS)[0])


@every_link
def test_behind_an_optimizer_and_around_it_are_the_same_where_it_does_not_see_the_weights(method):
    behind, behind_state = steps(optax.chain(MOMENTUM, method()), NOISE)
    around, around_state = steps(method(MOMENTUM), NOISE)
    assert_equal(behind, around)
    assert_equal(latent(behind_state, behind), latent(around_state, around))


@every_link
@every_dtype
def test_as_a_link_it_keeps_all_types_and_wide_latent_weights(method, dtype, x64):
    kept = kernel_dtypes(assert_types_are_kept(optax.chain(MOMENTUM, method()), dtype))
    assert kept == [jnp.promote_types(dtype, jnp.float32)] * (method in KEEP_LATENT.values())


@any_link
def test_as_a_link_it_can_be_accumulated_for_and_donated(method):
    optimizer = optax.chain(MOMENTUM, method())
    assert_two_small_batches_are_one_large_one(optimizer)
    assert_donated(optimizer)


# Many devices: `test_meshes` calls this in a process that has eight.


QUANTIZERS = (
    Binary(axis=()),
    Binary(group=4),
    Ternary(),
    Uniform(bits=3, axis=()),
    PowerOfTwo(bits=3),
    LeastSquares(axis=()),
    LeastSquares(),
)


def check_sharding(names: Any = METHODS, some_quantizers: Any = QUANTIZERS) -> None:
    """Methods and quantizers, with rows of weights and data spread over eight devices, against one device."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("rows",), ()))
    inputs, targets = (jax.device_put(array, rows) for array in (INPUTS, TARGETS))
    optimizers = {name: METHODS[name](MOMENTUM) for name in names}
    optimizers["chain"] = optax.chain(MOMENTUM, METHODS["stam"]())
    for name, optimizer in optimizers.items():

        @helpers.quick_jit
        def step(params, state, optimizer=optimizer):
            gradients = jax.grad(loss)(params, inputs, targets)
            return helpers.take_step(optimizer, gradients, state, params)

        params = {
            "bias": jax.device_put(START["bias"], whole),
            "kernel": jax.device_put(START["kernel"], rows),
        }
        state = jax.jit(optimizer.init)(params)
        for _ in range(20):
            params, state = step(params, state)
        for leaf in (params["kernel"], *(leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2)):
            assert len({shard.device for shard in leaf.addressable_shards}) == 8
            assert leaf.sharding.is_equivalent_to(rows, 2), f"{name}: {leaf.sharding}"
        expected, expected_state = train(optimizer, 20)
        compare = lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
        jax.tree.map(compare, (params, state), (expected, expected_state))
        jax.tree.map(compare, quantize(params), quantize(expected))
    v = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    for quantizer in some_quantizers:
        project = jax.jit(lambda v, q=quantizer: quantizers.nearest(v, quantizers.levels_of(q, v)))
        spread, alone = project(jax.device_put(v, rows)), project(v)
        np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-6, err_msg=str(quantizer))
