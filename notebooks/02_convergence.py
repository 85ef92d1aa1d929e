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
# # What the theory says of a run, and what it does not
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stam-jax/stam_jax/blob/main/notebooks/02_convergence.ipynb)
#
# On a problem whose constants are known, you will see the residual of `stam_proximal` stay under its bound
# for penalties, learning rates and noise of several sizes, and fall with the length of the run as the bound
# does; the terms of its objective; what inertia and momentum change; and why a small residual alone does
# not make a good binary network. It ends with real data, where the constants have to be estimated. The
# iteration, the theorems and their proofs are this project's own formulation:
# [docs/theory.md](https://github.com/stam-jax/stam_jax/blob/main/docs/theory.md) has them.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("stam_jax") is None:
    # Where JAX came with a plugin for an accelerator, a newer JAX needs the plugin that goes with it.
    plugins = {"jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13", "libtpu": "tpu"}
    found = [f"jax[{extra}]" for module, extra in plugins.items() if importlib.util.find_spec(module)]
    package = "stam-jax[experiments] @ git+https://github.com/stam-jax/stam_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package, *found], check=True)

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from stam_jax import Binary, diagnostics, quantize, stam, stam_proximal, theory, three_block_splitting
from stam_jax.regularizers import Box
from stam_jax.relaxations import SquaredDistance

# Differences of losses are measured here, and single precision would round them.
jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False})
# Okabe and Ito's colors, which color-blind readers tell apart; each with a marker or a style of its own.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## The iteration and its bound
#
# `stam_proximal` minimizes
#
# $$\Phi(x, y, z) = f(x) + g(y) + h(z) + \tfrac{\rho}{2}|x - y|^2 + \tfrac{\tau}{2}|x - z|^2 ,$$
#
# where $g$ confines $y$ to the binary weights $Q$ and $h$ is a regularizer, by exact steps in $y$ and $z$
# and a stochastic one in $x$. Without $h$, and with $d$ a stochastic gradient of $f$ at $x$, one step is
#
# $$y^+ = P_Q(x), \qquad x^+ = x - \hat\eta\,\bigl(d + \rho\,(x - y^+)\bigr), \qquad
# \hat\eta = \frac{\eta}{1 + \eta\rho} .$$
#
# Let $f$ be $L$-smooth, $\mathrm{E}|d - \nabla f(x)|^2 \le \sigma^2$, $\Phi \ge \Phi_{\inf}$ and
# $\eta \le 1/L$. Then the residual $R_k = \nabla f(x_k) + \rho\,(x_k - y_{k+1})$, the distance of 0 from
# the subdifferential of $\Phi$, is bounded on average, by theorem 1:
#
# $$\frac1K \sum_{k<K} \mathrm{E}|R_k|^2 \;\le\;
# \frac{2\,(\Phi_0 - \Phi_{\inf})}{\hat\eta K} + (L + \rho)\,\hat\eta\,\sigma^2 .$$
#
# `diagnostics.residual` measures $|R|$, and `theory.bound` is the right-hand side.
#
# ## A problem with known constants
#
# A parabola and a wave for each of 64 weights, in four channels that have a scale $\alpha$ each:
#
# $$f(x) = \sum_i \tfrac12 a_i (x_i - t_i)^2 + c\,\cos(\omega x_i), \qquad
# L = \max_i a_i + c\,\omega^2, \qquad f \ge -64\,c .$$
#
# It is not convex. The cosine does not see signs, so the best binary weights have those of the targets $t$,
# and their scales can be found by trying: the last line says how low the loss of binary weights can be.
# Gradients come with Gaussian noise of a given $\sigma$.

# %%
SHAPE, WAVE, FREQUENCY = (16, 4), 0.3, 2.0
draws = np.random.default_rng(0)
target = draws.choice([-1.0, 1.0], SHAPE) * draws.uniform(0.5, 1.5, SHAPE)
curvature = draws.uniform(0.1, 1.0, SHAPE)
start = {"kernel": jnp.asarray(draws.normal(size=SHAPE))}
SIZE = target.size

smoothness = float(curvature.max() + WAVE * FREQUENCY**2)
lowest = -WAVE * SIZE


