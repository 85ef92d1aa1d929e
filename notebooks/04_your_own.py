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
# This notebook quantizes a small transformer. You will read the table of what is quantized and change it by
# patterns, train with `stam` beside two baselines, and write a quantizer and a relaxation of your own. In
# the end you will pack the network into a file, read it back, and export it as StableHLO.

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
    package = f"{clones[0]}[experiments,export]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package, *found], check=True)

# %%
import dataclasses

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
    straight_through,
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
# ## A network
#
# The transformer cuts a digit into sixteen patches of 2 by 2 pixels and has one block of attention and two
# dense layers. You can put your own network in its place. Then change the patterns below, which name some
# of its layers.


# %%
class Transformer(nnx.Module):
    """Reads images of shape [count, 8, 8]."""

    def __init__(self, rngs: nnx.Rngs, width: int = 48):
        self.patches = nnx.Linear(4, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * rngs.params.normal((16, width)))
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(3))
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = self.patches(patches) + self.positions
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(axis=1))


# %% [markdown]
# ## What is quantized
#
# `tabulate` shows what `stam` quantizes by default. The last column says which rule decided.

# %%
params = nnx.state(Transformer(nnx.Rngs(0)), nnx.Param)
print(tabulate(params))

# %% [markdown]
# Two things are worth a change here:
#
# * The kernels for queries, keys and values have the shape (inputs, heads, size). By default all heads
#   share their scales. `Binary(axis=(-2, -1))` gives each head its own.
# * The layer that reads pixels, `patches`, is so small that it can stay in full precision.
#
# A dictionary of patterns says so. The first pattern that matches decides, and `"*"` stands for the default
# leaves. [What is quantized](../docs/quantized.md#patterns) has all rules.


# %%
def choose(quantizer, heads):
    """The quantizer of the kernels in attention heads, and that of all others."""
    attention = {f"*/{name}": heads for name in ("query", "key", "value")}
    return {"patches": None} | attention | {"*": quantizer}


binary = choose(Binary(), heads=Binary(axis=(-2, -1)))
print(tabulate(params, binary))

# %% [markdown]
# ## Training, with baselines
#
# `train` is an ordinary training loop and takes any Optax optimizer. `stam` goes around Adam here.
#
# The baselines are Adam alone, which trains in floating point, and the
# [straight-through estimator](../docs/methods.md#straight_through) around the same Adam, with the same
# binary weights.

# %%
EPOCHS, BATCH = 20, 32
STEPS = EPOCHS * (len(train_images) // BATCH)
HARD_FROM = 3 * STEPS // 4
adam = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))


