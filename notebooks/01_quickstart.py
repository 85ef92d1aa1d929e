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
# This notebook trains a small convolutional network to read handwritten digits with one bit per weight. You
# will put `stam` around an Optax optimizer, compare the binary network with the same network in floating
# point and with the straight-through estimator, save it to a packed file, and read it back.
#
# The notebook runs on a CPU in about a minute. It also runs as it is on GPUs and TPUs, and splits each
# batch over all devices.

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

from stam_jax import (
    Binary,
    load_packed,
    pack,
    quantize,
    save_packed,
    stam,
    straight_through,
    tabulate,
    unpack,
)

plt.rcParams.update({"figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, for color-blind readers.

devices = jax.devices()
print(f"{len(devices)} x {devices[0].device_kind}")

# %% [markdown]
# ## Images
#
# Scikit-learn includes 1,797 handwritten digits of 8 by 8 pixels. A quarter of them is for testing.

# %%
digits = load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
labels = digits.target.astype(np.int32)
train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
)
print(f"{len(train_labels):,} images for training, {len(test_labels)} for testing")

# %% [markdown]
# ## A network
#
# The network is ordinary Flax code: three convolutions with batch normalization, and a linear head.


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


table = tabulate(nnx.state(Network(nnx.Rngs(0)), nnx.Param))
print(table)

# %% [markdown]
# The table shows what `stam` quantizes by default: the kernels become binary, with one scale per output
# channel. Biases and the parameters of normalization stay in full precision. The gap is the relative
# distance of each kernel to its nearest binary one.
#
# ## Three optimizers
#
# `stam` goes around any Optax optimizer, here SGD with momentum. The optimizer moves latent weights $w$,
# which `stam` keeps in its state. The network runs on relaxed weights
#
# $$x = (1 - \theta)\, w + \theta\, y, \qquad y = P_Q(w) = \alpha\, \mathrm{sign}(w),$$
#
# between the latent weights and their projection $y$ onto the binary ones. The share $\theta$ grows evenly
# from 0 to 1 at the step `hard_from`. From then on the network in training is binary.
#
# There are two baselines. One is the same SGD alone, which trains in floating point. The other is the
# [straight-through estimator](../docs/methods.md#straight_through), which runs on the binary weights
# throughout and applies their gradient to the latent ones. It has the same binary weights and scales as
# `stam` here. All three start from the same weights and see the same batches.

# %%
epochs = 20
batch_size = 8 * max(8, len(devices))
steps_per_epoch = len(train_labels) // batch_size
steps = epochs * steps_per_epoch

sgd = optax.sgd(optax.cosine_decay_schedule(0.2, steps), momentum=0.9)
optimizers = {
    "float": sgd,
    "straight-through": straight_through(sgd, clip=float("inf"), quantizer=Binary()),
    "stam": stam(sgd, hard_from=round(0.75 * steps)),
}

# %% [markdown]
# ## Training on all devices
#
# One mesh holds all devices. Each batch is split along its first axis, and every device holds all weights.
# Under `jit` that is enough: JAX sums the gradients, and batch normalization uses the whole batch.

# %%
mesh = Mesh(np.asarray(devices), ("data",))
everywhere = NamedSharding(mesh, PartitionSpec())
spread = NamedSharding(mesh, PartitionSpec("data"))


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


# %% [markdown]
# After each epoch two networks are tested: the one in training, and the binary one that `quantize` makes of
# it. Batch normalization gathers its statistics at the weights in training, so both networks get new ones
# from the training images first.

# %%
graph = nnx.graphdef(Network(nnx.Rngs(0)))


@jax.jit
def fresh_statistics(params, stats):
    """Batch-norm statistics of all training images, at these weights."""
    network = nnx.merge(graph, params, stats, copy=True)
    network.train()
    network.set_attributes(nnx.BatchNorm, momentum=0.0)
    network(train_images)
    return nnx.state(network, nnx.BatchStat)


@jax.jit
def predict(params, stats, images):
    """The logits of some images."""
    network = nnx.merge(graph, params, stats, copy=True)
    network.eval()
    return network(images)


def accuracy(params, stats):
    """The share of test images that are read correctly."""
    logits = predict(params, fresh_statistics(params, stats), test_images)
    return float((logits.argmax(-1) == test_labels).mean())


def train(name):
    """A trained model, and for each epoch its loss and both test accuracies."""
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optimizers[name], wrt=nnx.Param)
    for part in (model, optimizer):
        nnx.update(part, jax.device_put(nnx.state(part), everywhere))
    draws = np.random.default_rng(0)
    curves = {"loss": [], "in training": [], "binary": []}

    for epoch in range(1, epochs + 1):
        order = draws.permutation(len(train_labels))[: steps_per_epoch * batch_size]
        losses = []
        for batch in np.split(order, steps_per_epoch):
            arrays = jax.device_put((train_images[batch], train_labels[batch]), spread)
            losses.append(train_step(model, optimizer, *arrays))
        # One device is enough for testing.
        params, stats = jax.device_put(nnx.split(model, nnx.Param, nnx.BatchStat)[1:], devices[0])
        curves["loss"].append(float(np.mean(losses)))
        curves["in training"].append(accuracy(params, stats))
        curves["binary"].append(accuracy(quantize(params), stats))
        if epoch % 5 == 0:
            print(f"{name}, epoch {epoch}: training loss {curves['loss'][-1]:.4f}")
    return model, curves