def terms(x):
    """The loss of each weight."""
    return curvature * (x - target) ** 2 / 2 + WAVE * jnp.cos(FREQUENCY * x)


def f(params):
    """The loss."""
    return terms(params["kernel"]).sum()


def noisy_gradient(params, noise, key):
    """The gradient of the loss, with noise of standard deviation sigma in all."""
    return {"kernel": jax.grad(f)(params)["kernel"] + noise * jax.random.normal(key, SHAPE) / np.sqrt(SIZE)}


scales = np.linspace(0, 3, 3001)[:, None, None]
best = float(terms(scales * np.sign(target)).sum(axis=1).min(axis=0).sum())
print(f"L = {smoothness:.2f}")
print(f"f at the start: {f(start):.1f}; made binary: {f(quantize(start)):.1f}")
print(f"lowest f of binary weights: {best:.1f}")


# %%
def squared_residual(noisy, before, after, settings):
    """At the point that the step left, with the full gradient."""
    pull = (1 - settings["inertia"]) * settings["penalty"]
    return diagnostics.residual(jax.grad(f)(before[1]), *before, penalty=pull).whole.total ** 2


def quantized(state, params):
    """The quantized weights q of theorem 2, from the latent weights where there are any."""
    return quantize(params if state.latent is None else state.latent)


MEASURES = {
    "squared residual": squared_residual,
    "flip work": lambda noisy, before, after, settings: diagnostics.flip_work(
        f, noisy, before, after, **settings
    ),
    "flips": lambda noisy, before, after, settings: (
        SIZE * diagnostics.sign_flips(quantized(*before), quantized(*after))
    ),
    "quantized loss": lambda noisy, before, after, settings: f(quantized(*after)),
}


def proximal(learning_rate, penalty, inertia):
    """The iteration of theorem 1, without inertia."""
    return stam_proximal(learning_rate, penalty)


def run(key, learning_rate, penalty, noise, inertia, *, steps, measures, build):
    """What some measures say of each step of one run."""
    optimizer = build(learning_rate, penalty, inertia)
    settings = {"learning_rate": learning_rate, "penalty": penalty, "inertia": inertia}
    state = optimizer.init(start)

    def step(before, key):
        state, x = before
        noisy = noisy_gradient(x, noise, key)
        updates, new_state = optimizer.update(noisy, state, x)
        new_x = optax.apply_updates(x, updates)
        after = (new_state, new_x)
        return after, {name: MEASURES[name](noisy, before, after, settings) for name in measures}

    return jax.lax.scan(step, (state, start), jax.random.split(key, steps))[1]


KEYS = jax.random.split(jax.random.key(0), 8)


def runs(
    learning_rate, penalty, noise, inertia=0.0, *, steps, measures=("squared residual",), build=proximal
):
    """Runs for several settings at once, from eight random keys each: arrays of [settings, keys, steps]."""
    settings = np.broadcast_arrays(*map(np.float64, (learning_rate, penalty, noise, inertia)))
    one = functools.partial(run, steps=steps, measures=measures, build=build)
    over_keys = jax.vmap(one, in_axes=(0, None, None, None, None))
    found = jax.jit(jax.vmap(over_keys, in_axes=(None, 0, 0, 0, 0)))(KEYS, *map(jnp.atleast_1d, settings))
    return jax.tree.map(np.asarray, found)


def decrease(penalty):
    """How far the objective can fall from the start, at most."""
    at_start = diagnostics.objective(
        f(start), stam_proximal(1.0, penalty).init(start), start, penalty=penalty
    )
    return float(at_start.total) - lowest


def constants(penalty, noise, steps):
    """What the bound asks to know."""
    return {
        "smoothness": smoothness,
        "noise": float(noise),
        "decrease": decrease(penalty),
        "steps": int(steps),
        "penalty": float(penalty),
    }


# %% [markdown]
# ## Under the bound
#
# Three panels, one for each of $\rho$, $\eta$ and the batch size $B$, which divides the variance:
# $\sigma^2 = 8^2 / B$. Solid is the running mean of $|R_k|^2$, averaged over eight runs; dashed the bound
# for a run that ends there.

