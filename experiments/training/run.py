"""Training a network with one method: the step, the epochs, and the row of results at the end."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stam_jax
from experiments.config import DivergedError, Execution, SettingsError, StoppedError, TrainSettings
from experiments.data import batches, devices
from experiments.data.image_sets import Dataset
from experiments.data.records import Split
from experiments.deployment import packed_network
from experiments.networks import evaluation, float_files, models
from experiments.reporting import run_folder
from experiments.training import optimizers
from experiments.training.checkpoints import Checkpoints
from stam_jax import diagnostics

# How many steps the host may be ahead of the devices: enough to keep them busy, few enough to report on.
_AHEAD = 16
# How many steps devices other than CPUs take in one call, at most: a GPU may be done with a step before the
# host has called for the next.
_STEPS_PER_CALL = 32


class State(NamedTuple):
    """What a training step carries on.

    Args:
        params: the weights x.
        stats: batch-norm statistics.
        opt_state: of the optimizer.
        loss: sum of the losses of the epoch's steps so far.
        step: steps taken.
    """

    params: Any
    stats: Any
    opt_state: Any
    loss: jax.Array
    step: jax.Array


class Trained(NamedTuple):
    """What training ends with.

    Args:
        state: after the last step.
        seconds: that it took, over all its parts if it was stopped.
    """

    state: State
    seconds: float


class Progress(NamedTuple):
    """What a run tells of itself while it goes on.

    Args:
        step: called with the number of steps taken, after every call to the devices.
        metrics: called with the metrics of each measured epoch.
    """

    step: Callable[[int], None] = lambda step: None
    metrics: Callable[[dict[str, Any]], None] = lambda metrics: None


class Measured(NamedTuple):
    """A network as it is measured.

    Args:
        params: its weights.
        stats: its batch-norm statistics, estimated anew for these weights.
    """

    params: Any
    stats: Any


@jax.jit
def _signs(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The signs of some weights, a byte each."""
    return jax.tree.map(lambda y: jnp.where(y >= 0, jnp.int8(1), jnp.int8(-1)), weights)


_flips = jax.jit(diagnostics.sign_flips)
_EXECUTION, _SILENT = Execution(), Progress()


