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
# # Your own network, quantizer and relaxation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stam-jax/stam_jax/blob/main/notebooks/04_your_own.ipynb)
#
# You will quantize a Flax model of your own in fifteen lines, read the table of what is quantized and
# change it by patterns; write a quantizer and a relaxation of your own, and train with them; and take the
# network out of training: packed into a file, read back, and exported as StableHLO.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("stam_jax") is None:
    # Where JAX came with a plugin for an accelerator, a newer JAX needs the plugin that goes with it.
    plugins = {"jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13", "libtpu": "tpu"}
    found = [f"jax[{extra}]" for module, extra in plugins.items() if importlib.util.find_spec(module)]
    package = "stam-jax[experiments,export] @ git+https://github.com/stam-jax/stam_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package, *found], check=True)

# %%
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import export
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from stam_jax import (
    Binary,
    load_packed,
    pack,
    packed_metadata,
    quantize,
    relaxations,
    save_packed,
    schedules,
    stam,
    tabulate,
    three_block_splitting,
    unpack,
)
from stam_jax.quantizers import levels_of, nearest

digits = load_digits()
images = (digits.images / 16).astype(np.float32)
parts = train_test_split(images, digits.target, test_size=0.25, stratify=digits.target, random_state=0)
train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}")


# %% [markdown]
# ## A model
#
# A small transformer: it cuts a digit into sixteen patches of 2 by 2 pixels, and lets them attend to each
# other. Put your own in its place; nothing below depends on what it is.


# %%
class Block(nnx.Module):
    """Attention and a network of two layers, around each of which the input is carried."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Reads images of shape [count, 8, 8]."""

    def __init__(self, rngs: nnx.Rngs, width: int = 48):
        self.patches = nnx.Linear(4, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * rngs.params.normal((16, width)))
        self.block = Block(width, rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.patches(x) + self.positions
        return self.head(self.norm(self.block(x)).mean(axis=1))


# %% [markdown]
# ## What would be quantized
#
# `tabulate` shows what `stam` does by itself. It goes by ranks and names, and says of each leaf which rule
# decided:

# %%
model = Transformer(nnx.Rngs(0))
print(tabulate(nnx.state(model, nnx.Param)))

# %% [markdown]
# `positions` has rank 2, but it is not called a kernel. Kernels of attention have rank 3: those that make
# queries, keys and values have a scale for each place of their last axis, the size of a head, and all heads
# share it. A scale for each head as well takes two axes. And the layer that reads pixels is so small that it
# may as well stay in full precision. A dictionary of patterns over paths says all of this. The first pattern
# that matches decides, one that names a module covers all below it, `"*"` stands for the leaves of the table
# above, and a pattern without effect is an error.


# %%
def choose(quantizer, heads):
    """What is quantized, by one quantizer for the kernels of attention heads and one for the others."""
    attention = {f"*/{name}/kernel": heads for name in ("query", "key", "value")}
    return {"patches": None} | attention | {"*": quantizer}


binary = choose(Binary(), heads=Binary(axis=(-2, -1)))
print(tabulate(nnx.state(model, nnx.Param), binary))

# %% [markdown]
# ## Fifteen lines
#
# The body of `train` has fifteen lines. What is new in them is what goes around Adam; and, to evaluate,
# `quantize`. Adam takes small steps, so the inertia is closer to 1 than the default.

# %%
EPOCHS, BATCH = 20, 32
STEPS = EPOCHS * (len(train_images) // BATCH)
HARD_FROM = 3 * STEPS // 4
adam = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))