# %%
STEPS = 2000
counts = np.arange(1, STEPS + 1)
panels = {
    r"penalty $\rho$": [(0.1 / smoothness, rho, 8.0, f"{rho:g}") for rho in (0.1, 1.0, 10.0, 100.0)],
    r"learning rate $\eta$": [(s / smoothness, 1.0, 8.0, f"{s:g} / L") for s in (1.0, 0.3, 0.1, 0.03)],
    "batch size $B$": [(0.1 / smoothness, 1.0, 8 / np.sqrt(b), f"{b}") for b in (1, 4, 16, 64)],
}
found = runs(*np.transpose([case[:3] for cases in panels.values() for case in cases]), steps=STEPS)
means = found["squared residual"].mean(axis=1).cumsum(axis=-1) / counts
largest = 0.0

figure, all_axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
curves = iter(means)
for axes, (title, cases) in zip(all_axes, panels.items(), strict=True):
    for (learning_rate, rho, noise, label), color in zip(cases, COLORS, strict=False):
        curve = next(curves)
        bounds = np.array([theory.bound(learning_rate, **constants(rho, noise, k)) for k in (1, STEPS)])
        # The bound is a / k + b.
        a = (bounds[0] - bounds[1]) / (1 - 1 / STEPS)
        allowed = a / counts + bounds[0] - a
        axes.loglog(counts, curve, color=color, label=label)
        axes.loglog(counts, allowed, "--", color=color, linewidth=1)
        largest = max(largest, float((curve / allowed).max()))
    axes.set(xlabel="steps", title=title)
    axes.legend(loc="upper right", fontsize=9)
all_axes[0].set_ylabel("running mean of $|R|^2$")
plt.show()
print(f"the largest share of its bound that a curve reaches: {100 * largest:.0f}%")

# %% [markdown]
# No solid line crosses the dashed one of its color. The bound falls as $1/K$ down to the price of the
# noise, where both flatten: a larger penalty raises the whole, a larger learning rate falls sooner and
# flattens higher, and a larger batch lets the line fall further.

# %% [markdown]
# ## The rate
#
# For a run of known length, `theory.step_size` is the learning rate whose bound is least; with noise it
# falls as $K^{-1/2}$, and the bound with it. Here each run has the rate for its own length.

# %%
lengths = 250 * 2 ** np.arange(7)
rho, noise = 1.0, 8.0
rates = np.array([theory.step_size(**constants(rho, noise, steps)) for steps in lengths])
found = runs(rates, rho, noise, steps=int(lengths[-1]))["squared residual"]
measured = np.array([of[:, :steps].mean(axis=1) for of, steps in zip(found, lengths, strict=True)])
allowed = np.array(
    [theory.bound(float(r), **constants(rho, noise, k)) for r, k in zip(rates, lengths, strict=True)]
)


def slope(values):
    """The exponent of a power law through the longer half of the runs."""
    return np.polyfit(np.log(lengths[3:]), np.log(values[3:]), 1)[0]


figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
axes.loglog(lengths, allowed, "--", color="black", label=f"bound, slope {slope(allowed):.2f}")
axes.loglog(
    lengths,
    measured.mean(axis=1),
    "o-",
    color=COLORS[0],
    label=f"mean of eight runs, slope {slope(measured.mean(axis=1)):.2f}",
)
axes.loglog(lengths, measured, ".", color=COLORS[0], alpha=0.4, markersize=4)
axes.set(xlabel="steps $K$", ylabel="mean of $|R|^2$ over the run")
axes.legend()
plt.show()

# %% [markdown]
# The two lines are parallel: four times the steps halve the mean of $|R|^2$, as $K^{-1/2}$ has it. $|R|$
# itself falls as $K^{-1/4}$, which is to say that an $\varepsilon$-stationary point takes
# $O(\varepsilon^{-4})$ steps. The small dots are the single runs.

# %% [markdown]
# ## The terms of the objective
#
# Now with a regularizer as the third block: $h$ is a box of half-width 0.8, and $\tau = 1$.
# `diagnostics.objective` gives the terms of $\Phi$, and `diagnostics.record`, around the optimizer, keeps in
# its state what each step did, here the share of signs it flipped.

