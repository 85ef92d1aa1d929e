"""The methods in float64 NumPy, from the maths and in the plainest loops: what the engine is compared with.

A number may be a function of the step count. A method is a function `advance(v, d, k)` from the float block,
the direction and the step count to the next relaxed weights x and float block v.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Number = float | Callable[[int], Any]
Advance = Callable[[Array, Array, int], tuple[Array, Array]]


def at(number: Number, k: int) -> float:
    return float(number(k)) if callable(number) else number


def groups(shape: tuple[int, ...], scale: str | None, axis: int = -1) -> list[list[tuple[int, ...]]]:
    """The indices of the weights that share one scale, group by group."""
    indices = list(np.ndindex(*shape))
    if scale != "channel":
        return [indices]
    return [[i for i in indices if i[axis] == channel] for channel in range(shape[axis])]


def project(v: Array, scale: str | None = "channel", axis: int = -1) -> Array:
    """alpha * sign(v), alpha = mean |v| of the group (1 without scales), sign(0) = +1."""
    v = np.asarray(v, np.float64)
    y = np.empty(v.shape)
    for group in groups(v.shape, scale, axis):
        total = 0.0
        for i in group:
            total += abs(v[i])
        alpha = 1.0 if scale is None else total / len(group) if group else 0.0
        for i in group:
            y[i] = -alpha if v[i] < 0 else alpha
    return y


def box(limit: float) -> Callable[[Array, float], Array]:
    """The prox of the indicator of |u| <= limit."""
    return lambda v, step: np.minimum(np.maximum(v, -limit), limit)


def ridge(strength: float) -> Callable[[Array, float], Array]:
    """The prox of (strength / 2) |u|^2."""
    return lambda v, step: v / (1 + step * strength)


def squared_distance(lam: Number) -> Callable[[Array, Array, int], Array]:
    """The minimiser of |u - w|^2 / 2 + (lam / 2) |u - y|^2."""

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
    scale: str | None = "channel",
) -> Advance:
    """The three blocks minimised in turn: y at x, z at x, then x from all of them."""

    def advance(x: Array, d: Array, k: int) -> tuple[Array, Array]:
        e, r, t = at(eta, k), at(rho, k), at(tau, k)
        y = project(x, scale)
        if prox is not None and math.isinf(t):
            w = prox(x - e * d, e)
            x = (w + e * r * y) / (1 + e * r)
        elif prox is not None and t > 0:
            z = prox(x, 1 / t)
            x = (x - e * d + e * r * y + e * t * z) / (1 + e * (r + t))
        else:
            x = (x - e * d + e * r * y) / (1 + e * r)
        return x, x

    return advance


def binary_connect(eta: Number, *, clip: float | None = 1.0, scale: str | None = None) -> Advance:
    """The float weights are moved and clipped; the network runs on their signs."""

    def advance(w: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = w - at(eta, k) * d
        if clip is not None:
            w = np.minimum(np.maximum(w, -clip), clip)
        return project(w, scale), w

    return advance


def binary_relax(
    eta: Number, *, growth_every: int, hard_from: int, strength: float, growth: float, scale: str = "tensor"
) -> Advance:
    """The network runs between the float weights and the binary ones, then on the binary ones."""

    def advance(w: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = w - at(eta, k) * d
        lam = strength
        for _ in range(k // growth_every):
            lam = lam * growth
        y = project(w, scale)
        return (y if k >= hard_from else (w + lam * y) / (1 + lam)), w

    return advance


def prox_quant(eta: Number, *, growth: float, hard_from: int, clip: float | None = 1.0) -> Advance:
    """A gradient step, clipped, then each weight moved towards the nearest of -1 and +1 by a threshold."""

    def advance(x: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = x - at(eta, k) * d
        if clip is not None:
            w = np.minimum(np.maximum(w, -clip), clip)
        threshold = math.inf if k >= hard_from else at(eta, k) * growth * k
        x = np.empty(w.shape)
        for i in np.ndindex(*w.shape):
            y = -1.0 if w[i] < 0 else 1.0
            gap = w[i] - y
            x[i] = y if abs(gap) <= threshold else w[i] - math.copysign(threshold, gap)
        return x, x

    return advance


def parq(
    eta: Number, *, hard_from: int, anneal_from: int = 0, steepness: float = 10.0, scale: str = "channel"
) -> Advance:
    """The float weights are moved; the network runs on their image under a ramp that steepens to a jump."""

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

    def advance(w: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = w - at(eta, k) * d
        y, s = project(w, scale), inverse_slope(k)
        x = np.empty(w.shape)
        for i in np.ndindex(*w.shape):
            alpha = abs(y[i])
            x[i] = y[i] if s == 0 else min(max(w[i] / s, -alpha), alpha)
        return x, w

    return advance


def md_tanh(eta: Number, *, growth: float, growth_every: int, hard_from: int) -> Advance:
    """The gradient at the tanh of the dual weights moves those; the tanh steepens."""

    def advance(w: Array, d: Array, k: int) -> tuple[Array, Array]:
        w = w - at(eta, k) * d
        beta = 1.0
        for _ in range(k // growth_every):
            beta = beta * growth
        x = np.empty(w.shape)
        for i in np.ndindex(*w.shape):
            x[i] = (-1.0 if w[i] < 0 else 1.0) if k >= hard_from else math.tanh(beta * w[i])
        return x, w

    return advance


class Admm:
    """Scaled ADMM, its three blocks kept apart: float weights x, quantised weights y, multipliers u."""

    def __init__(
        self, eta: Number, *, penalty: float, dual_every: int, hard_from: int, scale: str = "tensor"
    ):
        self.eta, self.penalty, self.scale = eta, penalty, scale
        self.dual_every, self.hard_from = dual_every, hard_from
        self.x = self.y = self.u = self.v = np.zeros(0)

    def __call__(self, v: Array, d: Array, k: int) -> tuple[Array, Array]:
        """The float block v, x + u as it was when y was last found, is what the engine keeps."""
        if k == 0:
            self.x, self.v = v, v
            self.y = project(v, self.scale)
            self.u = v - self.y
        if k >= self.hard_from:
            return self.y, self.v
        pull = at(self.eta, k) * self.penalty
        self.x = (self.x - at(self.eta, k) * d + pull * (self.y - self.u)) / (1 + pull)
        if (k + 1) % self.dual_every == 0:
            self.v = self.x + self.u
            self.y = project(self.v, self.scale)
            self.u = self.u + self.x - self.y
        return self.x, self.v


class Bop:
    """Weights of +1 and -1, flipped by the moving average of their gradients."""

    def __init__(self, *, adaptivity: Number, threshold: float):
        self.adaptivity, self.threshold = adaptivity, threshold
        self.average = np.zeros(0)

    def __call__(self, x: Array, d: Array, k: int) -> tuple[Array, Array]:
        if k == 0:
            x, self.average = project(x, None), np.zeros(x.shape)
        gamma = at(self.adaptivity, k)
        after = np.empty(x.shape)
        for i in np.ndindex(*x.shape):
            self.average[i] = (1 - gamma) * self.average[i] + gamma * d[i]
            after[i] = -x[i] if self.average[i] * x[i] > self.threshold else x[i]
        return after, after


def general(
    eta: Number,
    *,
    relax: Callable[[Array, Array, int], Array],
    kappa: Number,
    order: str,
    prox: Callable[[Array, float], Array] | None = None,
    tau: Number = math.inf,
    scale: str | None = "channel",
) -> Advance:
    """The engine: the proximal method and the lazy ones as two ends of one family."""

    def advance(v: Array, d: Array, k: int) -> tuple[Array, Array]:
        e, t = at(eta, k), at(tau, k)
        w = v - e * d
        if prox is not None and math.isinf(t):
            w = prox(w, e)
        elif prox is not None and t > 0:
            w = (w + e * t * prox(v, 1 / t)) / (1 + e * t)
        y = project(v if order == "first" else w, scale)
        x = relax(w, y, k)
        return x, x + at(kappa, k) * (w - x)

    return advance


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
        gate: float = math.inf,
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Kernel (quantised), bias (in float) and v after each step, with heavy-ball momentum in front.

        Where v is larger than the gate, the kernel's gradient counts as 0.
        """
        kernel, bias, v = self.kernel, self.bias, self.kernel
        kernel_trace, bias_trace = np.zeros_like(kernel), np.zeros_like(bias)
        for k in range(len(self.kernel_noise)):
            kernel_gradient, bias_gradient = self.gradient(kernel, bias)
            kernel_gradient = np.where(np.abs(v) > gate, 0.0, kernel_gradient + self.kernel_noise[k])
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
