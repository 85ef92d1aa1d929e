"""The state of every transform here, and the walk over the leaves that one step is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stam_jax import _trees
from stam_jax.quantizers import Quantizer
from stam_jax.selection import Selection, select

Mask = Any | Callable[[Any], Any]

# What moves one quantised leaf: (quantiser, x, memory, d) -> (update of x, memory).
Move = Callable[[Quantizer, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


@jax.tree_util.register_static
class Assigned(optax.MaskedNode):
    """The quantiser of one leaf, or None where it stays in float: a hole that remembers.

    It has no leaves, so jit sees the quantiser as static; and it is an `optax.MaskedNode`, so whatever passes
    over the holes of a state, as the `is_leaf` of `optax.tree.map_params` does, passes over it too.
    """

    quantizer: Quantizer | None

    def __new__(cls, quantizer: Quantizer | None) -> "Assigned":
        self = super().__new__(cls)
        self.quantizer = quantizer
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assigned) and self.quantizer == other.quantizer

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.quantizer)

    def __repr__(self) -> str:
        return f"Assigned({self.quantizer!r})"

    def __reduce__(self) -> tuple[type["Assigned"], tuple[Quantizer | None]]:
        return Assigned, (self.quantizer,)


class StamState(NamedTuple):
    """The state of `stam` and of the other transforms here.

    Args:
        count: the steps taken so far, an int32 scalar.
        latent: the float block v that is projected, in float32 at least, in a tree like the parameters with
            an `optax.MaskedNode` at each leaf that is not quantised; None where v is x, the parameters
            themselves.
        quantizers: a tree like the parameters with an `Assigned` at each leaf.
    """

    count: jax.Array
    latent: Any
    quantizers: Any


def begin(
    where: str,
    params: Any,
    *,
    mask: Mask | None,
    quantizer: Quantizer,
    probe: Callable[[Quantizer, jax.Array], Any] | None = None,
    memory: Callable[[jax.Array], jax.Array] | None,
) -> StamState:
    """The state before the first step, where v is x.

    Args:
        where: the name of the transform, for errors.
        params: the parameters.
        mask: which leaves are quantised; see `stam`.
        quantizer: of those leaves.
        probe: what else each of those leaves must go through, tried on shapes alone.
        memory: what makes the array that the state holds for each of those leaves; None for none.

    Raises:
        ValueError, TypeError: as `stam`.
    """
    chosen = _chosen(where, mask, params)

    def assign(name: str, leaf: jax.Array) -> Assigned:
        if not chosen[name]:
            return Assigned(None)
        _check_fitting(where, quantizer, probe, name, leaf)
        return Assigned(quantizer)

    quantizers = _trees.map_named(assign, params)
    memories = None
    if memory is not None:
        memories = _trees.map_named(lambda name, x: memory(x) if chosen[name] else optax.MaskedNode(), params)
    return StamState(jnp.zeros([], jnp.int32), memories, quantizers)


def check_has(where: str, name: str, value: Any, *members: str) -> None:
    """Raise unless the value is an object (not a class) with the members."""
    if isinstance(value, type) or not all(hasattr(value, member) for member in members):
        raise TypeError(f"{where}: {name} must be an object with {', '.join(members)}; got {value!r}.")


def check_own(where: str, state: Any, kind: type) -> None:
    """Raise unless the state is of the kind that the transform's `init` makes."""
    if not isinstance(state, kind):
        raise ValueError(
            f"{where}: update takes the state of its own init, a {kind.__name__}; got {type(state).__name__}."
        )


def wide(x: jax.Array) -> jnp.dtype:
    """The dtype that x is computed in: float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def float_copy(x: jax.Array) -> jax.Array:
    """The float block v before the first step."""
    # A copy even where no cast is due: an alias of x would break the donation of both.
    return jnp.array(x, wide(x), copy=True)


def float_block(x: jax.Array, latent: jax.Array | None) -> jax.Array:
    """The float block v: what the state holds, or x itself."""
    return x.astype(wide(x)) if latent is None else latent


def lead(
    x: jax.Array, latent: jax.Array | None, new_x: jax.Array, new_v: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The update that leads from x to its next value, and what the state holds from then on."""
    update = (new_x - x.astype(wide(x))).astype(x.dtype)
    return update, None if latent is None else new_v.astype(latent.dtype)