# %%
box = {"regularizer": Box(0.8), "regularizer_penalty": 1.0}


@functools.partial(jax.jit, static_argnames="steps")
def objectives(key, learning_rate, penalty, noise, *, steps):
    """The terms of the objective before each step, and the share of signs that the step flipped."""
    settings = {"penalty": penalty, **box}
    optimizer = diagnostics.record(stam_proximal(learning_rate, **settings), **settings)

    def step(carry, key):
        x, state = carry
        found = diagnostics.objective(f(x), state, x, **settings)
        updates, state = optimizer.update(noisy_gradient(x, noise, key), state, x)
        return (optax.apply_updates(x, updates), state), (
            found,
            optax.tree.get(state, "diagnostics").flips,
        )

    return jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, steps))[1]


figure, all_axes = plt.subplots(
    2, 3, figsize=(11, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
)
for (upper, lower), penalty in zip(all_axes.T, (0.3, 3.0, 30.0), strict=True):
    found, flips = objectives(KEYS[0], 0.1 / smoothness, penalty, 4.0, steps=1500)
    names = {
        "total": r"$\Phi$",
        "loss": "$f(x)$",
        "quantized": r"$\frac{\rho}{2}|x-y|^2$",
        "constrained": r"$h(z)+\frac{\tau}{2}|x-z|^2$",
    }
    styles = zip(("black", *COLORS), ("-", "--", "-.", ":"), strict=False)
    for (name, label), (color, style) in zip(names.items(), styles, strict=True):
        upper.semilogx(counts[:1500], getattr(found, name), style, color=color, label=label)
    lower.semilogx(counts[:1500], SIZE * np.cumsum(flips), color=COLORS[0])
    upper.set_title(rf"$\rho$ = {penalty:g}")
    lower.set(xlabel="steps", ylim=(-1, 20))
all_axes[0, 0].set_ylabel("terms of the objective")
all_axes[1, 0].set_ylabel("signs flipped so far")
all_axes[0, 2].legend(loc="upper right")
plt.show()

totals = np.asarray(objectives(KEYS[0], 1 / smoothness, 3.0, 0.0, steps=1500)[0].total)
print(f"without noise, at the largest rate, the largest rise of a step: {np.diff(totals).max():.1e}")

# %% [markdown]
# $\Phi$ falls, and then noise holds it where it is; without noise no step raises it by more than rounding.
# The pull towards $y$ is soon met, at $\rho = 30$ within a few steps. That is its price: at $\rho = 0.3$
# signs go on flipping for hundreds of steps, and at 3 and 30 not one does, so that the run ends with the
# signs it began with, and with a loss far higher.

# %% [markdown]
# ## Inertia
#
# With inertia $\kappa$ the iteration keeps latent weights $v$ and carries a share of $w - x$ on. In $x$
# alone, with $\lambda = \eta\rho$, that is
#
# $$x^+ = x - \hat\eta\,\bigl(d + (1 - \kappa)\,\rho\,(x - y^+)\bigr)
# + \frac{\kappa\lambda}{1 + \lambda}\,(y^+ - y) :$$
#
# the pull is weaker, and $x$ is carried along when $y$ moves. That second part is no step down anything,
# and here theorem 1 ends. Let $q = P_Q(v)$ be the quantized weights,
# $\tilde\rho = (1-\kappa)\rho$, $M(x, q) = f(x) + \tfrac{\tilde\rho}{2}|x - q|^2$, and $J_k$ the flip work,
# what moving $q$, and $x$ with it, adds to $M$ in a step: `diagnostics.flip_work`. Theorem 2 then says
#
# $$\frac1K \sum_{k<K} \mathrm{E}|R_k|^2 \;\le\;
# \frac{2\,(M(x_0, q_0) - f_{\inf} + \sum_k \mathrm{E} J_k)}{\hat\eta K}
# + (L + \tilde\rho)\,\hat\eta\,\sigma^2 ,$$
#
# where $\hat\eta$ is that of the whole $\rho$, and $R_k = \nabla f(x_k) + \tilde\rho\,(x_k - q_k)$. Without
# inertia no $J_k$ is positive. With it that is not known beforehand, but it can be measured. At
# $\rho = 30$:

# %%
rho, noise, learning_rate, steps = 30.0, 8.0, 0.1 / smoothness, 2000
kappas = (0.0, 0.5, 0.9, 0.97, 0.99, 0.997, 1.0)


def inertial(learning_rate, penalty, inertia):
    """The iteration of theorem 2, with the projection first."""
    return three_block_splitting(
        optax.sgd(learning_rate),
        quantizer=Binary(),
        relaxation=SquaredDistance(learning_rate * penalty),
        inertia=inertia,
        project="first",
    )


found = runs(learning_rate, rho, noise, kappas, steps=steps, measures=tuple(MEASURES), build=inertial)

print("kappa  mean |R|^2   bound  sum of J  flips  quantized loss")
for index, kappa in enumerate(kappas):
    of = {name: values[index] for name, values in found.items()}
    work = float(of["flip work"].sum(axis=-1).mean())
    known = constants(rho, noise, steps) | {"decrease": decrease((1 - kappa) * rho) + work, "inertia": kappa}
    bound = theory.bound(learning_rate, **known)
    print(
        f"{kappa:5g}  {of['squared residual'].mean():10.2f}  {bound:6.2f}  {work:8.1f}"
        f"  {of['flips'].sum(axis=-1).mean():5.0f}  {of['quantized loss'][:, -1].mean():14.2f}"
    )

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
styles = ("-", "--", "-.", ":")
shown = [kappas.index(kappa) for kappa in (0.0, 0.9, 0.99, 1.0)]
for index, color, style in zip(shown, COLORS, styles, strict=False):
    label = rf"$\kappa$ = {kappas[index]:g}"
    left.plot(found["flip work"][index].cumsum(axis=-1).mean(axis=0), style, color=color, label=label)
    middle.plot(found["flips"][index].cumsum(axis=-1).mean(axis=0), style, color=color, label=label)
left.set(xlabel="steps", ylabel="flip work so far, $\\sum J$")
middle.set(xlabel="steps", ylabel="signs flipped so far")
middle.legend()
finals = found["quantized loss"][:, :, -1]
places = np.arange(len(kappas))
right.plot(places, finals, ".", color=COLORS[0], alpha=0.4)
right.plot(places, finals.mean(axis=1), "o-", color=COLORS[0], label="after 2,000 steps")
right.axhline(best, color="black", linestyle="--", linewidth=1, label="lowest there is")
right.set(xlabel=r"inertia $\kappa$", ylabel="$f$ at the binary weights", xticks=places)
right.set_xticklabels([f"{kappa:g}" for kappa in kappas])
right.legend()
plt.show()

# %% [markdown]
# At each $\kappa$ the mean of $|R|^2$ is below its bound, and the flip work adds up to less than 0. At
# $\kappa$ = 0 and 0.5 no sign flips at all, and $f$ at the binary weights, 29.4 at the start, falls no
# lower than 24.8; the closer $\kappa$ is to 1, the more signs flip and the lower it ends, at last close to
# the lowest there is.
#
# Three things to read with care. $J$ counts the moves of scales as well as of signs: at $\kappa = 0.5$ its
# sum is the lowest, without a flip. Each $\kappa$ has a merit $M$ of its own, so these sums do not say
# which $\kappa$ is best; the right panel does. And the sum may rise: with $\kappa$ = 0.99 and 1 it does so
# slowly from step 500 or so on. The rate stands as long as the sum stays bounded, which a run can show for
# itself alone.

# %% [markdown]
# ## Momentum
#
# Momentum makes of the gradients a direction that is no unbiased gradient at $x$: no theorem here covers
# it, whatever the learning rate. At $\rho = 1$ and the rate whose bound is least for plain gradients:

# %%
rho, noise, steps = 1.0, 8.0, 2000
known = constants(rho, noise, steps)
rate = theory.step_size(**known)
with_momentum = lambda *settings: optax.chain(optax.trace(0.9), proximal(*settings))
cases = {
    "plain": (rate, proximal),
    "momentum 0.9, same rate": (rate, with_momentum),
    "momentum 0.9, a tenth of the rate": (rate / 10, with_momentum),
}
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
counts = np.arange(1, steps + 1)
for (label, (learning_rate, build)), color, style in zip(cases.items(), COLORS, styles, strict=False):
    found = runs(learning_rate, rho, noise, steps=steps, build=build)["squared residual"].mean(axis=(0, 1))
    axes.loglog(counts, found.cumsum() / counts, style, color=color, label=label)
    print(f"{label}: {found.mean():.2f}")
axes.axhline(theory.bound(rate, **known), color="black", linestyle="--", linewidth=1, label="bound, plain")
print(f"bound: {theory.bound(rate, **known):.2f}")
axes.set(xlabel="steps", ylabel="running mean of $|R|^2$")
axes.legend(fontsize=9)
plt.show()

# %% [markdown]
# Momentum of 0.9 makes steps ten times as long in the end, and at the same rate the mean is far above the
# bound. At a tenth of the rate it ends below it, which nothing promised. On this problem momentum buys
# nothing: the plain run has the smallest residual.

# %% [markdown]
# ## Real data: logistic regression on digits
#
# One linear layer without a bias, its kernel binary, on scikit-learn's digits, centered. Here the constants
# have to be found:
#
# * *Smoothness.* `theory.estimate_smoothness` gives the largest $|$eigenvalue$|$ of the Hessian at a point:
# an estimate from below of $L$. For this loss there is a number from above as well: the Hessian of softmax
# is at most $\tfrac12 I$, so $L \le \tfrac12 \lambda_{\max}(X^\top X / n)$.
# * *Noise.* The variance of the gradient of one image, by the batch size, at the start; whether it was more
# at the end is looked at below.
# * *Decrease.* The loss is at least 0.

# %%
pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)
train_x, test_x, train_y, test_y = map(
    jnp.asarray, train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
)
train_x, test_x = train_x - train_x.mean(axis=0), test_x - train_x.mean(axis=0)
first = {"kernel": 0.1 * jax.random.normal(jax.random.key(1), (64, 10), jnp.float32)}
BATCH = 64