def train(method):
    """A trained model."""
    model = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, method, wrt=nnx.Param)

    def loss(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def epoch(carry, batch):
        model, optimizer = carry
        optimizer.update(model, nnx.grad(loss)(model, train_images[batch], train_labels[batch]))
        return carry

    for key in jax.random.split(jax.random.key(0), EPOCHS):
        order = jax.random.permutation(key, len(train_images))[: STEPS // EPOCHS * BATCH]
        epoch((model, optimizer), order.reshape(-1, BATCH))
    return model


@jax.jit
def apply(graph, params, images):
    """The logits of some images."""
    return nnx.merge(graph, params)(images)


def accuracy(model, quantizer):
    """That of the quantized network on the test images."""
    hard = quantize(nnx.state(model, nnx.Param), quantizer)
    return float((apply(nnx.graphdef(model), hard, test_images).argmax(-1) == test_labels).mean())


model = train(stam(adam, hard_from=HARD_FROM, quantizer=binary, inertia=0.9999))
results = {"Binary, linear blend": accuracy(model, binary)}
print(f"accuracy of the binary network: {results['Binary, linear blend']:.1%}")

# %% [markdown]
# ## A quantizer of your own
#
# It is a hashable object with two methods: `scales`, the scales that fit an array best, and `levels`, the
# values that a weight can take at these scales, in ascending order. This one has scales that are powers of
# two, so that a shift serves for the multiplication. For a group with signs $s_i$ and $m =
# \mathrm{mean}|w_i|$,
#
# $$\sum_i (w_i - \alpha s_i)^2 = \mathrm{const} + n\,(\alpha - m)^2 ,$$
#
# so the best power of two is the one nearest to $m$. Projecting, packing and tables follow from the two
# methods. As a dataclass it can be named in a file; one with a field `axis` is given the axis of the output
# channels where that is None.


# %%
@dataclasses.dataclass(frozen=True)
class Shift:
    """Binary weights whose scales are powers of two, one for each place along some axes."""

    axis: int | tuple[int, ...] | None = None

    def scales(self, w):
        """The power of two nearest to the mean of the sizes of the weights that share it."""
        channels = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        shared = tuple(i for i in range(w.ndim) if i not in {axis % w.ndim for axis in channels})
        mean = jnp.abs(w.astype(jnp.float32)).mean(axis=shared, keepdims=True)
        _, exponent = jnp.frexp(mean)
        below = jnp.ldexp(1.0, exponent - 1)  # The largest that is not above the mean.
        return jnp.where(mean < 1.5 * below, below, 2 * below)

    def levels(self, scales):
        """The two values."""
        return -scales, scales


w = jax.random.normal(jax.random.key(0), (500, 6)) * jnp.array([0.1, 0.4, 1.0, 1.8, 2.0, 5.0])
y = nearest(w, levels_of(Shift(axis=-1), w))
tried = jnp.stack([jnp.square(w - scale * jnp.sign(w)).sum(axis=0) for scale in 2.0 ** jnp.arange(-6, 6)])
print("scales:", Shift(axis=-1).scales(w).ravel())
is_nearest = jnp.allclose(jnp.square(w - y).sum(axis=0), tried.min(axis=0), rtol=1e-5)
print("as near as the nearest power of two:", is_nearest)
print("projected twice, the same:", jnp.array_equal(nearest(y, levels_of(Shift(axis=-1), y)), y))

# %% [markdown]
# ## A relaxation of your own
#
# It is a hashable object with `at(count)`, which gives the map $(w, y, \text{levels}) \mapsto x$ of that
# step; `three_block_splitting` takes any. This one sets the largest weights to their levels first, and more
# and more of the others as its share grows: they are the furthest from changing their signs.


# %%
@dataclasses.dataclass(frozen=True)
class LargestFirst:
    """A share of the weights of each array, the largest, are hard; the others stay as they are."""

    share: optax.Schedule

    def at(self, count):
        """The map of a step."""
        share = self.share(count)
        return lambda w, y, levels: jnp.where(jnp.abs(w) >= jnp.quantile(jnp.abs(w), 1 - share), y, w)


shifts = choose(Shift(), heads=Shift(axis=(-2, -1)))
model = train(stam(adam, hard_from=HARD_FROM, quantizer=shifts, inertia=0.9999))
results["Shift, linear blend"] = accuracy(model, shifts)

largest_first = relaxations.HardFrom(LargestFirst(schedules.linear_to_hard(HARD_FROM)), HARD_FROM)
model = train(three_block_splitting(adam, quantizer=shifts, relaxation=largest_first, inertia=0.9999))
results["Shift, largest first"] = accuracy(model, shifts)
for name, value in results.items():
    print(f"{name:22}  {value:.1%}")

# %% [markdown]
# The parts go together as they stand. One seed each, and a test set in which an image is 0.2 points: these
# numbers rank nothing.
#
# ## Packing
#
# `pack` and `save_packed` take quantizers of your own as well; `load_packed` has to be told of the class,
# for nothing in a file is executed. Give `pack` what the training was given: another quantizer is an error.

# %%
params = nnx.state(model, nnx.Param)
packed = pack(params, shifts)
size = save_packed(
    "transformer.safetensors", packed, metadata={"accuracy": round(results["Shift, largest first"], 4)}
)
loaded = load_packed("transformer.safetensors", like=params, quantizers=[Shift])

hard = quantize(params, shifts)
equal = jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), unpack(loaded), hard))
print(f"{size:,} bytes; what is read equals what was saved: {equal}")
print(packed_metadata("transformer.safetensors"))
print(tabulate(loaded, shifts))

# %% [markdown]
# ## Export
#
# [StableHLO](https://openxla.org/stablehlo) runs without this library and without Flax. Here the packed
# network itself is closed over: its bits are constants of the program, which unpacks them as it runs.
# `batch` stands for any number of images, and the program is one for CPUs, GPUs and TPUs.

# %%
graph = nnx.graphdef(model)


@jax.jit
def network(images):
    """The logits of some images, by the packed network."""
    return nnx.merge(graph, unpack(loaded))(images)


(batch,) = export.symbolic_shape("batch")
signature = jax.ShapeDtypeStruct((batch, 8, 8), jnp.float32)
program = export.export(network, platforms=("cpu", "cuda", "tpu"))(signature)
Path("transformer.stablehlo").write_bytes(program.serialize())

again = export.deserialize(Path("transformer.stablehlo").read_bytes())
print("in:", *again.in_avals, " out:", *again.out_avals, " for:", *again.platforms)
for count in (1, 450):
    here, there = network(test_images[:count]), jax.jit(again.call)(test_images[:count])
    print(f"{count} images, equal: {bool(jnp.array_equal(here, there))}")
print(f"accuracy of what was read: {float((there.argmax(-1) == test_labels).mean()):.1%}")

# %% [markdown]
# For the packed files of the command line's own runs there is `python -m experiments export`, which also
# writes ONNX and folders for a model hub:
# [docs/experiments.md](https://github.com/stam-jax/stam_jax/blob/main/docs/experiments.md). More on
# quantizers and relaxations, with the methods they make up, is in
# [docs/methods.md](https://github.com/stam-jax/stam_jax/blob/main/docs/methods.md).
