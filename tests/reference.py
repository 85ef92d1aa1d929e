"""The methods in float64 NumPy, from the math and in the plainest loops: what the library is compared with.

A number may be a function of the step count. A method is a function `advance(v, d, k)` from the latent
weights, the direction and the step count to the next relaxed weights x and latent weights v.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Number = float | Callable[[int], Any]
Advance = Callable[[Array, Array, int], tuple[Array, Array]]
Axis = int | tuple[int, ...]


def at(number: Number, k: int) -> float:
    return float(number(k)) if callable(number) else number


def groups(shape: tuple[int, ...], axis: Axis) -> list[list[tuple[int, ...]]]:
    """The indices of the weights that share one scale, group by group."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    sharing: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for i in np.ndindex(*shape):
        sharing.setdefault(tuple(i[a] for a in axes), []).append(i)
    return list(sharing.values())


def project(v: Any, axis: Axis = -1, *, scale: float | None = None) -> Array:
    """alpha * sign(v), alpha = mean |v| of the group, or the scale that is given, and sign(0) = +1."""
    v = np.asarray(v, np.float64)
    y = np.empty(v.shape)
    for group in groups(v.shape, axis):
        total = 0.0
        for i in group:
            total += abs(v[i])
        alpha = total / len(group) if scale is None else scale
        for i in group:
            y[i] = -alpha if v[i] < 0 else alpha
    return y


def box(limit: float) -> Callable[[Array, float], Array]:
    """The prox of the indicator of |u| <= limit."""
    return lambda v, step: np.minimum(np.maximum(v, -limit), limit)


def ridge(strength: float) -> Callable[[Array, float], Array]:
    """The prox of (strength / 2) |u|^2."""
    return lambda v, step: v / (1 + step * strength)


def l1(strength: float) -> Callable[[Array, float], Array]:
    """The prox of strength |u|_1."""
    return lambda v, step: np.where(
        v > step * strength, v - step * strength, np.where(v < -step * strength, v + step * strength, 0.0)
    )


def squared_distance(lam: Number) -> Callable[[Array, Array, int], Array]:
    """The minimizer of |u - w|^2 / 2 + (lam / 2) |u - y|^2."""

    def relax(w: Array, y: Array, k: int) -> Array:
        strength = at(lam, k)
        return y if math.isinf(strength) else (w + strength * y) / (1 + strength)

    return relax


def linear_blend(theta: Number) -> Callable[[Array, Array, int], Array]:
    return lambda w, y, k: (1 - at(theta, k)) * w + at(theta, k) * y


def proximal(
    eta: Number,
    rho: Number,
    *,
    prox: Callable[[Array, float], Array] | None = None,
    tau: Number = 0.0,
    axis: Axis = -1,
) -> Advance:
    """The three blocks minimized in turn: y at x, z at x, then x from all of them."""

    def advance(x: Array, d: Array, k: int) -> tuple[Array, Array]:
        e, r, t = at(eta, k), at(rho, k), at(tau, k)
        y = project(x, axis)
        if prox is not None and t > 0:
            z = prox(x, 1 / t)
            x = (x - e * d + e * r * y + e * t * z) / (1 + e * (r + t))
        else:
            x = (x - e * d + e * r * y) / (1 + e * r)
        return x, x

    return advance