class Trainer:
    """A network and a method on an image set, ready to be trained from any seed.

    Everything that the settings can be wrong about is found out here, before anything is written.

    Args:
        settings: of the runs; their seed is left to `run`.
        dataset: to learn.
        execution: where the images lie, and how often the state is saved.

    Raises:
        SettingsError: if the settings do not go together.
    """

    def __init__(self, settings: TrainSettings, dataset: Dataset, execution: Execution = _EXECUTION):
        if (count := settings.training_images) is not None:
            if count > dataset.train.size:
                raise SettingsError(
                    f"--training-images: {settings.dataset} has {dataset.train.size} to learn from; "
                    f"got {count}."
                )
            dataset = dataset.with_fewer(count)
        if settings.batch_size > dataset.train.size:
            raise SettingsError(
                f"--batch-size: {settings.batch_size} images are more than the "
                f"{dataset.train.size} there are to train on."
            )
        if settings.batch_size % jax.device_count():
            raise SettingsError(
                f"--batch-size: {settings.batch_size} images cannot be shared evenly by "
                f"{jax.device_count()} devices."
            )
        self.settings, self.dataset, self.execution = settings, dataset, execution
        self.steps_per_epoch = dataset.train.size // settings.batch_size
        self.steps = self.steps_per_epoch * settings.epochs
        self.steps_per_call = self._steps_per_call()
        # Neither the graph nor what is quantized depends on the values of the weights.
        self.graph, self._params, self._stats = models.split(
            nnx.eval_shape(lambda: self._network(jax.random.key(0)))
        )
        self.quantizer = optimizers.choose(self._params, settings)
        self.optimizer = optimizers.build(
            settings, self.quantizer, steps=self.steps, epoch=self.steps_per_epoch
        )
        self._project = evaluation.projection(self._params, self.quantizer)
        self._gap = jax.jit(lambda params: diagnostics.quantization_gap(params, self.quantizer))
        self.layout = devices.Layout()
        self._draw = jax.jit(self._drawn, out_shardings=self.layout.whole)
        self._begin = jax.jit(self._begun, out_shardings=self.layout.whole)
        self.learn = jax.jit(self._learn, donate_argnums=0, out_shardings=self.layout.whole)
        self.advance = jax.jit(
            self._advance, donate_argnums=0, static_argnames="count", out_shardings=self.layout.whole
        )

    def _network(self, key: jax.Array) -> models.Network:
        settings = self.settings
        return models.build(
            settings.model, self.dataset, width=settings.width, precision=settings.precision, key=key
        )

    def _steps_per_call(self) -> int:
        """How many steps are taken in a call: as many as may be, and so that an epoch is whole calls."""
        if self.execution.loader == "stream":
            return 1
        most = 1 if jax.default_backend() == "cpu" else _STEPS_PER_CALL
        most = min(self.execution.steps_per_call or most, self.steps_per_epoch)
        return next(count for count in range(most, 0, -1) if self.steps_per_epoch % count == 0)

    def initial_state(self, key: jax.Array, start: Path | None = None) -> State:
        """The state before the first step, on the devices.

        Args:
            key: random key of the weights.
            start: a file of weights and statistics to begin at, as `float_files` writes it; random if None.
        """
        if start is None:
            return self._begin(*self._draw(key))
        return self._begin(*self._read(float_files.load_float(start)))

    def _drawn(self, key: jax.Array) -> tuple[Any, Any]:
        """Random weights, and statistics."""
        _, params, stats = models.split(self._network(key))
        return params, stats

    def _read(self, arrays: dict[str, np.ndarray]) -> tuple[Any, Any]:
        """The weights and statistics in a file.

        Raises:
            ValueError: if it lacks one, or has one of another shape.
        """
        return float_files.from_arrays(arrays, self._params), float_files.from_arrays(arrays, self._stats)

    def _begun(self, params: Any, stats: Any) -> State:
        """The state before the first step."""
        return State(params, stats, self.optimizer.init(params), jnp.zeros([]), jnp.zeros([], jnp.int32))

    def _learn(self, state: State, key: jax.Array, batch: Split) -> tuple[State, jax.Array]:
        """One step on a batch; returns the loss as well. The key is the epoch's."""
        index = state.step % self.steps_per_epoch
        images, labels = self.layout.spread(batch)
        images = self.dataset.augment(jax.random.fold_in(key, index), images)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            network = nnx.merge(self.graph, params, state.stats, copy=True)
            logits = network(images, train=True)
            return jnp.mean(self._losses(logits, labels)), models.split(network)[2]

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        total = jnp.where(index == 0, 0.0, state.loss) + value
        return State(params, stats, opt_state, total, state.step + 1), value

    def _losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """The loss of each image."""
        smoothing = self.settings.label_smoothing
        if smoothing == 0:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    def _advance(
        self, state: State, key: jax.Array, train: Split, order: jax.Array, count: int = 1
    ) -> tuple[State, jax.Array]:
        """Some steps on the next images of the epoch's order; returns the loss of the last one as well."""
        size = self.settings.batch_size

        def step(state: State, _: Any) -> tuple[State, jax.Array]:
            chosen = jax.lax.dynamic_slice_in_dim(order, state.step % self.steps_per_epoch * size, size)
            chosen = self.layout.spread(chosen)
            return self._learn(state, key, Split(train.images[chosen], train.labels[chosen]))

        if count == 1:  # One step needs no loop.
            return step(state, None)
        state, losses = jax.lax.scan(step, state, length=count)
        return state, losses[-1]

    @contextlib.contextmanager
    def _feed(
        self, order_of: Callable[[int], jax.Array], step: int
    ) -> Iterator[Callable[[State, jax.Array, jax.Array, int], tuple[State, jax.Array]]]:
        """Opens the training images from a step on.

        Gives a function that takes the next steps, from a state, the epoch's key, its order of the images and
        the number of steps, which is 1 for streamed images; it returns the loss of the last one as well.
        """
        records = self.dataset.train
        if self.execution.loader == "memory":
            train = self.layout.everywhere(records.at(np.arange(records.size)))
            yield lambda state, key, order, count: self.advance(state, key, train, order, count=count)
            return
        # One order for all epochs, so that workers are started once.
        used = self.steps_per_epoch * self.settings.batch_size
        orders = [np.asarray(order_of(epoch))[:used] for epoch in range(self.settings.epochs)]
        reader = batches.batches(
            records,
            np.concatenate(orders),
            batch_size=self.settings.batch_size,
            start=step,
            workers=self.execution.workers,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        with contextlib.closing(reader):
            yield lambda state, key, order, count: self.learn(state, key, self.layout.batch(next(reader)))

    def run(self, seed: int, folder: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Train from one seed, as `train`; write the weights; judge on the test images, once.

        Args:
            seed: as of `train`, like all the others.
            folder: where the files go.
            *arguments: as of `train`.
            **options: as of `train`.

        Returns:
            The row of results.

        Raises:
            DivergedError, StoppedError: as `train`.
        """
        trained = self.train(seed, folder, *arguments, **options)
        began = time.perf_counter()
        row = self._judge(trained.state, seed, folder)
        return row | {"seed": seed, "seconds": trained.seconds + time.perf_counter() - began}

    def rehearse(self, seed: int, folder: Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Train from one seed, as `train`; judge on the validation images, and leave the test images alone.

        Args:
            seed: as of `train`, like all the others.
            folder: where the metrics and the float weights go.
            *arguments: as of `train`.
            **options: as of `train`.

        Returns:
            The metrics after the last epoch, in the first process, with the method and the seed.

        Raises:
            DivergedError, StoppedError: as `train`.
        """
        trained = self.train(seed, folder, *arguments, **options)
        row = {"method": self.settings.method}
        if devices.is_first():
            self._save_relaxed(trained.state, folder)
            row |= run_folder.read_csv(folder / run_folder.METRICS)[-1]
        return row | {"seed": seed, "seconds": trained.seconds}

    def train(
        self,
        seed: int,
        folder: Path,
        progress: Progress = _SILENT,
        *,
        start: Path | None = None,
        stop_requested: Callable[[], int] = lambda: 0,
    ) -> Trained:
        """Train from one seed; write metrics, measured on the validation images.

        Where the folder holds a checkpoint, the run goes on from there, and ends as if it had never stopped.

        Args:
            seed: of the initial weights, the order of the images and their augmentation.
            folder: where the files go.
            progress: told of every step and every measurement.
            start: a file of `float_files.save_float` with the weights to begin at; random ones by default.
            stop_requested: asked after every call to the devices for the signal to stop there, or 0.

        Returns:
            The state after the last step, and the seconds that it took.

        Raises:
            DivergedError: if the loss of an epoch is not a finite number.
            StoppedError: if it was asked to stop before the last step; the state is saved.
        """
        began = time.perf_counter()
        init_key, key = jax.random.split(jax.random.key(seed))
        state = self.initial_state(init_key, start)
        every = self.execution.checkpoint_every
        checkpoints = Checkpoints(
            folder / run_folder.CHECKPOINTS, None if every is None else every * self.steps_per_epoch
        )
        # The signs at the last measurement, and the seconds that were spent before, are part of it.
        saved = {"state": state, "signs": _signs(self._quantized(state)[1]), "seconds": np.zeros([])}
        saved = checkpoints.restore(saved) or saved
        state, signs, earlier = saved["state"], saved["signs"], float(saved["seconds"])
        keys_of = lambda epoch: jax.random.split(jax.random.fold_in(key, epoch))
        order_of = lambda epoch: jax.random.permutation(keys_of(epoch)[0], self.dataset.train.size)
        seconds = lambda: earlier + time.perf_counter() - began
        step = int(state.step)
        started = step // self.steps_per_epoch
        with (
            run_folder.Recorder(folder, keep=started, tensorboard=self.execution.tensorboard) as recorder,
            self._feed(order_of, step) as take_steps,
        ):
            progress.step(step)
            for epoch in range(started, self.settings.epochs):
                order, step_key = self.layout.everywhere(order_of(epoch)), keys_of(epoch)[1]
                under_way: collections.deque[jax.Array] = collections.deque()
                while step < (epoch + 1) * self.steps_per_epoch:
                    # A run that goes on amid the steps of a call takes single ones until the next begins.
                    count = 1 if step % self.steps_per_call else self.steps_per_call
                    state, loss = take_steps(state, step_key, order, count)
                    step += count
                    under_way.append(loss)
                    if len(under_way) > max(_AHEAD // count, 1):
                        jax.block_until_ready(under_way.popleft())
                    progress.step(step)
                    epoch_ends = step % self.steps_per_epoch == 0
                    if epoch_ends:
                        signs = self._measure(epoch + 1, state, signs, seconds, recorder, progress)
                    stop = stop_requested()
                    if stop or checkpoints.is_due(step, epoch_ends=epoch_ends):
                        saved = {"state": state, "signs": signs, "seconds": np.asarray(seconds())}
                        checkpoints.save(step, saved)
                    if stop and step < self.steps:
                        raise StoppedError(
                            f"stopped in epoch {epoch + 1}, after {step} of {self.steps} steps; "
                            "the state is saved",
                            stop,
                            folder,
                        )
        return Trained(state, seconds())

    def _measure(
        self,
        epoch: int,
        state: State,
        signs: dict[str, jax.Array],
        seconds: Callable[[], float],
        recorder: run_folder.Recorder,
        progress: Progress,
    ) -> dict[str, jax.Array]:
        """Measure what is due at the end of an epoch; return the signs of the binary weights.

        Raises:
            DivergedError: if the mean loss of the epoch is not a finite number.
        """
        loss = float(state.loss) / self.steps_per_epoch
        if not np.isfinite(loss):
            raise DivergedError(
                f"{self.settings.method}: the loss is {loss} in epoch {epoch}. "
                "A smaller --learning-rate may help."
            )
        if epoch % self.settings.measure_every and epoch < self.settings.epochs:
            return signs
        hard, leaves = self._quantized(state)
        before, signs = signs, _signs(leaves)
        metrics = {
            "epoch": epoch,
            "step": epoch * self.steps_per_epoch,
            "loss": loss,
            **self._accuracies(state.stats, self._networks(state, hard), self.dataset.validation),
            # |x - P(x)| / |x|; before version 0.2 it was divided by |P(x)|.
            "quantization_gap": (float(self._gap(state.params)) if leaves else None),
            "sign_flips": float(_flips(before, signs)) if leaves else None,
            "seconds": seconds(),
        }
        recorder.append(metrics)
        progress.metrics(metrics)
        return signs

    def _quantized(self, state: State) -> tuple[Any, dict[str, jax.Array]]:
        """The binary network, seen to be binary, and its binary leaves by path; nothing in a float run."""
        if self.settings.method == "float":
            return None, {}
        return self._project(state.params)

    def _calibrated(self, params: Any, stats: Any) -> Any:
        """Batch-norm statistics estimated anew for some weights."""
        return evaluation.batch_statistics(
            self.graph,
            params,
            stats,
            self._calibration_images,
            batch_size=self.settings.batch_size,
            layout=self.layout,
        )

    @functools.cached_property
    def _calibration_images(self) -> np.ndarray:
        """Whole batches of training images, augmented as in training, in the same way for every run."""
        size = self.settings.batch_size
        count = max(min(self.settings.calibration_images, self.dataset.train.size) // size, 1)
        images = self.dataset.train.at(np.arange(count * size)).images
        keys = jax.random.split(jax.random.key(0), count)
        augment = jax.jit(self.dataset.augment)
        parts = zip(keys, np.split(images, count), strict=True)
        return np.concatenate([np.asarray(augment(key, part)) for key, part in parts])

    def _networks(self, state: State, hard: Any) -> dict[str, Measured]:
        """The relaxed (or float) network and the binary one, if there are its weights.

        Each has batch-norm statistics estimated anew for its weights, which treats all alike.
        """
        networks = {"relaxed": state.params} | ({} if hard is None else {"hard": hard})
        return {
            name: Measured(params, self._calibrated(params, state.stats)) for name, params in networks.items()
        }

    def _accuracies(
        self, running: Any, networks: dict[str, Measured], split: Split
    ) -> dict[str, float | None]:
        """Accuracy of each network, with its own statistics and with those that ran along in training."""
        measured: dict[str, float | None] = {}
        for name in ("relaxed", "hard"):
            for title, use_own in (("accuracy", True), ("accuracy_running_statistics", False)):
                accuracy = None
                if name in networks:
                    params, own = networks[name]
                    stats = own if use_own else running
                    accuracy = evaluation.accuracy(self.graph, params, stats, split, self.layout)
                measured[f"{name}_{title}"] = accuracy
        return measured

    @staticmethod
    def _save_relaxed(state: State, folder: Path) -> int:
        """Write the weights in use and the running statistics in float; return the bytes."""
        relaxed = {**float_files.to_arrays(state.params), **float_files.to_arrays(state.stats)}
        return float_files.save_float(folder / run_folder.RELAXED, relaxed)

    def _judge(self, state: State, seed: int, folder: Path) -> dict[str, Any]:
        """Measure on the test images; write the weights; see that the file holds the network measured."""
        hard, leaves = self._quantized(state)
        packed = None
        if leaves:
            # Packed from the quantized weights, as the relaxed ones of some methods are never quite hard.
            # That fits the scales anew, to rounding, so what is measured is what was packed.
            packed = stam_jax.pack(hard, self.quantizer)
            hard = self.layout.everywhere(jax.device_get(jax.jit(stam_jax.unpack)(packed)))
        measured = self._networks(state, hard)
        row = {
            "method": self.settings.method,
            **self._accuracies(state.stats, measured, self.dataset.test),
            "binary_share": sum(leaf.size for leaf in leaves.values())
            / sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "bytes_float": None,
            "bytes_packed": None,
        }
        if not devices.is_first():
            return row
        row["bytes_float"] = self._save_relaxed(state, folder)
        if packed is not None:
            path = folder / run_folder.PACKED
            params, stats = measured["hard"]
            row["bytes_packed"] = packed_network.save(
                path,
                packed,
                stats,
                settings=dataclasses.replace(self.settings, seed=seed),
                images=self.dataset,
                accuracy=row["hard_accuracy"],
            )
            if not packed_network.is_whole(path, params, stats):
                raise AssertionError(f"{path} does not hold the network that was measured.")
        return row
