"""Problems whose constants are known: what the theorems are held against."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

Loss = Callable[[Any], jax.Array]
Draw = Callable[[Any, jax.Array], Any]


class Problem(NamedTuple):
    """A smooth loss with stochastic gradients.

    Args:
        loss: f.
        draw: a stochastic gradient at a point, from a random key.
        start: where runs begin.
        smoothness: L.
        noise: sigma, or a number above it.
        least: a number that the loss is never below.
    """

    loss: Loss
    draw: Draw
    start: jax.Array
    smoothness: float
    noise: float
    least: float


def _with_noise(loss: Loss, noise: float) -> Draw:
    """The gradient, with Gaussian noise of that root mean square."""

    def draw(x: Any, key: jax.Array) -> Any:
        return jax.grad(loss)(x) + noise / np.sqrt(x.size) * jax.random.normal(key, x.shape, x.dtype)

    return draw


def waves(noise: float = 2.0, size: int = 32, seed: int = 0) -> Problem:
    """A quadratic and a wave c cos(w x) for each weight: not convex, for c w^2 is above the curvature."""
    draws = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(draws.normal(size=(size, size)))
    curvature = axes @ np.diag(draws.uniform(0.1, 1.0, size)) @ axes.T
    target = draws.choice([-1.0, 1.0], size) * draws.uniform(0.5, 1.5, size)
    height, frequency = 0.3, 2.0

    def loss(x: Any) -> jax.Array:
        away = x - target
        return 0.5 * away @ (curvature @ away) + height * jnp.sum(jnp.cos(frequency * x))

    return Problem(
        loss=loss,
        draw=_with_noise(loss, noise),
        start=jnp.asarray(draws.normal(size=size)),
        smoothness=float(np.linalg.eigvalsh(curvature)[-1]) + height * frequency**2,
        noise=noise,
        least=-height * size,
    )


def planted_signs(noise: float = 2.0, size: int = 64, seed: int = 0) -> Problem:
    """Least squares whose least value, 0, is taken at a vector of signs."""
    draws = np.random.default_rng(seed)
    inputs = draws.normal(size=(2 * size, size))
    targets = inputs @ draws.choice([-1.0, 1.0], size)
    loss = lambda x: jnp.sum((inputs @ x - targets) ** 2) / (4 * size)
    return Problem(
        loss=loss,
        draw=_with_noise(loss, noise),
        start=jnp.asarray(0.5 * draws.normal(size=size)),
        smoothness=float(np.linalg.eigvalsh(inputs.T @ inputs / (2 * size))[-1]),
        noise=noise,
        least=0.0,
    )


def digits(images: int = 200, batch: int = 8) -> Problem:
    """Logistic regression on handwritten digits, by minibatches.

    The Hessian of the cross-entropy in the logits has no eigenvalue above 1/2, and its gradient no norm above
    the root of 2.
    """
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[:images] / 16 - 0.3, jnp.asarray(labels[:images])
    inputs = jnp.asarray(pixels)

    def mean_loss(x: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits = inputs @ x
        right = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - right)

    def draw(x: Any, key: jax.Array) -> Any:
        chosen = jax.random.randint(key, (batch,), 0, images)
        return jax.grad(mean_loss)(x, inputs[chosen], labels[chosen])

    return Problem(
        loss=lambda x: mean_loss(x, inputs, labels),
        draw=draw,
        start=jnp.asarray(0.1 * np.random.default_rng(0).normal(size=(64, 10))),
        smoothness=float(np.linalg.eigvalsh(pixels.T @ pixels / images)[-1]) / 2,
        noise=float(np.sqrt(2 * np.mean(np.sum(pixels**2, axis=1)) / batch)),
        least=0.0,
    )


PROBLEMS = {"waves": waves, "planted signs": planted_signs, "digits": digits}
