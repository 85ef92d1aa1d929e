# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The relaxations, from full precision to binary
#
# During training the network runs on relaxed weights $x$. They lie between the latent weights $w$, which
# the optimizer moves, and their projection $y = P_Q(w)$ onto the quantized weights, and they end at $y$. A
# relaxation is the map from $w$ to $x$.
#
# This notebook draws all relaxations of the library, for binary and ternary weights. It then trains a
# network with each, and shows what happens to the weights of a layer, how many weights settle and how many
# signs flip in each epoch, and which accuracies come out.

# %%
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

if not any(importlib.metadata.distributions(name="stam-jax")):
    folders = [Path.cwd(), *Path.cwd().parents]
    clones = [path for path in folders if (path / "pyproject.toml").exists() and (path / "stam_jax").exists()]
    if not clones:
        raise RuntimeError("Clone or upload the repository first, and open this notebook inside it.")
    # Where JAX came with a plugin for an accelerator, a newer JAX needs the plugin that goes with it.
    plugins = {"jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13", "libtpu": "tpu"}
    found = [f"jax[{extra}]" for module, extra in plugins.items() if importlib.util.find_spec(module)]
    package = f"{clones[0]}[experiments]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package, *found], check=True)

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from stam_jax import Binary, Ternary, diagnostics, quantize, schedules, three_block_splitting
from stam_jax.quantizers import levels_of, nearest
from stam_jax.relaxations import (
    Hard,
    HardFrom,
    L1Distance,
    LinearBlend,
    PiecewiseAffine,
    ScaledTanh,
    SquaredDistance,
)

plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False})
# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## The maps
#
# A relaxation is an object whose `at(count)` returns the map of that step. Its parameters are schedules of
# the step count. For binary weights with scale $\alpha$:
#
# | relaxation | $x$ | from full precision to hard |
# |---|---|---|
# | `SquaredDistance` | $(w + \lambda y) / (1 + \lambda)$ | $\lambda$ from 0 to $\infty$ |
# | `LinearBlend` | $(1 - \theta)\, w + \theta\, y$ | $\theta$ from 0 to 1 |
# | `L1Distance` | $y + \mathrm{soft}(w - y, \lambda)$ | $\lambda$ from 0 to $\infty$ |
# | `PiecewiseAffine` | $\mathrm{clip}(w / s, -\alpha, \alpha)$ | $s$ from 1 to 0 |
# | `ScaledTanh` | $\alpha \tanh(\beta w / \alpha)$ | $\beta$ from 1 or so to $\infty$ |
# | `Hard` | $y$ | hard throughout |
#
# The function below gives each of them a schedule that ends hard, which means $x = y$. `HardFrom` makes a
# relaxation hard from a step on where its schedule alone would not.


# %%
def relaxations(hard_from, scale):
    """Every relaxation, hard from a step on; `scale` is the size of the weights."""
    growth = functools.partial(schedules.geometric, growth=100 ** (1 / hard_from))
    threshold = optax.linear_schedule(0.0, scale, transition_steps=hard_from)
    return {
        "squared distance": HardFrom(SquaredDistance(growth(0.1)), hard_from),
        "linear blend": LinearBlend(schedules.linear_to_hard(hard_from)),
        "l1 distance": HardFrom(L1Distance(threshold), hard_from),
        "piecewise affine": PiecewiseAffine(schedules.sigmoid_inverse_slope(hard_from, steepness=4.0)),
        "scaled tanh": HardFrom(ScaledTanh(growth(1.0)), hard_from),
        "hard": Hard(),
    }


maps = relaxations(100, 1.0)
stages = {0: "#56B4E9", 33: "#009E73", 67: "#D55E00", 100: "#000000"}
w = jnp.linspace(-2, 2, 801)


def draw(axes, relaxation, quantizer):
    """A relaxation at some stages of its anneal."""
    levels = levels_of(quantizer, w)
    for stage, color in stages.items():
        x = np.array(relaxation.at(stage)(w, nearest(w, levels), levels))
        x[1:][np.abs(np.diff(x)) > 0.1] = np.nan  # A gap in the line where the map jumps.
        axes.plot(w, x, color=color, label=f"{stage}%")
    for level in levels:
        axes.axhline(level.item(), color="0.8", linewidth=0.8, zorder=0)
    axes.set(ylim=(-2.1, 2.1), xticks=(-2, 0, 2), yticks=(-2, 0, 2), aspect="equal")


