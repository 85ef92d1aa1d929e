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
# # What the convergence theorem says of a run
#
# `stam_proximal` comes with a theorem: the residual of its objective stays under a bound, on average over a
# run. This notebook checks that on a problem whose constants are known. It then shows what lies outside of
# the theorem: inertia, which `stam` uses to let signs flip, and momentum.
#
# The iteration and the theorems are this project's own formulation. [The theory](../docs/theory.md) has all
# of them, with proofs.

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

from stam_jax import Binary, diagnostics, quantize, stam_proximal, theory, three_block_splitting
from stam_jax.relaxations import SquaredDistance

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False})
# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLES = ("-", "--", "-.", ":")
print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## The theorem
#
# Let $f$ be the loss, $Q$ the set of binary weights, and $\rho$ a penalty. `stam_proximal` minimizes
#
# $$\Phi(x, y) = f(x) + \tfrac{\rho}{2}\,|x - y|^2 \qquad \text{over all } x, \text{ and all } y \in Q .$$
#
# With a stochastic gradient $d$ at $x$ and the learning rate $\eta$, one step is
#
# $$y^+ = P_Q(x), \qquad x^+ = x - \hat\eta\,\bigl(d + \rho\,(x - y^+)\bigr), \qquad
# \hat\eta = \frac{\eta}{1 + \eta\rho} .$$
#
# The residual $R_k = \nabla f(x_k) + \rho\,(x_k - y_{k+1})$ is 0 at the stationary points of $\Phi$. Let
# $f$ be $L$-smooth, let the noise of $d$ have mean 0 and a variance of at most $\sigma^2$, and let
# $\eta \le 1/L$. Then [theorem 1](../docs/theory.md#theorem-1-the-proximal-method) says
#
# $$\frac1K \sum_{k<K} \mathrm{E}|R_k|^2 \;\le\;
# \frac{2\,(\Phi_0 - \Phi_{\inf})}{\hat\eta K} + (L + \rho)\,\hat\eta\,\sigma^2 .$$
#
# `diagnostics.residual` measures $|R|$, and `theory.bound` computes the right-hand side.
#
# ## A problem with known constants
#
# There are 64 weights in four channels, each channel with its own scale. The loss of each weight is a
# parabola with a wave on it, so $f$ is not convex, but its constants are known:
#
# $$f(x) = \sum_i \tfrac12 a_i (x_i - t_i)^2 + c\,\cos(\omega x_i), \qquad
# L = \max_i a_i + c\,\omega^2, \qquad f \ge -64\,c .$$
#
# The cosine is the same for both signs, so the best binary weights have the signs of the targets $t$. A
# search over their scales gives the lowest loss of binary weights.

# %%
SHAPE, WAVE, FREQUENCY, STEPS = (16, 4), 0.3, 2.0, 2000
draws = np.random.default_rng(0)
target = draws.choice([-1.0, 1.0], SHAPE) * draws.uniform(0.5, 1.5, SHAPE)
curvature = draws.uniform(0.1, 1.0, SHAPE)
start = {"kernel": jnp.asarray(draws.normal(size=SHAPE))}
smoothness = float(curvature.max() + WAVE * FREQUENCY**2)


def terms(x):
    """The loss of each weight."""
    return curvature * (x - target) ** 2 / 2 + WAVE * jnp.cos(FREQUENCY * x)


def f(params):
    """The loss."""
    return terms(params["kernel"]).sum()


scales = np.linspace(0, 3, 3001)[:, None, None]
best = float(terms(scales * np.sign(target)).sum(axis=1).min(axis=0).sum())
print(f"L = {smoothness:.2f}")
print(f"f at the start: {f(start):.1f}; at the nearest binary weights: {f(quantize(start)):.1f}")
print(f"lowest f of binary weights: {best:.1f}")

# %% [markdown]
# `runs` makes runs for several settings at once, each from eight random keys. The gradients have Gaussian
# noise of standard deviation $\sigma$ in all.


