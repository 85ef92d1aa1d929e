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
# # A binary network in five minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stam-jax/stam_jax/blob/main/notebooks/01_quickstart.ipynb)
#
# A small convolutional network learns to read handwritten digits, with every kernel $\alpha \cdot (\pm 1)$:
# one bit per weight. You will see how `stam` goes around an Optax optimizer, the accuracy of the relaxed and
# of the binary network over the epochs, what is in the packed file, and what a network read from it says of
# digits it has not seen. The notebook runs as it stands on a CPU, on GPUs and on TPUs; the batch is shared
# between all devices there are.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.colors import ListedColormap
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from stam_jax import load_packed, pack, quantize, save_packed, stam, tabulate, unpack

plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's, which color-blind readers tell apart.

devices = jax.devices()
print(f"{len(devices)} x {devices[0].device_kind}")

# %% [markdown]
# ## Images
#
# Scikit-learn's 1,797 digits of 8 by 8 pixels come with it. A quarter is for testing.

# %%
digits = load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
labels = digits.target.astype(np.int32)
train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
)
print(f"{len(train_labels):,} images to learn from, {len(test_labels)} to be tested on")

# %% [markdown]
# ## A network
#
# Three convolutions with batch normalization, and a linear head: an ordinary Flax network, which knows
# nothing of binary weights.


# %%
class Network(nnx.Module):
    """Reads images of shape [count, 8, 8, 1]."""

    def __init__(self, rngs: nnx.Rngs):
        widths, strides = (1, 32, 64, 64), (1, 2, 1)
        self.convolutions, self.norms = nnx.List(), nnx.List()
        for inputs, outputs, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            self.convolutions.append(
                nnx.Conv(inputs, outputs, (3, 3), strides=stride, use_bias=False, rngs=rngs)
            )
            self.norms.append(nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs))
        self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return self.head(x.mean(axis=(1, 2)))


model = Network(nnx.Rngs(0))
print(tabulate(nnx.state(model, nnx.Param)))

# %% [markdown]
# The table is what `stam` quantizes by itself: kernels become binary, biases and the parameters of
# normalization stay in full precision. The gap is how far each kernel still is from binary.
#
# ## The optimizer
#
# `stam` goes around any Optax optimizer, here SGD with momentum. The optimizer moves latent weights $w$,
# which are kept in its state. The network runs on relaxed weights
#
# $$x = (1 - \theta)\, w + \theta\, y, \qquad y = P_Q(w) = \alpha\, \mathrm{sign}(w),$$
#
# between the latent weights and their projection $y$ onto the binary ones. The share $\theta$ grows from
# 0 to 1 until the step `hard_from`, after three quarters of the run; for the last quarter the network that is
# trained *is* the binary one.

# %%
epochs = 30
batch_size = 8 * max(8, len(devices))
steps_per_epoch = len(train_labels) // batch_size
steps = epochs * steps_per_epoch

sgd = optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9)
optimizer = nnx.Optimizer(model, stam(sgd, hard_from=round(0.75 * steps)), wrt=nnx.Param)

# %% [markdown]
# ## All devices
#
# One mesh over all devices, whichever they are: a batch is spread over them along its first axis, and each
# holds all weights. Under `jit` that is all it takes: JAX adds up the gradients, and batch normalization
# sees the whole batch.

# %%
mesh = Mesh(np.asarray(devices), ("data",))
everywhere = NamedSharding(mesh, PartitionSpec())
spread = NamedSharding(mesh, PartitionSpec("data"))

for part in (model, optimizer):
    nnx.update(part, jax.device_put(nnx.state(part), everywhere))


# %% [markdown]
# ## Training


# %%
@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@jax.jit
def fresh_statistics(graph, params, stats, images):
    """Batch-norm statistics of all those images, at these weights."""
    network = nnx.merge(graph, params, stats, copy=True)
    network.train()
    network.set_attributes(nnx.BatchNorm, momentum=0.0)
    network(images)
    return nnx.state(network, nnx.BatchStat)


@jax.jit
def predict(graph, params, stats, images):
    """The logits of some images."""
    network = nnx.merge(graph, params, stats, copy=True)
    network.eval()
    return network(images)


def accuracy(graph, params, stats, images, labels):
    """The share of images that are read rightly."""
    return float((predict(graph, params, stats, images).argmax(-1) == labels).mean())


# %% [markdown]
# After each epoch both networks are measured on the test images: the relaxed one, at $x$, and the binary
# one, which `quantize` makes of it. Batch normalization kept its running statistics at the relaxed weights;
# at others they are others, so they are taken anew from the training images, for both.

# %%
whole_train, whole_test = jax.device_put((train_images, test_images), everywhere)
graph = nnx.graphdef(model)
draws = np.random.default_rng(0)
curves = {"relaxed": [], "binary": []}