models, results = {}, {}
for name in optimizers:
    models[name], results[name] = train(name)

whole = all(leaf.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(models["stam"])))
share = batch_size // len(devices)
print(f"on each device: {share} of the {batch_size} images of a batch; all weights: {whole}")

# %% [markdown]
# ## The comparison

# %%
print("test accuracy     in training  made binary")
for name, curves in results.items():
    print(f"{name:16}  {curves['in training'][-1]:11.1%}  {curves['binary'][-1]:11.1%}")

figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
axes.axvspan(0.75 * epochs, epochs, color="0.93", label="here stam is binary")
for name, which, color, style, label in (
    ("float", "in training", "black", ":", "float"),
    ("straight-through", "binary", GREEN, "-.", "straight-through"),
    ("stam", "in training", BLUE, "-", "stam, in training"),
    ("stam", "binary", ORANGE, "--", "stam, made binary"),
):
    curve = 100 * np.asarray(results[name][which])
    axes.plot(range(1, epochs + 1), curve, style, color=color, label=label)
axes.set(xlabel="epoch", ylabel="test accuracy, %", xlim=(1, epochs), xticks=range(5, epochs + 1, 5))
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# All three networks end with about the same accuracy. One test image is 0.2 points, so differences below a
# point are noise, and digits this easy do not rank methods. [Results](../docs/results.md) compares the
# methods on harder images and with several seeds. What this run shows:
#
# * One bit per weight costs this network next to nothing, whether `stam` or the straight-through estimator
#   trains it.
# * The binary weights have to be trained. The float network loses about ten points when it is only rounded.
# * The training loss of `stam` rises as its weights become binary, and ends above that of the others.
# * The network that `stam` has in training learns as fast as the float one. Its binary network lags until
#   the two become the same, in the shaded part.
#
# ## One bit per weight
#
# `pack` stores each binary kernel as bits and scales. `save_packed` writes the packed parameters and the
# batch-norm statistics to one safetensors file. For comparison, the same function writes the weights as
# float32 arrays.

# %%
params, stats = jax.device_put(nnx.split(models["stam"], nnx.Param, nnx.BatchStat)[1:], devices[0])
stats = fresh_statistics(params, stats)
size = save_packed("digits.safetensors", {"params": pack(params), "stats": stats})
size_float = save_packed("digits-float.safetensors", {"params": params, "stats": stats})
print(f"{size_float:,} bytes in float32, {size:,} packed: {size_float / size:.1f} times less")

# %% [markdown]
# The file is more than 17 times smaller, and not 32 times, because scales, biases, statistics and the
# header of the file are not binary. In a larger network they are a smaller part.
#
# ## Reading the file
#
# `load_packed` checks the file before it uses any of it. `unpack` returns the binary weights, bit for bit.
# Inside `jit` the devices hold only the bits between calls.

# %%
loaded = load_packed("digits.safetensors", like={"params": params, "stats": stats})


@jax.jit
def predict_packed(tree, images):
    """The logits of some images, by a packed network."""
    return predict(unpack(tree["params"]), tree["stats"], images)


logits = predict_packed(loaded, test_images)
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
# These are predictions of the binary network. The wrong ones come first, in orange, with the correct digit.

# %%
first = np.asarray(unpack(loaded["params"])["convolutions"][0]["kernel"][...])
figure, panels = plt.subplots(4, 8, figsize=(7, 3.6), layout="constrained")
for axes, kernel in zip(panels.flat, np.moveaxis(first[:, :, 0], -1, 0), strict=True):
    axes.imshow(kernel >= 0, cmap=ListedColormap([ORANGE, BLUE]), vmin=0, vmax=1)
    axes.set_title(rf"$\alpha$ = {np.abs(kernel).max():.2f}", fontsize=8, pad=3)
    axes.axis("off")
plt.show()

# %% [markdown]
# These are the 32 kernels of the first layer, with $+\alpha$ in blue and $-\alpha$ in orange. Each takes
# nine bits and a scale.
#
# ## Next
#
# * [What the convergence theorem says of a run](02_convergence.ipynb)
# * [The relaxations, from full precision to binary](03_relaxations.ipynb)
# * [Your own network, quantizer and relaxation](04_your_own.ipynb)
# * [How to choose a method](../docs/methods.md), and [what is quantized](../docs/quantized.md)