figure, rows = plt.subplots(2, 6, figsize=(12, 4.6), sharex=True, sharey=True, layout="constrained")
quantizers = {"binary": Binary(axis=(), scale=1.0), "ternary": Ternary(axis=(), scale=1.0)}
for row, (kind, quantizer) in zip(rows, quantizers.items(), strict=True):
    for axes, (name, relaxation) in zip(row, maps.items(), strict=True):
        draw(axes, relaxation, quantizer)
        if kind == "binary":
            axes.set_title(name, fontsize=11)
    row[0].set_ylabel(f"{kind}: $x$")
figure.supxlabel("latent weight $w$", fontsize=11)
lines, names = rows[0, 0].get_legend_handles_labels()
figure.legend(lines, names, title="share of the anneal that is done", loc="outside upper center", ncols=4)
plt.show()

# %% [markdown]
# Gray lines are the levels, with $\alpha = 1$.
#
# * The first three maps move each weight towards its own level and jump where the level changes. Squared
#   distance and linear blend move all weights by the same share of their distance. The l1 distance moves
#   them by the same distance, so the weights close to a level reach it first.
# * The piecewise affine map and the tanh have no jumps, and they bring weights beyond the outermost level
#   back to it. The tanh is never the identity.
#
# ## Training with each
#
# A network with two hidden layers learns digits with each relaxation. Everything else is equal: inertia 1,
# SGD with momentum, one scale per output channel, and hard from three quarters of the run on. Three seeds
# run at once, as a batch.

# %%
digits = load_digits()
pixels = (digits.data / 16).astype(np.float32)
parts = train_test_split(pixels, digits.target, test_size=0.25, stratify=digits.target, random_state=0)
train_x, test_x, train_y, test_y = map(jnp.asarray, parts)
EPOCHS, BATCH, SEEDS = 32, 64, 3
steps_per_epoch = len(train_x) // BATCH
hard_from = 3 * EPOCHS * steps_per_epoch // 4


def network(seed):
    """A network with weights drawn from a seed."""
    rngs = nnx.Rngs(seed)
    layers = [nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 128, rngs=rngs), nnx.relu]
    return nnx.Sequential(*layers, nnx.Linear(128, 10, rngs=rngs))


graph = nnx.graphdef(network(0))
first = [nnx.to_pure_dict(nnx.state(network(seed), nnx.Param)) for seed in range(SEEDS)]
first = jax.tree.map(lambda *leaves: jnp.stack(leaves), *first)


