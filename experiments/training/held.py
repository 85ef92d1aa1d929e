"""On trial: `stam` whose inertia follows from the size of the optimizer's steps, by a rule without units."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import stam_jax
from stam_jax import relaxations, schedules


class HeldState(NamedTuple):
    """The state of `held`.

    Args:
        leaves: of `three_block_splitting`, for each quantized leaf by path.
        typical: the mean so far of each leaf's step relative to its weights, by path.
    """

    leaves: dict[str, Any]
    typical: dict[str, jax.Array]


def held(*, rule: str, hold: float, hard_from: int, quantizer: Any) -> optax.GradientTransformationExtraArgs:
    """`stam` behind an optimizer, with 1 - kappa = hold * r^power.

    r is mean |u| / mean |w| of a leaf, or of all (the mean weighted by size), in this step or as the mean
    over the steps so far: `leaf-now`, `network-typical`; with `-squared` behind it the power is 2.
    """
    scope, time, *power = rule.split("-")

    def named(tree: Any, chosen: dict[str, Any]) -> dict[str, Any]:
        flat = jax.tree_util.tree_leaves_with_path(tree)
        leaves = {
            jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
            for path, leaf in flat
        }
        return {path: leaves[path] for path in chosen}

    def chosen(params: Any) -> dict[str, Any]:
        rows = stam_jax.tabulate(jax.eval_shape(lambda: params), quantizer).rows
        return {row.path: row.quantizer for row in rows if row.quantizer is not None}

    def splitting(q: Any, kappa: Any) -> Any:
        blend = relaxations.LinearBlend(schedules.linear_to_hard(hard_from))
        return stam_jax.three_block_splitting(quantizer=q, relaxation=blend, inertia=lambda count: kappa)

    def init(params: Any) -> HeldState:
        quantizers = chosen(params)
        leaves = {
            path: splitting(quantizers[path], 1.0).init({"kernel": x})
            for path, x in named(params, quantizers).items()
        }
        return HeldState(leaves, {path: jnp.zeros([]) for path in quantizers})

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, HeldState]:
        del extra
        quantizers = chosen(params)
        u, x = named(updates, quantizers), named(params, quantizers)
        mean = lambda a: jnp.mean(jnp.abs(a))
        now, typical, size = {}, {}, {}
        for path in quantizers:
            v = state.leaves[path].latent["kernel"]
            now[path] = mean(u[path]) / mean(v + u[path])
            count = state.leaves[path].count
            typical[path] = state.typical[path] + (now[path] - state.typical[path]) / (count + 1)
            size[path] = x[path].size
        r = now if time == "now" else typical
        if scope == "network":
            whole = sum(size[path] * r[path] for path in r) / sum(size.values())
            r = dict.fromkeys(r, whole)
        reached, leaves = {}, {}
        for path, q in quantizers.items():
            pull = jnp.clip(hold * r[path] ** (2 if power else 1), 0, 1)
            step, leaves[path] = splitting(q, 1 - pull).update(
                {"kernel": u[path]}, state.leaves[path], {"kernel": x[path]}
            )
            reached[path] = step["kernel"]

        def replaced(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            return reached.get(name, leaf)

        return jax.tree_util.tree_map_with_path(replaced, updates), HeldState(leaves, typical)

    return optax.GradientTransformationExtraArgs(init, update)