def train(optimizer):
    """A trained model, and its training loss in each epoch."""
    model = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def loss(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    @nnx.scan
    def epoch(carry, batch):
        model, optimizer = carry
        value, gradients = nnx.value_and_grad(loss)(model, train_images[batch], train_labels[batch])
        optimizer.update(model, gradients)
        return carry, value

    losses = []
    for key in jax.random.split(jax.random.key(0), EPOCHS):
        order = jax.random.permutation(key, len(train_images))[: STEPS // EPOCHS * BATCH]
        _, values = epoch((model, optimizer), order.reshape(-1, BATCH))
        losses.append(float(values.mean()))
    return model, losses


@jax.jit
def apply(graph, params, images):
    """The logits of some images."""
    return nnx.merge(graph, params)(images)


def report(name, model, losses, quantizer):
    """Prints how the training loss fell, and returns the quantized network's test accuracy."""
    params = nnx.state(model, nnx.Param)
    hard = params if quantizer is None else quantize(params, quantizer)
    accuracy = float((apply(nnx.graphdef(model), hard, test_images).argmax(-1) == test_labels).mean())
    fall = "  ".join(f"{loss:.4f}" for loss in losses[4::5])
    print(f"{name:20}  loss at epochs 5, 10, 15, 20: {fall}  accuracy {accuracy:.1%}")
    return accuracy


for name, optimizer, quantizer in (
    ("float", adam, None),
    ("straight-through", straight_through(adam, clip=float("inf"), quantizer=binary), binary),
    ("stam", stam(adam, hard_from=HARD_FROM, quantizer=binary), binary),
):
    report(name, *train(optimizer), quantizer)

# %% [markdown]
# The accuracies are for the test images, and those of the last two are for the binary networks. They are
# about a point apart. With one seed and 450 test images that is noise, so this comparison does not rank the
# methods. It shows that one bit per weight costs this network little: the training loss ends somewhat
# higher than in floating point. [Results](../docs/results.md) compares the methods with several seeds.
#
# ## A quantizer of your own
#
# A quantizer is a hashable object with two methods. `scales` returns the scales that fit an array best, and
# `levels` returns the values that a weight can take at these scales, in ascending order. Projection,
# packing and tables follow from the two.
#
# This one has scales that are powers of two, so that a shift can replace the multiplication. For $n$
# weights $w_i$ with signs $s_i$ and the mean size $m$,
#
# $$\sum_i (w_i - \alpha s_i)^2 = \mathrm{const} + n\,(\alpha - m)^2 ,$$
#
# so the best power of two is the one nearest to $m$. A quantizer that is a dataclass can be named in a
# file. If it has a field `axis` that is None, the library sets it to the axis of the output channels.


# %%
@dataclasses.dataclass(frozen=True)
class Shift:
    """Binary weights whose scales are powers of two, one for each place along some axes."""

    axis: int | tuple[int, ...] | None = None

    def scales(self, w):
        """The power of two nearest to the mean size of the weights that share it."""
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
# A relaxation is a hashable object with a method `at(count)`, which returns the map
# $(w, y, \text{levels}) \mapsto x$ of that step. `three_block_splitting` takes any relaxation.
#
# This one makes the largest weights hard first, since they are the furthest from a change of sign. Its
# share of hard weights grows until all are hard.


# %%
@dataclasses.dataclass(frozen=True)
class LargestFirst:
    """The largest weights of each array are hard; the others stay as they are."""

    share: optax.Schedule

    def at(self, count):
        """The map of a step."""
        share = self.share(count)
        return lambda w, y, levels: jnp.where(jnp.abs(w) >= jnp.quantile(jnp.abs(w), 1 - share), y, w)


shifts = choose(Shift(), heads=Shift(axis=(-2, -1)))
largest_first = relaxations.HardFrom(LargestFirst(schedules.linear_to_hard(HARD_FROM)), HARD_FROM)
model, losses = train(three_block_splitting(adam, quantizer=shifts, relaxation=largest_first, inertia=0.9999))
accuracy = report("Shift, LargestFirst", model, losses, shifts)

# %% [markdown]
# ## Packing
#
# `pack` and `save_packed` take your own quantizers as well. Give `pack` the quantizer of the training: it
# raises an error for weights that are not where the quantizer puts them. `load_packed` has to be told of
# the class, because it executes nothing from a file.

# %%
params = nnx.state(model, nnx.Param)
packed = pack(params, shifts)
size = save_packed("transformer.safetensors", packed, metadata={"accuracy": round(accuracy, 4)})
loaded = load_packed("transformer.safetensors", like=params, quantizers=[Shift])

hard = quantize(params, shifts)
equal = jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), unpack(loaded), hard))
print(f"{tabulate(params, shifts).nbytes_whole:,} bytes in float32, {size:,} bytes in the file")
print(f"the weights that were saved: {equal}")
print(packed_metadata("transformer.safetensors"))

# %% [markdown]
# ## Export
#
# [StableHLO](https://openxla.org/stablehlo) runs without this library and without Flax. The program
# contains the bits of the packed network as constants and unpacks them as it runs. It takes any number of
# images, and it runs on CPUs, GPUs and TPUs.

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
# [Deploy](../docs/deploy.md) says more on packed files and export. The
# [how-to guides](../docs/howto.md#a-quantizer-of-your-own) have further quantizers and relaxations.