for _ in range(epochs):
    model.train()
    order = draws.permutation(len(train_labels))[: steps_per_epoch * batch_size]
    for batch in np.split(order, steps_per_epoch):
        train_step(model, optimizer, *jax.device_put((train_images[batch], train_labels[batch]), spread))

    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    for name, weights in {"relaxed": params, "binary": quantize(params)}.items():
        renewed = fresh_statistics(graph, weights, stats, whole_train)
        curves[name].append(accuracy(graph, weights, renewed, whole_test, test_labels))

whole = all(leaf.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(model)))
share = batch_size // len(devices)
print(f"on each device: {share} of the {batch_size} images of a batch; all weights: {whole}")
print(", ".join(f"{name}: {100 * curve[-1]:.1f}%" for name, curve in curves.items()))

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.axvspan(0.75 * epochs, epochs, color="0.92", label="$x = y$")
for (name, curve), color, style in zip(curves.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
    axes.plot(range(1, epochs + 1), 100 * np.asarray(curve), style, color=color, label=name)
axes.set(xlabel="epoch", ylabel="test accuracy, %", xlim=(1, epochs))
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# The relaxed network learns within a few epochs; the binary one lags while $\theta$ is small, catches up as
# the two are drawn together, and is the same network in the shaded part. The test set has 450 images, so
# one of them is 0.2 points, and small ups and downs mean nothing.
#
# ## A bit per weight
#
# `pack` gives the network's tree with each binary kernel as bits and scales. With the batch-norm statistics
# it is whole, and `save_packed` writes it to an ordinary safetensors file. The same function takes the
# weights as float32 arrays, for comparison.

# %%
packed = {"params": pack(params), "stats": renewed}
size = save_packed("digits.safetensors", packed, metadata={"labels": "0 to 9"})
size_float = save_packed("digits-float.safetensors", {"params": params, "stats": renewed})
print(f"{size_float:,} bytes in float32, {size:,} packed: {size_float / size:.1f} times less")

# %%
found = tabulate(packed)
print(found)
print(f"the header takes {size - found.nbytes:,} bytes")

# %% [markdown]
# A binary kernel takes one bit per weight and a scale for each output channel. The leaves that stay in full
# precision, the scales and the header take a part of this file that they would not take of a larger
# network's.
#
# ## Reading it back
#
# `load_packed` checks the file before it believes any of it. `unpack` gives the binary network, bit for
# bit; within `jit`, the devices hold no more than the bits between calls.

# %%
loaded = load_packed("digits.safetensors", like={"params": params, "stats": stats})


@jax.jit
def predict_packed(tree, images):
    """The logits of some images, by a packed network."""
    return predict(graph, unpack(tree["params"]), tree["stats"], images)


logits = predict_packed(loaded, whole_test)
same = jax.tree.all(jax.tree.map(jnp.array_equal, unpack(loaded["params"]), quantize(params)))
print("the weights that were saved:", same)
print(f"accuracy of what was read: {100 * float((logits.argmax(-1) == test_labels).mean()):.1f}%")

# %%
guesses = np.asarray(logits.argmax(-1))
shown = np.concatenate([np.flatnonzero(guesses != test_labels), np.arange(len(guesses))])[:16]
figure, panels = plt.subplots(2, 8, figsize=(8, 2.6), layout="constrained")
for axes, index in zip(panels.flat, shown, strict=True):
    is_right = guesses[index] == test_labels[index]
    axes.imshow(test_images[index, ..., 0], cmap="gray_r")
    title = f"{guesses[index]}" if is_right else f"{guesses[index]}, is {test_labels[index]}"
    axes.set_title(title, fontsize=10, color="black" if is_right else ORANGE)
    axes.axis("off")
plt.show()

# %% [markdown]
# What the binary network says of some test images: first those that it gets wrong, in orange with the right
# digit, then others.

# %%
first = np.asarray(unpack(loaded["params"])["convolutions"][0]["kernel"][...])
figure, panels = plt.subplots(4, 8, figsize=(7, 3.6), layout="constrained")
for axes, kernel in zip(panels.flat, np.moveaxis(first[:, :, 0], -1, 0), strict=True):
    axes.imshow(kernel >= 0, cmap=ListedColormap([ORANGE, BLUE]), vmin=0, vmax=1)
    axes.set_title(rf"$\alpha$ = {np.abs(kernel).max():.2f}", fontsize=8, pad=3)
    axes.axis("off")
plt.show()

# %% [markdown]
# The 32 kernels of the first layer, $+\alpha$ in blue and $-\alpha$ in orange: nine bits and a scale each.
#
# Further: [what the theorem says, and what not](02_convergence.ipynb), [the
# relaxations](03_relaxations.ipynb), and [your own networks, quantizers and
# relaxations](04_your_own.ipynb).