def advance(
    where: str, state: StamState, updates: Any, params: Any, *, learning_rate: Any, move: Move
) -> tuple[Any, StamState]:
    """One step: every quantised leaf moved, the others by the plain step.

    Raises:
        ValueError: without parameters, or with trees that do not match the one given to `begin`.
    """
    assigned = check_trees(where, state, updates, params)
    directions, structure = jax.tree.flatten(updates)
    weights = jax.tree.leaves(params)
    memories, memory_structure = jax.tree.flatten(state.latent)
    remembers = state.latent is not None
    new_updates, new_memories = [], []
    remaining = iter(memories)
    for d, x, quantizer in zip(directions, weights, assigned.values(), strict=True):
        if quantizer is None:
            new_updates.append((-learning_rate * d).astype(x.dtype))
            continue
        update, memory = move(quantizer, x, next(remaining) if remembers else None, d)
        new_updates.append(update)
        new_memories.append(memory)
    return jax.tree.unflatten(structure, new_updates), StamState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        latent=jax.tree.unflatten(memory_structure, new_memories) if remembers else None,
        quantizers=state.quantizers,
    )


def _chosen(where: str, mask: Mask | None, params: Any) -> dict[str, bool]:
    """Whether each leaf of the parameters, by name, is quantised."""
    names = _trees.named_leaves(params, holes=True)
    if not names:
        return {}  # Nothing to choose from, nor to find a rule wrong by: the placeholders of Optax, say.
    if mask is None:
        mask = select
    if callable(mask):
        mask = mask(params)
    if isinstance(mask, Selection):
        if "" not in names and any(row.path == "" for row in mask.rows):
            raise ValueError(
                f"{where}: mask is a Selection of a single array, as of a step count: "
                "optax.inject_hyperparams takes a function for a schedule unless it is given "
                "static_args=('mask',)."
            )
        mask = mask.mask
    rules = _trees.named_leaves(mask)
    for name, value in rules.items():
        if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.bool_):
            raise TypeError(f"{where}: mask holds {value!r} at {name!r}; it must be a boolean.")
    chosen, used = {}, set()
    for name, leaf in names.items():
        rule = next((prefix for prefix in _prefixes(name) if prefix in rules), None)
        used.add(rule)
        if _trees.is_masked(leaf):
            continue
        if rule is None:
            raise ValueError(f"{where}: mask says nothing of the leaf {name!r}.")
        chosen[name] = bool(rules[rule])
    holes = {name for name, leaf in names.items() if _trees.is_masked(leaf)}
    for rule in rules:
        # A mask for the whole tree serves a part of it, in `optax.masked` and `optax.partition`.
        if rule not in used and holes.isdisjoint(_prefixes(rule)):
            raise ValueError(
                f"{where}: mask speaks of {rule!r}, which the parameters do not hold; "
                f"they hold {', '.join(names)}."
            )
    return chosen


def _prefixes(name: str) -> list[str]:
    """The name and the names of the nodes above it, down to the root, which is ''."""
    keys = name.split("/")
    return ["/".join(keys[:n]) for n in range(len(keys), -1, -1)]


def _check_fitting(
    where: str,
    quantizer: Quantizer,
    probe: Callable[[Quantizer, jax.Array], Any] | None,
    name: str,
    leaf: jax.Array,
) -> None:
    """Raise unless the leaf can be quantised, and can go through the probe."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{where}: mask chooses {name!r}, of dtype {leaf.dtype}; "
            "only floating-point leaves can be quantised."
        )
    shape = jax.ShapeDtypeStruct(leaf.shape, wide(leaf))
    try:
        jax.eval_shape(quantizer.project, shape)
        if probe is not None:
            jax.eval_shape(lambda v: probe(quantizer, v), shape)
    except ValueError as error:
        raise ValueError(f"{where}: the leaf {name!r} cannot be quantised: {error}") from error


def assigned_quantizers(state: StamState) -> dict[str, Quantizer | None]:
    """The quantiser of each leaf, by name."""
    is_assigned = lambda node: isinstance(node, Assigned)
    nodes, _ = _trees.flatten_named(state.quantizers, is_assigned)
    return {name: node.quantizer for name, node in nodes.items() if is_assigned(node)}


def check_trees(where: str, state: StamState, updates: Any, params: Any) -> dict[str, Quantizer | None]:
    """The quantiser of each leaf, once the trees are seen to have the same leaves, in order and shape."""
    if params is None:
        raise ValueError(f"{where}: update needs the parameters: update(updates, state, params).")
    assigned = assigned_quantizers(state)
    named_updates, named_params = _trees.named_leaves(updates), _trees.named_leaves(params)
    for what, names in (("updates", named_updates), ("params", named_params)):
        if list(names) != list(assigned):
            missing = [name for name in assigned if name not in names]
            extra = [name for name in names if name not in assigned]
            raise ValueError(
                f"{where}: {what} do not match the parameters given to init: "
                f"missing {missing or 'nothing'}, unexpected {extra or 'nothing'}."
            )
    for name, d in named_updates.items():
        if jnp.shape(d) != jnp.shape(named_params[name]):
            raise ValueError(
                f"{where}: the update of {name!r} has shape {jnp.shape(d)}, "
                f"the parameter {jnp.shape(named_params[name])}."
            )
    return assigned