def general(
    eta: Number,
    *,
    relax: Callable[[Array, Array, int], Array],
    kappa: Number,
    order: str = "last",
    prox: Callable[[Array, float], Array] | None = None,
    step: Number = 1.0,
    strength: Number = math.inf,
    axis: Axis = -1,
) -> Advance:
    """Three-block splitting: the proximal method and the lazy ones as two ends of one family."""

    def advance(v: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = v - at(eta, k) * d
        if prox is not None:
            lam = at(strength, k)
            z = prox(v if order == "first" else w, at(step, k))
            w = z if math.isinf(lam) else (w + lam * z) / (1 + lam)
        y = project(v if order == "first" else w, axis)
        x = relax(w, y, k)
        return x, x + at(kappa, k) * (w - x)

    return advance


def held(eta: Number, *, hard_from: int, hold: Number, axis: Axis = -1) -> Advance:
    """STAM on a single quantized leaf: a linear blend whose inertia follows from the steps before."""
    sizes: list[float] = []

    def advance(v: Array, d: Array, k: int) -> tuple[Array, Array]:
        u = -at(eta, k) * d
        w = v + u
        typical = sum(sizes) / len(sizes) if sizes else 0.0
        kappa = 1 - min(at(hold, k) * typical, 0.25) * typical
        sizes.append(min(float(np.mean(np.abs(u)) / np.mean(np.abs(w))), 1.0))
        theta = min(k / hard_from, 1.0)
        x = (1 - theta) * w + theta * project(w, axis)
        return x, x + kappa * (w - x)

    return advance


def binary_connect(eta: Number, *, clip: float, axis: Axis = -1, scale: float | None = None) -> Advance:
    """The latent weights are moved and clipped; the network runs on their signs."""

    def advance(v: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = np.minimum(np.maximum(v - at(eta, k) * d, -clip), clip)
        return project(w, axis, scale=scale), w

    return advance


def binary_relax(
    eta: Number, *, growth_every: int, hard_from: int, strength: float, growth: float, axis: Axis = ()
) -> Advance:
    """The network runs between the latent weights and the binary ones, then on the binary ones."""

    def advance(v: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = v - at(eta, k) * d
        lam = strength
        for _ in range(k // growth_every):
            lam = lam * growth
        y = project(w, axis)
        return (y if k >= hard_from else (w + lam * y) / (1 + lam)), w

    return advance


def prox_quant(eta: Number, *, threshold: Number, hard_from: int, clip: float = 1.0) -> Advance:
    """A gradient step, clipped, then each weight moved toward the nearest of -1 and +1 by a threshold."""

    def advance(x: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = np.minimum(np.maximum(x - at(eta, k) * d, -clip), clip)
        most = math.inf if k >= hard_from else at(threshold, k)
        x = np.empty(w.shape)
        for i in np.ndindex(*w.shape):
            y = -1.0 if w[i] < 0 else 1.0
            gap = w[i] - y
            x[i] = y if abs(gap) <= most else w[i] - math.copysign(most, gap)
        return x, x

    return advance


def parq(
    eta: Number, *, hard_from: int, anneal_from: int = 0, steepness: float = 10.0, axis: Axis = -1
) -> Advance:
    """The latent weights are moved; the network runs on their image under a ramp that steepens to a jump."""

    def logistic(t: float) -> float:
        return 1 / (1 + math.exp(-t))

    def inverse_slope(k: int) -> float:
        progress = (k - anneal_from) / (hard_from - anneal_from)
        if progress <= 0:
            return 1.0
        if progress >= 1:
            return 0.0
        low, high = logistic(-steepness / 2), logistic(steepness / 2)
        return (logistic(steepness * (0.5 - progress)) - low) / (high - low)

    def advance(v: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = v - at(eta, k) * d
        y, s = project(w, axis), inverse_slope(k)
        x = np.empty(w.shape)
        for i in np.ndindex(*w.shape):
            alpha = abs(y[i])
            x[i] = y[i] if s == 0 else min(max(w[i] / s, -alpha), alpha)
        return x, w

    return advance


def md_tanh(eta: Number, *, growth: float, growth_every: int, hard_from: int) -> Advance:
    """The gradient at the tanh of the dual weights moves those; the tanh steepens."""

    def advance(v: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = v - at(eta, k) * d
        beta = 1.0
        for _ in range(k // growth_every):
            beta = beta * growth
        x = np.empty(w.shape)
        for i in np.ndindex(*w.shape):
            x[i] = (-1.0 if w[i] < 0 else 1.0) if k >= hard_from else math.tanh(beta * w[i])
        return x, w

    return advance


class Admm:
    """Scaled ADMM, its three blocks kept apart: float weights x, quantized weights y, multipliers u.

    The optimizer's directions are made of the gradients of the augmented Lagrangian, `gradient`.
    """

    def __init__(
        self, start: Array, eta: Number, *, penalty: float, dual_every: int, hard_from: int, axis: Axis = ()
    ):
        self.eta, self.penalty, self.axis = eta, penalty, axis
        self.dual_every, self.hard_from = dual_every, hard_from
        self.x, self.y = start, project(start, axis)
        self.u = self.x - self.y

    def gradient(self, v: Array, g: Array) -> Array:
        return g + self.penalty * (self.x - self.y + self.u)

    def __call__(self, v: Array, d: Array, k: int) -> tuple[Array, Array]:
        """What the library keeps is v, x + u as it was when y was last found."""
        if k >= self.hard_from:
            self.x = self.y
            return self.y, v
        self.x = self.x - at(self.eta, k) * d
        if (k + 1) % self.dual_every == 0:
            v = self.x + self.u
            self.y = project(v, self.axis)
            self.u = self.u + self.x - self.y
        return self.x, v


class Bop:
    """Weights of +1 and -1, flipped by the moving average of their gradients."""

    def __init__(self, *, adaptivity: Number, threshold: Number):
        self.adaptivity, self.threshold = adaptivity, threshold
        self.average = np.zeros(0)

    def __call__(self, x: Array, d: Array, k: int) -> tuple[Array, Array]:
        if k == 0:
            x, self.average = project(x, scale=1.0), np.zeros(x.shape)
        gamma = at(self.adaptivity, k)
        after = np.empty(x.shape)
        for i in np.ndindex(*x.shape):
            self.average[i] = (1 - gamma) * self.average[i] + gamma * d[i]
            after[i] = -x[i] if self.average[i] * x[i] > at(self.threshold, k) else x[i]
        return after, after


class Problem(NamedTuple):
    """A small smooth loss that is not convex, mean r^2 / (1 + r^2), with the noise of its gradients fixed."""

    inputs: Array
    targets: Array
    kernel: Array
    bias: Array
    kernel_noise: Array
    bias_noise: Array

    @classmethod
    def draw(cls, seed: int = 0, *, steps: int = 50, noise: float = 0.3) -> "Problem":
        rng = np.random.default_rng(seed)
        inputs = rng.normal(size=(12, 5))
        return cls(
            inputs=inputs,
            targets=inputs @ rng.normal(size=(5, 3)),
            kernel=0.5 * rng.normal(size=(5, 3)),
            bias=0.1 * rng.normal(size=3),
            kernel_noise=noise * rng.normal(size=(steps, 5, 3)),
            bias_noise=noise * rng.normal(size=(steps, 3)),
        )

    def loss(self, kernel: Array, bias: Array) -> float:
        r = self.inputs @ kernel + bias - self.targets
        return float(np.sum(r**2 / (1 + r**2)) / len(self.inputs))

    def gradient(self, kernel: Array, bias: Array) -> tuple[Array, Array]:
        r = self.inputs @ kernel + bias - self.targets
        slope = 2 * r / (1 + r**2) ** 2 / len(self.inputs)
        return self.inputs.T @ slope, slope.sum(axis=0)

    def smoothness(self) -> float:
        """L: the second derivative of r^2 / (1 + r^2) is at most 2 in size."""
        inputs = np.hstack([self.inputs, np.ones((len(self.inputs), 1))])
        return float(2 * np.linalg.eigvalsh(inputs.T @ inputs)[-1] / len(inputs))

    def train(
        self,
        advance: Advance,
        eta: Number,
        *,
        decay: float = 0.0,
        nesterov: bool = False,
        gradient: Callable[[Array, Array], Array] = lambda v, g: g,
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Kernel (quantized), bias (in float) and v after each step, with heavy-ball momentum in front.

        It is given `gradient(v, g)` in the place of the kernel's gradient g.
        """
        kernel, bias, v = self.kernel, self.bias, self.kernel
        kernel_trace, bias_trace = np.zeros_like(kernel), np.zeros_like(bias)
        for k in range(len(self.kernel_noise)):
            kernel_gradient, bias_gradient = self.gradient(kernel, bias)
            kernel_gradient = gradient(v, kernel_gradient + self.kernel_noise[k])
            bias_gradient = bias_gradient + self.bias_noise[k]
            kernel_trace = kernel_gradient + decay * kernel_trace
            bias_trace = bias_gradient + decay * bias_trace
            if nesterov:
                kernel_direction = kernel_gradient + decay * kernel_trace
                bias_direction = bias_gradient + decay * bias_trace
            else:
                kernel_direction, bias_direction = kernel_trace, bias_trace
            kernel, v = advance(v, kernel_direction, k)
            bias = bias - at(eta, k) * bias_direction
            yield kernel, bias, v