# %%
def run(key, learning_rate, penalty, noise, inertia, *, build):
    """One run: the squared residual, the signs flipped, and the loss of the binary weights, at each step."""
    optimizer = build(learning_rate, penalty, inertia)

    def step(carry, key):
        x, state = carry
        gradient = jax.grad(f)(x)
        residual = diagnostics.residual(gradient, state, x, penalty=penalty).whole.total
        noisy = {"kernel": gradient["kernel"] + noise * jax.random.normal(key, SHAPE) / np.sqrt(target.size)}
        updates, state = optimizer.update(noisy, state, x)
        new_x = optax.apply_updates(x, updates)
        flips = target.size * diagnostics.sign_flips(x, new_x)
        return (new_x, state), (residual**2, flips, f(quantize(new_x)))

    return jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, STEPS))[1]


def proximal(learning_rate, penalty, inertia):
    """The iteration of theorem 1."""
    return stam_proximal(learning_rate, penalty)


def runs(learning_rate, penalty, noise, inertia=0.0, build=proximal):
    """What `run` returns for each of several settings: arrays of [settings, keys, steps]."""
    settings = np.broadcast_arrays(*map(np.float64, (learning_rate, penalty, noise, inertia)))
    over_keys = jax.vmap(functools.partial(run, build=build), in_axes=(0, None, None, None, None))
    over_settings = jax.jit(jax.vmap(over_keys, in_axes=(None, 0, 0, 0, 0)))
    keys = jax.random.split(jax.random.key(0), 8)
    return map(np.asarray, over_settings(keys, *map(jnp.atleast_1d, settings)))


def constants(penalty, noise):
    """What the bound has to know of a run of all steps."""
    state = stam_proximal(1.0, penalty).init(start)
    objective = diagnostics.objective(f(start), state, start, penalty=penalty).total
    decrease = float(objective) + WAVE * target.size
    return {
        "smoothness": smoothness,
        "noise": noise,
        "decrease": decrease,
        "steps": STEPS,
        "penalty": penalty,
    }


# %% [markdown]
# ## The residual stays under its bound
#
# Each panel changes one setting: the penalty $\rho$, the learning rate $\eta$, or the batch size $B$, which
# makes $\sigma^2 = 8^2 / B$. Solid lines are the mean of $|R|^2$ over the steps so far and over eight runs.
# Dashed lines are the bound.

# %%
panels = {
    r"penalty $\rho$": [(0.1, rho, 8.0, f"{rho:g}") for rho in (0.1, 1.0, 10.0, 100.0)],
    r"learning rate $\eta$": [(share, 1.0, 8.0, f"{share:g} / L") for share in (1.0, 0.3, 0.1, 0.03)],
    "batch size $B$": [(0.1, 1.0, 8 / np.sqrt(size), f"{size}") for size in (1, 4, 16, 64)],
}
counts = np.arange(1, STEPS + 1)
marks = np.unique(np.geomspace(1, STEPS, 40).round().astype(int))
largest = 0.0

figure, all_axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
for axes, (title, cases) in zip(all_axes, panels.items(), strict=True):
    shares, penalties, noises, labels = zip(*cases, strict=True)
    rates = np.array(shares) / smoothness
    squares, _, _ = runs(rates, penalties, noises)
    means = squares.mean(axis=1).cumsum(axis=-1) / counts
    known = map(constants, penalties, noises)
    for rate, label, mean, known_here, color in zip(rates, labels, means, known, COLORS, strict=True):
        bounds = np.array([theory.bound(rate, **known_here | {"steps": int(count)}) for count in marks])
        axes.loglog(counts, mean, color=color, label=label)
        axes.loglog(marks, bounds, "--", color=color, linewidth=1)
        largest = max(largest, (mean[marks - 1] / bounds).max())
    axes.set(xlabel="steps", title=title)
    axes.legend(loc="upper right", fontsize=9)
all_axes[0].set_ylabel("mean of $|R|^2$ so far")
plt.show()
print(f"the largest share of its bound that a line reaches: {100 * largest:.0f}%")

# %% [markdown]
# No solid line crosses the dashed line of its color. The bound falls as $1/K$ until the noise term is the
# larger one. With a smaller learning rate it falls later and ends lower; with a larger batch it ends
# lower. With the best learning rate for the length of the run, `theory.step_size`, the bound falls as
# $K^{-1/2}$.
#
# ## Inertia lets signs flip
#
# A small residual does not make a good binary network. $\Phi$ has very many stationary points, and a large
# $\rho$ holds a run at the signs that it began with. Inertia is a remedy. Let $w$ be the weights after
# the gradient step and $x$ those after the pull towards $Q$. The next step then starts from
# $x + \kappa\,(w - x)$ instead of $x$, so small steps add up until a sign flips. All runs here have
# $\rho = 30$.

