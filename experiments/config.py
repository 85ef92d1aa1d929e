"""Every setting of an experiment, typed, with its default and its bounds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from cyclopts import App, CycloptsError, Parameter, Token
from cyclopts import config as cyclopts_config
from cyclopts.validators import Number

Method = Literal[
    "float",
    "binary_connect",
    "straight_through",
    "straight_through_clipped",
    "binary_relax",
    "prox_quant",
    "parq",
    "md_tanh",
    "admm_quant",
    "bop",
    "linear_blend",
    "stam_proximal",
    "stam",
]
METHODS: tuple[Method, ...] = get_args(Method)
DatasetName = Literal["digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "svhn_cropped"]
ModelName = Literal["resnet8", "resnet18", "resnet20", "resnet56", "vgg11", "vgg16"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
Precision = Literal["float32", "bfloat16"]
Form = Literal["stablehlo", "onnx", "folder"]


def _whole(kind: Any, tokens: Sequence[Token]) -> Any:
    """Ints from their digits; Cyclopts itself would round 1.5 to 2."""
    del kind
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'"{tokens[0].value}" is not a whole number.') from None


_COUNT = Parameter(converter=_whole, validator=Number(gte=1))
_INDEX = Parameter(converter=_whole, validator=Number(gte=0))
_SEED = Parameter(converter=_whole, validator=Number(gte=0, lt=2**32))
_POSITIVE = Parameter(validator=Number(gt=0, lt=math.inf))
_AT_LEAST_0 = Parameter(validator=Number(gte=0, lt=math.inf))
_SHARE = Parameter(validator=Number(gte=0, lte=1))
_SEVERAL = Parameter(consume_multiple=True, negative="")


class SettingsError(ValueError):
    """Settings that are each well-formed but do not go together; one line for the user."""


class DivergedError(ArithmeticError):
    """A run whose loss is no longer a number."""


class StoppedError(RuntimeError):
    """A run that was asked to stop, and has saved where it was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: what runs, comparisons and tables have in common."""

    width: Annotated[float, _POSITIVE] = 1.0
    """Channels of every layer, as a multiple of the published network's."""
    precision: Precision = "float32"
    """What the network computes in; its weights and statistics are float32 in any case."""
    epochs: Annotated[int, _COUNT] = 40
    """Passes over the training images."""
    training_images: Annotated[int | None, _COUNT] = None
    """How many images to learn from, chosen at random but the same in every run; by default all there are."""
    batch_size: Annotated[int, _COUNT] = 64
    """Images per step, over all devices together."""
    learning_rate: Annotated[float, _POSITIVE] = 0.1
    """Step size at the start."""
    decay_epochs: Annotated[tuple[Annotated[int, _COUNT], ...], _SEVERAL] = ()
    """Epochs after which the step size falls tenfold; with none, it falls to 0 along a cosine."""
    decay_from: Annotated[float | None, Parameter(validator=Number(gte=0, lt=1))] = None
    """Share of the run from which on the step size falls to 0 in a straight line, in place of the cosine."""
    warmup_epochs: Annotated[int, _INDEX] = 0
    """Epochs over which the step size grows in a straight line to what it is otherwise."""
    momentum: Annotated[float, Parameter(validator=Number(gte=0, lt=1))] = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Whether the momentum is Nesterov's."""
    weight_decay: Annotated[float, _AT_LEAST_0] = 1e-4
    """Weight decay of all kernels, added to the gradient."""
    warm_start: bool = False
    """Whether binary training begins at the float network trained with the same settings and seed."""
    scale: Literal["channel", "tensor", "none"] = "channel"
    """Which binary weights share a scale: those of one output channel, of one layer, or all are +-1."""
    exclude: Annotated[
        tuple[str, ...], Parameter(consume_multiple=True, negative="", allow_leading_hyphen=False)
    ] = ()
    """Modules to leave in float, by patterns of paths: "head", "stem" ("stages/0/0" in a VGG), "blocks/0"."""
    hard_from: Annotated[float, _SHARE] = 0.75
    """Share of the run after which the relaxed methods train the binary network itself."""
    calibration_images: Annotated[int, _COUNT] = 5000
    """Training images (at most), augmented, to estimate batch-norm statistics on anew for evaluation."""
    measure_every: Annotated[int, _COUNT] = 1
    """Epochs between measurements on the validation images; the last epoch is always measured."""
    own: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)
    """Settings of single methods in the place of those for all, such as --own.parq.learning-rate 0.03."""

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """One network on one image set."""

    dataset: DatasetName = "digits"
    """Images to learn from."""
    model: ModelName = "resnet8"
    """Network to train."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """One run."""

    method: Method = "stam"
    """How the binary weights are trained."""
    seed: Annotated[int, _SEED] = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    relaxation: Literal["linear", "affine", "squared", "tanh"] = "linear"
    """The weights in use between float and binary (stam)."""
    inertia: Annotated[float, _SHARE] = 0.999
    """Where the next step starts on the way from the weights in use, 0, to the latent ones, 1 (stam)."""
    project: Literal["first", "last"] = "last"
    """Whether the latent weights are projected before or after their step (stam)."""
    penalty: tuple[Annotated[float, _POSITIVE], Annotated[float, _POSITIVE]] = (1e-3, 1e3)
    """Penalty at the start and at the end of the relaxed phase, growing by a factor (stam_proximal)."""
    threshold: Annotated[float, _POSITIVE] = 0.3
    """How far a weight is drawn to its binary value in the relaxed phase, over all steps (prox_quant)."""

    def without_seed(self) -> "TrainSettings":
        """What it has in common with the runs that differ from it by their seed alone."""
        return dataclasses.replace(self, seed=0)

    def settled(self) -> "TrainSettings":
        """The same run with its method's own settings in the place of those for all.

        Raises:
            SettingsError: if a setting is of a method that there is not, or is none, or has no such value.
        """
        for name, settings in self.own.items():
            if name not in METHODS:
                raise SettingsError(f"--own: there is no method {name!r}; choose from {', '.join(METHODS)}.")
            refused = {"method", "seed", "own", "warm-start", "warm_start"} & settings.keys()
            if refused:
                raise SettingsError(f"--own.{name}: {min(refused)} cannot be a method's own.")
        own = {
            name.replace("-", "_"): value[0] if len(value) == 1 else value
            for name, value in self.own.get(self.method, {}).items()
        }
        common = {name: value for name, value in self.as_dict().items() if value is not None}
        try:
            return parsed(common | own | {"own": {}})
        except CycloptsError as error:
            raise SettingsError(f"--own.{self.method}: {' '.join(str(error).split())}") from error

    def warm_start_run(self) -> "TrainSettings | None":
        """The float run whose weights this run begins at, if any; to be asked before it is settled."""
        if not self.warm_start or self.method == "float":
            return None
        return dataclasses.replace(self, method="float").settled()


_SINGLE = TrainSettings()
# Settings of earlier versions that are none any more, with the value by which they did nothing.
_GONE = {
    "inertia_rule": "same",
    "anneal_inertia": None,
    "pull": 0.0,
    "box": None,
    "ridge": 0.0,
    "average_from": None,
    "penalty_rule": "growing",
}


def updated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version may have kept, as this version says them.

    Those that are gone are left out where they did nothing. Where they did something they stay, and no run
    takes them: the version that does is named by the `environment.json` beside the settings.
    """
    current = {name: value for name, value in values.items() if name not in _GONE or value != _GONE[name]}
    if isinstance(values.get("exclude"), list):
        current["exclude"] = ["head" if rule == "last" else rule for rule in values["exclude"]]
    return current