def losses(params, x, y):
    """The cross entropy of each image."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["kernel"], y)


def full_loss(params):
    """The loss on all training images."""
    return losses(params, train_x, train_y).mean()


def variance(params):
    """That of the gradient of one random image."""
    of_one = jax.grad(lambda params, x, y: losses(params, x[None], y[None])[0])
    gradients = jax.vmap(of_one, in_axes=(None, 0, 0))(params, train_x, train_y)
    return gradients["kernel"].var(axis=0).sum()


def accuracy(params):
    """The share of test images that are read rightly."""
    return ((test_x @ params["kernel"]).argmax(-1) == test_y).mean()


wide = np.float64(train_x)
from_above = float(np.linalg.eigvalsh(wide.T @ wide / len(wide))[-1]) / 2
from_below = theory.estimate_smoothness(full_loss, first, key=jax.random.key(0))
print(
    f"L is at least {from_below.value:.3f} (settled to {from_below.change:.0e}) and at most {from_above:.3f}"
)
noise = float(jnp.sqrt(variance(first) / BATCH))
print(f"sigma for batches of {BATCH}: {noise:.3f}")


# %%
@functools.partial(jax.jit, static_argnames=("steps", "full", "optimizer"))
def regression(key, learning_rate, penalty, *, steps, full=False, optimizer=None):
    """A run on the digits, by minibatches or by full gradients."""
    optimizer = optimizer or stam_proximal(learning_rate, penalty)

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(full_loss)(params)
        residual = diagnostics.residual(gradient, state, params, penalty=penalty).whole.total
        if not full:
            batch = jax.random.randint(key, (BATCH,), 0, len(train_x))
            gradient = jax.grad(lambda params: losses(params, train_x[batch], train_y[batch]).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), residual**2

    begin = (first, optimizer.init(first))
    (params, _), residuals = jax.lax.scan(step, begin, jax.random.split(key, steps))
    quantized = quantize(params)
    return {
        "squared residual": residuals,
        "relaxed": accuracy(params),
        "binary": accuracy(quantized),
        "changed": diagnostics.sign_flips(first, params),
        "smoothness": theory.estimate_smoothness(full_loss, params, key=jax.random.key(0)).value,
        "noise": jnp.sqrt(variance(params) / BATCH),
    }


steps = 2000
penalties = (0.001, 0.01, 0.1, 1.0)
known = {}
for rho in penalties:
    at_start = diagnostics.objective(
        full_loss(first), stam_proximal(1.0, rho).init(first), first, penalty=rho
    )
    known[rho] = {
        "smoothness": from_above,
        "noise": noise,
        "decrease": float(at_start.total),
        "steps": steps,
        "penalty": rho,
    }
rates = {rho: theory.step_size(**of_run) for rho, of_run in known.items()}
over = jax.vmap(functools.partial(regression, steps=steps), in_axes=(None, 0, 0))
found = jax.tree.map(np.asarray, over(KEYS[0], jnp.array(list(rates.values())), jnp.array(penalties)))

print("  rho    rate  mean |R|^2   bound  |R|^2 at the end  relaxed  binary")
for index, (rho, rate) in enumerate(rates.items()):
    squares = found["squared residual"][index]
    print(
        f"{rho:5g}  {rate:6.3f}  {squares.mean():10.4f}  {theory.bound(rate, **known[rho]):6.4f}"
        f"  {squares[-100:].mean():16.4f}  {found['relaxed'][index]:7.1%}  {found['binary'][index]:6.1%}"
    )
print(f"at the ends, L is at least {found['smoothness'].max():.3f}, sigma at most {found['noise'].max():.3f}")

# %% [markdown]
# In each run the mean is below its bound, at rates chosen by $L$ from above. The estimates of $L$ from
# below are less than a third of it: larger steps might do, without a promise. The noise was no larger at
# the end than at the start; in between nobody looked. And with $\rho = 1$ most digits are misread.

# %% [markdown]
# ## A small residual is not a good network
#
# The same without noise, by full gradients at $\eta = 1/L$, for as many steps; and, to compare, `stam` with
# an inertia of 1, on minibatches.

# %%
exact = jax.vmap(functools.partial(regression, steps=steps, full=True), in_axes=(None, None, 0))
stuck = jax.tree.map(np.asarray, exact(KEYS[0], 1 / from_above, jnp.array(penalties)))
blend = stam(optax.sgd(1 / from_above), hard_from=3 * steps // 4, inertia=1.0)
blended = regression(KEYS[0], 0.0, 0.0, steps=steps, optimizer=blend)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for index, (rho, color) in enumerate(zip(penalties, COLORS, strict=False)):
    left.loglog(counts[:steps], stuck["squared residual"][index], color=color, label=rf"$\rho$ = {rho:g}")
left.set(xlabel="steps", ylabel="$|R|^2$")
left.legend(fontsize=9)
right.semilogx(penalties, 100 * stuck["relaxed"], "o-", color=COLORS[0], label="relaxed")
right.semilogx(penalties, 100 * stuck["binary"], "s--", color=COLORS[1], label="binary")
right.axhline(100 * blended["binary"], color="black", linestyle=":", label="binary, stam")
right.set(xlabel=r"penalty $\rho$", ylabel="test accuracy, %", ylim=(0, 100))
right.legend(loc="lower left", fontsize=9)
plt.show()
print("|R|^2 at the end:", ", ".join(f"{value:.1e}" for value in stuck["squared residual"][:, -1]))
print("accuracy, binary:", ", ".join(f"{value:.1%}" for value in stuck["binary"]))
print(f"accuracy, stam: {blended['binary']:.1%}")
print("signs other than at the start:", ", ".join(f"{value:.1%}" for value in stuck["changed"]))

# %% [markdown]
# Left: every residual falls by orders of magnitude, and the one of $\rho = 1$ goes furthest. Right: just
# there the binary network reads no more than a fifth of the digits. Each sign pattern, with the scales that
# fit best, satisfies the condition on $y$; a large penalty holds all but a few signs of the pattern that
# the run began with, and the point it finds is as stationary as any. Theorem 1 says that the method gets
# close to a stationary point of $\Phi$, not to which, and $\Phi$ at a large $\rho$ has very many. So look
# at the loss or the accuracy of the binary network beside the residual, always.