# %%
kappas = (0.0, 0.5, 0.9, 0.99, 1.0)


def inertial(learning_rate, penalty, inertia):
    """The iteration of theorem 2."""
    relaxation = SquaredDistance(learning_rate * penalty)
    return three_block_splitting(
        optax.sgd(learning_rate), quantizer=Binary(), relaxation=relaxation, inertia=inertia
    )


_, flips, binary = runs(0.1 / smoothness, 30.0, 8.0, kappas, build=inertial)
print("kappa  signs flipped  f of binary weights at the end")
for kappa, flipped, losses in zip(kappas, flips, binary, strict=True):
    print(f"{kappa:5g}  {flipped.sum(axis=-1).mean():13.0f}  {losses[:, -1].mean():30.1f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for kappa, flipped, losses, color, style in zip(
    kappas, flips, binary, (*COLORS, "black"), (*STYLES, (0, (5, 1, 1, 1, 1, 1))), strict=True
):
    line = {"color": color, "linestyle": style, "label": rf"$\kappa$ = {kappa:g}"}
    left.semilogx(counts, flipped.cumsum(axis=-1).mean(axis=0), **line)
    right.semilogx(counts, losses.mean(axis=0), **line)
right.axhline(best, color="0.6", linewidth=1, label="lowest there is")
left.set(xlabel="steps", ylabel="signs flipped so far")
right.set(xlabel="steps", ylabel="$f$ at the binary weights", ylim=(-17, 31))
right.legend()
plt.show()

# %% [markdown]
# Without inertia one sign of the 64 flips, and the loss of the binary weights stays close to where it was.
# With more inertia more signs flip, and the loss comes close to the lowest there is. Inertia also weakens
# the pull, to that of $(1 - \kappa)\rho$; on problems like this one a smaller $\rho$ alone does as well, on
# others it does not: [the theory](../docs/theory.md#what-runs-show) has a table. The inertia of `stam` is
# close to 1, and follows from the size of the steps.
#
# Theorem 1 does not cover inertia. [Theorem 2](../docs/theory.md#theorem-2-inertia) does, with a bound that
# needs measurements of the run itself (`diagnostics.flip_work`). Neither covers `stam` as it is used, which
# becomes hard during the run. So always measure the loss or the accuracy of the binary network.
#
# ## Momentum is outside of the theorem
#
# Momentum turns gradients into directions that are not unbiased gradients at $x$. No theorem here covers
# it. These runs have $\rho = 1$ and the learning rate whose bound is lowest for plain gradients.

# %%
known = constants(1.0, 8.0)
rate = theory.step_size(**known)
bound = theory.bound(rate, **known)
with_momentum = lambda *settings: optax.chain(optax.trace(0.9), proximal(*settings))
cases = {
    "plain": (rate, proximal),
    "momentum 0.9": (rate, with_momentum),
    "momentum 0.9, a tenth of the rate": (rate / 10, with_momentum),
}
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
print(f"bound for plain gradients: {bound:.2f}")
for (label, (learning_rate, build)), color, style in zip(cases.items(), COLORS, STYLES, strict=False):
    squares, _, _ = runs(learning_rate, 1.0, 8.0, build=build)
    mean = squares.mean(axis=(0, 1)).cumsum() / counts
    print(f"{label}: {mean[-1]:.2f}")
    axes.loglog(counts, mean, style, color=color, label=label)
axes.axhline(bound, color="black", linewidth=1, label="bound, plain")
axes.set(xlabel="steps", ylabel="mean of $|R|^2$ so far")
axes.legend(fontsize=9)
plt.show()

# %% [markdown]
# Momentum of 0.9 makes steps ten times as long in the end. At the same learning rate the mean ends far
# above the bound for plain gradients. At a tenth of the rate it ends below that bound, which no theorem
# promised, and above the plain run.
#
# [What is not covered](../docs/theory.md#what-is-not-covered) lists the other limits of the theorems, such
# as Adam and batch normalization.