def loss(params, x, y):
    """The cross entropy of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()


def accuracy(params):
    """The share of test images that are read correctly."""
    return (nnx.merge(graph, params)(test_x).argmax(-1) == test_y).mean()


def kernels(params):
    """The weights that are quantized."""
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]


def train(params, key, relaxation, inertia=1.0):
    """One run: accuracies, flips, settled weights, and the weights of a layer, for each epoch."""
    sgd = optax.sgd(optax.cosine_decay_schedule(0.1, EPOCHS * steps_per_epoch), momentum=0.9)
    optimizer = three_block_splitting(sgd, quantizer=Binary(), relaxation=relaxation, inertia=inertia)

    def step(carry, batch):
        params, state = carry
        gradients = jax.grad(loss)(params, train_x[batch], train_y[batch])
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        params, state = carry
        before = quantize(params)
        order = jax.random.permutation(key, len(train_x))[: steps_per_epoch * BATCH]
        (params, state), _ = jax.lax.scan(step, carry, order.reshape(steps_per_epoch, BATCH))
        hard = quantize(params)
        # In units of the scales of the latent weights, where the levels are -1 and 1.
        levels = quantize(params if state.latent is None else state.latent)
        x = [x / jnp.abs(y) for x, y in zip(kernels(params), kernels(levels), strict=True)]
        settled = [jnp.abs(jnp.abs(x) - 1) <= 0.01 for x in x]
        return (params, state), {
            "relaxed": accuracy(params),
            "binary": accuracy(hard),
            "flips": diagnostics.sign_flips(kernels(before), kernels(hard)),
            "settled": jnp.concatenate([s.ravel() for s in settled]).mean(),
            "layer": x[1],
        }

    return jax.lax.scan(epoch, (params, optimizer.init(params)), jax.random.split(key, EPOCHS))[1]


def runs(relaxation, inertia=1.0):
    """What `train` returns for each seed: arrays of [seeds, epochs]."""
    train_all = jax.jit(jax.vmap(functools.partial(train, relaxation=relaxation, inertia=inertia)))
    return jax.tree.map(np.asarray, train_all(first, jax.random.split(jax.random.key(0), SEEDS)))


results = {name: runs(relaxation) for name, relaxation in relaxations(hard_from, 0.1).items()}

# %% [markdown]
# ## A layer's weights through training
#
# These are the relaxed weights $x$ of the second layer, in units of their scales, at the end of some epochs
# of the first run. Weights beyond 3 are counted at 3.

# %%
shown = {name: results[name] for name in list(results)[:5]}
epochs = (1, 8, 16, 24, 25)
bins = np.linspace(-3, 3, 121)
figure, rows = plt.subplots(5, 5, figsize=(11, 7), sharex=True, layout="constrained")
for row, (name, result), color in zip(rows, shown.items(), COLORS, strict=False):
    for axes, epoch in zip(row, epochs, strict=True):
        axes.hist(np.clip(result["layer"][0, epoch - 1].ravel(), -3, 3), bins=bins, color=color)
        axes.set(yticks=[], xticks=(-2, -1, 0, 1, 2))
        axes.spines.left.set_visible(False)
    row[0].set_ylabel(name)
for axes, epoch in zip(rows[0], epochs, strict=True):
    axes.set_title(f"epoch {epoch}" + (", hard" if epoch * steps_per_epoch > hard_from else ""))
figure.supxlabel(r"$x / \alpha$", fontsize=11)
plt.show()

# %% [markdown]
# Squared distance and linear blend pull each half of the weights together around its level, which leaves a
# gap around 0. The l1 distance sets more and more weights on their levels and leaves the others nearly
# where they are. The piecewise affine map holds all weights between the levels from the start, nearly half
# of them on a level. With the tanh the weights gather at the levels. From epoch 25 on all five are hard.
#
# ## How many weights settle, and how many signs flip
#
# A weight is settled when $x$ is within 1% of its level. A flip is a binary weight that has changed its
# sign since the epoch before.

# %%
styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for (name, result), color, style in zip(results.items(), COLORS, styles, strict=True):
    line = {"color": color, "linestyle": style, "label": name}
    left.plot(range(1, EPOCHS + 1), 100 * result["settled"].mean(axis=0), **line)
    right.semilogy(range(1, EPOCHS + 1), 100 * result["flips"].mean(axis=0), **line)
for axes, label in ((left, "weights settled, %"), (right, "signs flipped in the epoch, %")):
    axes.axvspan(hard_from / steps_per_epoch, EPOCHS, color="0.92", zorder=0)
    axes.set(xlabel="epoch", ylabel=label, xlim=(1, EPOCHS))
figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
plt.show()

# %% [markdown]
# Left: the l1 distance settles weights at an even pace, and the piecewise affine map and the tanh settle
# them sooner. With squared distance and linear blend all weights move together, so they settle only when
# the network becomes hard.
#
# Right: flips become rarer as the learning rate falls, with all relaxations. The l1 distance has a burst of
# flips when the network becomes hard, because the weights that had not settled jump at once.
#
# ## Accuracies
#
# The next cell adds one more run: the linear blend without inertia, where each step starts from $x$ instead
# of $w$.

# %%
results["linear blend, inertia 0"] = runs(relaxations(hard_from, 0.1)["linear blend"], inertia=0.0)
figure, all_axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for axes, which in zip(all_axes, ("relaxed", "binary"), strict=True):
    axes.axvspan(hard_from / steps_per_epoch, EPOCHS, color="0.92", zorder=0)
    for (name, result), color, style in zip(results.items(), (*COLORS, "0.6"), (*styles, "-"), strict=True):
        curve = 100 * result[which].mean(axis=0)
        axes.plot(range(1, EPOCHS + 1), curve, color=color, linestyle=style, label=name)
    axes.set(xlabel="epoch", title=f"{which} network", xlim=(1, EPOCHS), ylim=(50, 100))
all_axes[0].set_ylabel("test accuracy, %")
all_axes[1].legend(loc="lower right", fontsize=9)
plt.show()

print(f"{'test accuracy, %':24}  {'seeds':^20}  mean  flips per weight")
for name, result in results.items():
    final = 100 * result["binary"][:, -1]
    each = "  ".join(f"{value:5.1f}" for value in final)
    print(f"{name:24}  {each:20}  {final.mean():4.1f}  {result['flips'].sum(axis=1).mean():6.2f}")

# %% [markdown]
# Squared distance, linear blend and l1 distance begin in full precision. Their relaxed networks learn fast,
# and their binary networks lag until late in the run. With the other three relaxations the two networks are
# close throughout. In the end all six are within about a point of each other. One test image is 0.2 points,
# so this small experiment does not rank the relaxations.
#
# The effect of inertia is larger than that. Without it each step starts from where the last one had been
# pulled, so the same schedule pulls far harder. Signs flip a tenth as often, and the binary network ends
# several points lower. With inertia 0 a schedule has to be gentler.
#
# ## Next
#
# * [How to choose a method](../docs/methods.md): the relaxation of each method
# * [Your own network, quantizer and relaxation](04_your_own.ipynb)
