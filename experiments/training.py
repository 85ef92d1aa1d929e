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
from experiments.config import SettingsError, TrainSettings
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
        params, _ = self._initial(seed=0)
        self.selection = optimizers.choose(params, settings)
        self.optimizer = optimizers.build(
            settings,
            self.selection,
            steps=self.steps_per_epoch * settings.epochs,
            epoch=self.steps_per_epoch,
        )
        self._step = jax.jit(self._advance, donate_argnums=0)

    def _initial(self, seed: int) -> tuple[Any, Any]:
        network = models.build(self.settings.model, self.dataset, width=self.settings.width, seed=seed)
        self.graph, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
        return params, stats

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
        """
        start = time.perf_counter()
        params, stats = self._initial(seed)
        state = State(params, stats, self.optimizer.init(params))
        key = jax.random.key(seed)
        train = jax.device_put(self.dataset.train)
        hard = self._hard_leaves(state)
        for epoch in range(self.settings.epochs):
            order_key, step_key = jax.random.split(jax.random.fold_in(key, epoch))
            order = np.asarray(jax.random.permutation(order_key, len(train.labels)))
            losses = []
            for i in range(self.steps_per_epoch):
                chosen = order[i * self.settings.batch_size : (i + 1) * self.settings.batch_size]
                state, value = self._step(state, jax.random.fold_in(step_key, i), train, chosen)
                losses.append(value)
            before, hard = hard, self._hard_leaves(state)
            metrics = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * self.steps_per_epoch,
                "loss": float(np.mean(jax.device_get(losses))),
                **self._validate(state),
                "sign_flips": float(stam_jax.sign_flips(before, hard)) if hard else None,
                "seconds": time.perf_counter() - start,
            }
            runs.append_metrics(folder / runs.METRICS, metrics)
            progress(metrics)
        row = self._judge(state, folder)
        row |= {"seed": seed, "seconds": time.perf_counter() - start}
        return row

    def _accuracy(self, params: Any, stats: Any, split: Split) -> float:
        return evaluation.accuracy(self.graph, params, stats, split)

    def _calibrated(self, params: Any, stats: Any) -> Any:
        return evaluation.batch_statistics(
            self.graph,
            params,
            stats,
            self.dataset.train,
            images=self.settings.calibration_images,
            batch_size=self.settings.batch_size,
        )

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantised."""
        return self.settings.method == "float"

    def _hard_leaves(self, state: State) -> dict[str, jax.Array]:
        """The binary weights alone, by name."""
        if self.is_float:
            return {}
        leaves = stam_jax.quantized_leaves(state.opt_state, state.params)
        return {name: leaf.hard for name, leaf in leaves.items()}

    def _validate(self, state: State) -> dict[str, Any]:
        """Accuracy on the validation images, of the relaxed and of the binary network, and their gap."""
        validation = self.dataset.validation
        relaxed = self._accuracy(state.params, state.stats, validation)
        if self.is_float:
            return {"relaxed_accuracy": relaxed, "hard_accuracy": None, "quantisation_gap": None}
        hard = evaluation.checked_hard_params(state.opt_state, state.params)
        stats = self._calibrated(hard, state.stats)
        return {
            "relaxed_accuracy": relaxed,
            "hard_accuracy": self._accuracy(hard, stats, validation),
            "quantisation_gap": float(stam_jax.quantisation_gap(state.opt_state, state.params)),
        }

    def _judge(self, state: State, folder: Path) -> dict[str, Any]:
        """Write the weights, read the binary ones back, and measure on the test images."""
        test = self.dataset.test
        relaxed = {**files.to_arrays(state.params), **files.to_arrays(state.stats)}
        weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        row = {
            "method": self.settings.method,
            "relaxed_accuracy": self._accuracy(state.params, state.stats, test),
            "hard_accuracy": None,
            "hard_accuracy_running_statistics": None,
            "binary_share": 0.0,
            "bytes_float": files.save_float(folder / runs.RELAXED, relaxed),
            "bytes_packed": None,
        }
        if self.is_float:
            return row
        hard = evaluation.checked_hard_params(state.opt_state, state.params)
        stats = self._calibrated(hard, state.stats)
        leaves = stam_jax.quantized_leaves(state.opt_state, state.params)
        arrays = {**files.to_arrays(hard), **files.to_arrays(stats)}
        row["bytes_packed"] = files.save_packed(folder / runs.PACKED, arrays, leaves)
        read_back = files.load_packed(folder / runs.PACKED)
        for name, array in arrays.items():
            if not np.array_equal(array, read_back[name]):
                raise AssertionError(f"{name} does not come back from {runs.PACKED} as it was.")
        binary = files.binary_weights(folder / runs.PACKED)
        row["binary_share"] = sum(binary.values()) / weights
        row["hard_accuracy"] = self._accuracy(
            files.from_arrays(read_back, hard), files.from_arrays(read_back, stats), test
        )
        row["hard_accuracy_running_statistics"] = self._accuracy(hard, state.stats, test)
        return row

    def judge_file(self, packed: Path) -> float:
        """The accuracy on the test images of the binary network in a file of `files.save_packed`.

        Raises:
            ValueError: if the file holds another network.
        """
        params, stats = self._initial(seed=0)
        arrays = files.load_packed(packed)
        return self._accuracy(
            files.from_arrays(arrays, params), files.from_arrays(arrays, stats), self.dataset.test
        )
