"""Training a network with one method: the step, the epochs, and the row of results at the end."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stam_jax
from experiments import evaluation, files, models, optimizers, runs
from experiments.config import DivergedError, SettingsError, TrainSettings
from experiments.data import Dataset, Split


class State(NamedTuple):
    """What a training step carries on.

    Args:
        params: the weights x.
        stats: batch-norm statistics.
        opt_state: of the optimiser; the hard weights are read from it.
    """

    params: Any
    stats: Any
    opt_state: Any


class Trainer:
    """A network and a method on an image set, ready to be trained from any seed.

    Everything that the settings can be wrong about is found out here, before anything is written.

    Args:
        settings: of the runs; their seed is left to `run`.
        dataset: to learn.

    Raises:
        SettingsError: if the settings do not go together.
    """

    def __init__(self, settings: TrainSettings, dataset: Dataset):
        if settings.batch_size > len(dataset.train.labels):
            raise SettingsError(
                f"--batch-size: {settings.batch_size} images are more than the "
                f"{len(dataset.train.labels)} there are to train on."
            )
        self.settings, self.dataset = settings, dataset
        self.steps_per_epoch = len(dataset.train.labels) // settings.batch_size
        self.graph, params, _ = self._build(jax.random.key(0))
        self.selection = optimizers.choose(params, settings)
        self.optimizer = optimizers.build(
            settings,
            self.selection,
            steps=self.steps_per_epoch * settings.epochs,
            epoch=self.steps_per_epoch,
        )
        self._step = jax.jit(self._advance, donate_argnums=0)

    def _build(self, key: jax.Array) -> tuple[Any, Any, Any]:
        """The graph of the network, its weights, and its batch-norm statistics."""
        network = models.build(self.settings.model, self.dataset, width=self.settings.width, key=key)
        graph, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
        return graph, params, stats

    def _advance(
        self, state: State, key: jax.Array, train: Split, chosen: jax.Array
    ) -> tuple[State, jax.Array]:
        """One step on the chosen images; returns the loss as well."""
        images = self.dataset.augment(key, train.images[chosen])
        labels = train.labels[chosen]

        def loss(params: Any) -> tuple[jax.Array, Any]:
            network = nnx.merge(self.graph, params, state.stats, copy=True)
            logits = network(images, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), nnx.state(network, nnx.BatchStat)

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, stats, opt_state), value

    def run(self, seed: int, folder: Path, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Train from one seed; write metrics and weights; judge on the test images, once.

        Args:
            seed: of the initial weights, the order of the images and their augmentation.
            folder: where the files go.
            progress: called with the metrics of each epoch.

        Returns:
            The row of results.

        Raises:
            DivergedError: if the loss of an epoch is not a finite number.
        """
        start = time.perf_counter()
        init_key, key = jax.random.split(jax.random.key(seed))
        _, params, stats = self._build(init_key)
        state = State(params, stats, self.optimizer.init(params))
        train = jax.device_put(self.dataset.train)
        leaves = self._leaves(state)
        for epoch in range(self.settings.epochs):
            order_key, step_key = jax.random.split(jax.random.fold_in(key, epoch))
            order = np.asarray(jax.random.permutation(order_key, len(train.labels)))
            losses = []
            for i in range(self.steps_per_epoch):
                chosen = order[i * self.settings.batch_size : (i + 1) * self.settings.batch_size]
                state, value = self._step(state, jax.random.fold_in(step_key, i), train, chosen)
                losses.append(value)
            loss = float(np.mean(jax.device_get(losses)))
            if not np.isfinite(loss):
                raise DivergedError(
                    f"{self.settings.method}, seed {seed}: the loss is {loss} in epoch {epoch + 1}. "
                    "A smaller --learning-rate may help."
                )
            before, leaves = leaves, self._leaves(state)
            metrics = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * self.steps_per_epoch,
                "loss": loss,
                **self._accuracies(state, leaves, self.dataset.validation),
                "quantisation_gap": (
                    float(stam_jax.quantisation_gap(state.opt_state, state.params)) if leaves else None
                ),
                "sign_flips": (float(stam_jax.sign_flips(_hard(before), _hard(leaves))) if leaves else None),
                "seconds": time.perf_counter() - start,
            }
            runs.append_metrics(folder / runs.METRICS, metrics)
            progress(metrics)
        row = self._judge(state, folder)
        row |= {"seed": seed, "seconds": time.perf_counter() - start}
        return row

    def _leaves(self, state: State) -> dict[str, stam_jax.QuantizedLeaf]:
        """The binary leaves, seen to be binary; none in a float run."""
        if self.settings.method == "float":
            return {}
        return evaluation.checked_leaves(state.opt_state, state.params)

    def _calibrated(self, params: Any, stats: Any) -> Any:
        """Batch-norm statistics estimated anew for some weights."""
        return evaluation.batch_statistics(
            self.graph,
            params,
            stats,
            self.dataset.train,
            images=self.settings.calibration_images,
            batch_size=self.settings.batch_size,
        )

    def _accuracies(
        self, state: State, leaves: dict[str, stam_jax.QuantizedLeaf], split: Split
    ) -> dict[str, float | None]:
        """Accuracy of the relaxed (or float) network and of the binary one.

        Each with batch-norm statistics estimated anew for its weights, which treats all alike, and with those
        that ran along in training.
        """
        networks = {"relaxed": state.params}
        if leaves:
            networks["hard"] = stam_jax.hard_params(state.opt_state, state.params)
        measured: dict[str, float | None] = {}
        for name in ("relaxed", "hard"):
            for title, calibrate in (("accuracy", True), ("accuracy_running_statistics", False)):
                accuracy = None
                if name in networks:
                    params = networks[name]
                    stats = self._calibrated(params, state.stats) if calibrate else state.stats
                    accuracy = evaluation.accuracy(self.graph, params, stats, split)
                measured[f"{name}_{title}"] = accuracy
        return measured

    def _judge(self, state: State, folder: Path) -> dict[str, Any]:
        """Measure on the test images; write the weights; see that the file holds the network measured."""
        leaves = self._leaves(state)
        relaxed = {**files.to_arrays(state.params), **files.to_arrays(state.stats)}
        row = {
            "method": self.settings.method,
            **self._accuracies(state, leaves, self.dataset.test),
            "binary_share": 0.0,
            "bytes_float": files.save_float(folder / runs.RELAXED, relaxed),
            "bytes_packed": None,
        }
        if not leaves:
            return row
        hard = stam_jax.hard_params(state.opt_state, state.params)
        stats = self._calibrated(hard, state.stats)
        arrays = {**files.to_arrays(hard), **files.to_arrays(stats)}
        path = folder / runs.PACKED
        row["bytes_packed"] = files.save_packed(path, arrays, leaves)
        weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        row["binary_share"] = sum(files.binary_weights(path).values()) / weights
        if self.judge_file(path) != row["hard_accuracy"]:
            raise AssertionError(f"{path} does not hold the network that was measured.")
        return row

    def judge_file(self, packed: Path) -> float:
        """The accuracy on the test images of the binary network in a file of `files.save_packed`.

        Raises:
            SettingsError: if the file holds another network.
        """
        _, params, stats = self._build(jax.random.key(0))
        arrays = files.load_packed(packed)
        try:
            params, stats = files.from_arrays(arrays, params), files.from_arrays(arrays, stats)
        except ValueError as error:
            raise SettingsError(f"{packed} holds another network: {error}") from error
        return evaluation.accuracy(self.graph, params, stats, self.dataset.test)


def _hard(leaves: dict[str, stam_jax.QuantizedLeaf]) -> dict[str, jax.Array]:
    return {name: leaf.hard for name, leaf in leaves.items()}