def parsed(values: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run from their values, checked as those of the command line are.

    Raises:
        CycloptsError: if one is wrong.
    """
    app = App(config=cyclopts_config.Dict(dict(values), use_commands_as_keys=False))

    @app.default
    def take(settings: Annotated[TrainSettings, Parameter(name="*")] = _SINGLE) -> TrainSettings:
        return settings

    return cast(TrainSettings, app([], exit_on_error=False, print_error=False, result_action="return_value"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Methods:
    """A run per method and seed."""

    methods: Annotated[tuple[Method | Literal["all"], ...], _SEVERAL] = (
        "float",
        "binary_connect",
        "binary_relax",
        "stam",
    )
    """Methods to train with; "all" for every one."""
    seeds: Annotated[int, _COUNT] = 1
    """Runs of each method: with seeds 0, 1, and so on."""

    def chosen(self) -> tuple[Method, ...]:
        """The methods to train with, each by its name.

        Raises:
            SettingsError: if there is none, or one is named twice.
        """
        if self.methods == ("all",):
            return METHODS
        named = tuple(method for method in self.methods if method != "all")
        if not named or len(set(named)) < len(self.methods):
            raise SettingsError('--methods: give at least one, and none twice; "all" stands alone.')
        return cast(tuple[Method, ...], named)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings, _Methods):
    """One network on one image set, with several methods."""

    def run(self, method: Method, seed: int) -> TrainSettings:
        """The settings of one of the runs, not yet settled."""
        return TrainSettings(**_fields_of(Settings, self), method=method, seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSettings(Recipe, _Methods):
    """Several networks on several image sets, with several methods."""

    datasets: Annotated[tuple[DatasetName, ...], _SEVERAL] = ("digits",)
    """Image sets to learn from."""
    models: Annotated[tuple[ModelName, ...], _SEVERAL] = ("resnet8",)
    """Networks to train on each."""

    def comparisons(self) -> Sequence[CompareSettings]:
        """The comparison of each network on each image set.

        Raises:
            SettingsError: if there is none, or one is named twice.
        """
        for option, names in (("--datasets", self.datasets), ("--models", self.models)):
            if not names or len(set(names)) < len(names):
                raise SettingsError(f"{option}: give at least one, and none twice.")
        common = _fields_of(Recipe, self) | _fields_of(_Methods, self)
        return [
            CompareSettings(**common, dataset=dataset, model=model)
            for dataset in self.datasets
            for model in self.models
        ]


def _fields_of(kind: Any, settings: Any) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Where images come from."""

    data_dir: Path | None = None
    """Folder of prepared image sets; by default that of TensorFlow Datasets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution(Reading):
    """How runs are carried out: nothing of this changes what comes of them, but for rounding."""

    loader: Literal["memory", "stream"] = "memory"
    """Whether the training images lie on the device, or are read batch by batch."""
    workers: Annotated[int, _INDEX] = 0
    """Processes that read and decode images where they are streamed; 0 for none beside this one."""
    steps_per_call: Annotated[int | None, _COUNT] = None
    """Most steps that devices take on their own, of images in memory; by default 1 on CPUs, 32 on others."""
    checkpoint_every: Annotated[int | None, _COUNT] = None
    """Epochs between checkpoints that are kept; the last state is saved every minute in any case."""
    tensorboard: Annotated[bool, Parameter(negative="")] = False
    """Write the metrics for TensorBoard as well."""
    coordinator: str | None = None
    """Address of the first of several processes, HOST:PORT; "auto" on TPU pods and under SLURM."""
    processes: Annotated[int | None, _COUNT] = None
    """Number of processes, with a coordinator's address."""
    process: Annotated[int | None, _INDEX] = None
    """Which of the processes this is, from 0, with a coordinator's address."""


Output = Annotated[
    Path | None,
    Parameter(help="Folder for the results; must be new or empty. By default one under runs/."),
]
Resume = Annotated[
    bool,
    Parameter(
        negative="",
        help="Go on with what is unfinished in --output; what is finished stays. A new folder is begun.",
    ),
]
RecipeName = Annotated[
    str | None,
    Parameter(help="Published or own protocol to follow, by its name in experiments/recipes."),
]
