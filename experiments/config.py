"""Every setting of an experiment, typed, with its default and its bounds."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from cyclopts import App, CycloptsError, Group, Parameter, Token
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
ModelName = Literal["resnet8", "resnet18", "resnet20", "resnet56", "vgg11", "vgg16", "vit6"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["sgd", "adamw"]
QuantizerName = Literal["binary", "ternary", "uniform", "power_of_two", "least_squares"]
Scale = Literal["channel", "tensor", "none"]
Relaxation = Literal["linear", "affine", "squared", "tanh"]
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
_BITS = Parameter(converter=_whole, validator=Number(gte=2, lte=4))
_POSITIVE = Parameter(validator=Number(gt=0, lt=math.inf))
_AT_LEAST_0 = Parameter(validator=Number(gte=0, lt=math.inf))
_BELOW_1 = Parameter(validator=Number(gte=0, lt=1))
_SHARE = Parameter(validator=Number(gte=0, lte=1))
_SEVERAL = Parameter(consume_multiple=True, negative="")
_PATTERNS = Parameter(consume_multiple=True, negative="", allow_leading_hyphen=False)


def _group(place: int, name: str) -> Parameter:
    return Parameter(group=Group(name, sort_key=place))


_TASK = _group(1, "Network and images")
_METHOD = _group(2, "Method")
_OPTIMIZER = _group(3, "Optimizer and schedule")
_QUANTIZATION = _group(4, "Quantization")
_MEASUREMENT = _group(5, "Measurement")
_EXECUTION = _group(6, "Execution: changes nothing of the results but rounding")
_FILES = _group(0, "Settings from files")
OUTPUT = _group(7, "Output")


class SettingsError(ValueError):
    """Settings that are each well-formed but do not go together; one line for the user."""


class DivergedError(ArithmeticError):
    """A run whose loss is no longer a number."""


class StoppedError(RuntimeError):
    """Runs that were asked to stop, and can go on.

    Args:
        message: where they stopped.
        number: of the signal that asked.
        folder: with which the command goes on.
    """

    def __init__(self, message: str, number: int, folder: Path):
        super().__init__(message)
        self.message, self.number, self.folder = message, number, folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: what runs, comparisons and tables have in common."""

    width: Annotated[float, _POSITIVE, _TASK] = 1.0
    """Channels of every layer, as a multiple of the published network's."""
    precision: Annotated[Precision, _TASK] = "float32"
    """Dtype that the network computes in; its weights and statistics are float32 in any case."""
    training_images: Annotated[int | None, _COUNT, _TASK] = None
    """Number of training images, chosen at random but the same in every run; by default all."""
    epochs: Annotated[int, _COUNT, _OPTIMIZER] = 40
    """Passes over the training images."""
    batch_size: Annotated[int, _COUNT, _OPTIMIZER] = 64
    """Images per step, over all devices together."""
    optimizer: Annotated[Optimizer, _OPTIMIZER] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: Annotated[float, _POSITIVE, _OPTIMIZER] = 0.1
    """Learning rate at the start."""
    decay_epochs: Annotated[tuple[Annotated[int, _COUNT], ...], _SEVERAL, _OPTIMIZER] = ()
    """Epochs after which the learning rate falls tenfold; with none, it falls to 0 along a cosine."""
    decay_from: Annotated[float | None, _BELOW_1, _OPTIMIZER] = None
    """Share of the run from which on the learning rate falls to 0 linearly, in place of the cosine."""
    warmup_epochs: Annotated[int, _INDEX, _OPTIMIZER] = 0
    """Epochs over which the learning rate grows in a straight line to what it is otherwise."""
    momentum: Annotated[float, _BELOW_1, _OPTIMIZER] = 0.9
    """Momentum of SGD; the first moment's decay rate of AdamW."""
    nesterov: Annotated[bool, _OPTIMIZER] = True
    """Whether the momentum is Nesterov's."""
    weight_decay: Annotated[float, _AT_LEAST_0, _OPTIMIZER] = 1e-4
    """Weight decay of all kernels: added to the gradient by SGD, to the step by AdamW."""
    decay_latent: Annotated[bool, _OPTIMIZER] = False
    """Whether weight decay sees the latent weights, in the place of the weights in use."""
    label_smoothing: Annotated[float, _BELOW_1, _OPTIMIZER] = 0.0
    """Share of each training label that is spread evenly over all labels."""
    warm_start: Annotated[bool, _METHOD] = False
    """Whether training begins at the float network trained with the same settings and seed."""
    quantizer: Annotated[QuantizerName, _QUANTIZATION] = "binary"
    """Values that a quantized weight can take."""
    bits: Annotated[int, _BITS, _QUANTIZATION] = 4
    """Bits per weight of the quantizers uniform and power_of_two."""
    scale: Annotated[Scale, _QUANTIZATION] = "channel"
    """Which weights share a scale: those of one output channel, or of one layer; or all scales are 1."""
    exclude: Annotated[tuple[str, ...], _PATTERNS, _QUANTIZATION] = ()
    """Modules to leave in float, by patterns of paths: "head", "stem" ("stages/0/0" in a VGG), "blocks/0"."""
    hard_from: Annotated[float, _SHARE, _METHOD] = 0.75
    """Share of the run after which the relaxed methods train the quantized network itself."""
    calibration_images: Annotated[int, _COUNT, _MEASUREMENT] = 5000
    """Training images (at most), augmented, to estimate batch-norm statistics on anew for evaluation."""
    measure_every: Annotated[int, _COUNT, _MEASUREMENT] = 1
    """Epochs between measurements on the validation images; the last epoch is always measured."""

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """One network on one image set."""

    dataset: Annotated[DatasetName, _TASK] = "digits"
    """Images to learn from."""
    model: Annotated[ModelName, _TASK] = "resnet8"
    """Network to train."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """One run."""

    method: Annotated[Method, _METHOD] = "stam"
    """How the quantized weights are trained."""
    seed: Annotated[int, _SEED, _METHOD] = 0
    """Seed of the initial weights, the order of the images and their augmentation."""
    relaxation: Annotated[Relaxation, _METHOD] = "linear"
    """Map from latent and quantized weights to those in use (stam)."""
    hold: Annotated[float, _AT_LEAST_0, _METHOD] = 16.0
    """How firmly signs are held against the noise of steps (stam)."""
    inertia: Annotated[float, _SHARE, _METHOD] = 1.0
    """Share of the way from the weights in use to the latent ones at which a step starts (linear_blend)."""
    project: Annotated[Literal["first", "last"], _METHOD] = "last"
    """Whether the latent weights are projected before or after their step (stam)."""
    penalty: Annotated[tuple[Annotated[float, _POSITIVE], Annotated[float, _POSITIVE]], _METHOD] = (1e-3, 1e3)
    """Penalty at the start and at the end of the relaxed phase, growing geometrically (stam_proximal)."""
    threshold: Annotated[float, _POSITIVE, _METHOD] = 0.3
    """How far a weight is drawn to its quantized value in the relaxed phase, over all steps (prox_quant)."""

    def without_seed(self) -> "TrainSettings":
        """What it has in common with the runs that differ from it by their seed alone."""
        return dataclasses.replace(self, seed=0)

    def float_start(self) -> "TrainSettings | None":
        """The float run with the same settings whose weights this run begins at, if it begins at one."""
        if not self.warm_start or self.method == "float":
            return None
        return TrainSettings(**_fields_of(Settings, self), seed=self.seed, method="float")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """Settings that a method may have of its own; None for those that all methods have."""

    optimizer: Optimizer | None = None
    learning_rate: Annotated[float | None, _POSITIVE] = None
    decay_epochs: Annotated[tuple[Annotated[int, _COUNT], ...] | None, _SEVERAL] = None
    decay_from: Annotated[float | None, _BELOW_1] = None
    warmup_epochs: Annotated[int | None, _INDEX] = None
    momentum: Annotated[float | None, _BELOW_1] = None
    nesterov: bool | None = None
    weight_decay: Annotated[float | None, _AT_LEAST_0] = None
    decay_latent: bool | None = None
    label_smoothing: Annotated[float | None, _BELOW_1] = None
    quantizer: QuantizerName | None = None
    bits: Annotated[int | None, _BITS] = None
    scale: Scale | None = None
    exclude: Annotated[tuple[str, ...] | None, _PATTERNS] = None
    hard_from: Annotated[float | None, _SHARE] = None

    def as_dict(self) -> dict[str, Any]:
        """Those that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overrides:
    """The overrides of each method."""

    float: Override = Override()
    binary_connect: Override = Override()
    straight_through: Override = Override()
    straight_through_clipped: Override = Override()
    binary_relax: Override = Override()
    prox_quant: Override = Override()
    parq: Override = Override()
    md_tanh: Override = Override()
    admm_quant: Override = Override()
    bop: Override = Override()
    linear_blend: Override = Override()
    stam_proximal: Override = Override()
    stam: Override = Override()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Those that are set, by method."""
        return {method: override.as_dict() for method, override in vars(self).items() if override.as_dict()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Methods:
    """A run per method and seed."""

    methods: Annotated[tuple[Method | Literal["all"], ...], _SEVERAL, _METHOD] = (
        "float",
        "binary_connect",
        "prox_quant",
        "stam",
    )
    """Methods to train with; "all" for every one."""
    seeds: Annotated[int, _COUNT, _METHOD] = 1
    """Runs of each method: with seeds 0, 1, and so on."""
    # Of thirteen methods: more than anybody wants to read in a list of options.
    overrides: Annotated[Overrides, Parameter(show=False)] = Overrides()
    """Settings of single methods in the place of those for all."""

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
        """The settings of one of the runs, the overrides of its method among them."""
        own = getattr(self.overrides, method).as_dict()
        return TrainSettings(**_fields_of(Settings, self) | own, method=method, seed=seed)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return super().as_dict() | {"overrides": self.overrides.as_dict()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSettings(Recipe, _Methods):
    """Several networks on several image sets, with several methods."""

    datasets: Annotated[tuple[DatasetName, ...], _SEVERAL, _TASK] = ("digits",)
    """Image sets to learn from."""
    models: Annotated[tuple[ModelName, ...], _SEVERAL, _TASK] = ("resnet8",)
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


@functools.cache
def _parser() -> App:
    """What reads the settings of one run, and nothing else."""
    app = App()
    default = TrainSettings()

    @app.default
    def take(settings: Annotated[TrainSettings, Parameter(name="*")] = default) -> TrainSettings:
        return settings

    return app


def parsed(values: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run from their values, checked as those of the command line are.

    Raises:
        SettingsError: if one is wrong.
    """
    app = _parser()
    # Without a value, as JSON says it, a setting has its default.
    given = {name: value for name, value in values.items() if value is not None}
    app.config = (cyclopts_config.Dict(given, source="settings", use_commands_as_keys=False),)
    try:
        found = app([], exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise SettingsError(" ".join(str(error).split())) from error
    return cast(TrainSettings, found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Where images come from."""

    data_dir: Annotated[Path | None, _EXECUTION] = None
    """Folder of prepared image sets; by default that of TensorFlow Datasets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution(Reading):
    """How runs are carried out: nothing of this changes the results, but for rounding."""

    loader: Annotated[Literal["memory", "stream"], _EXECUTION] = "memory"
    """Whether the training images lie on the device, or are read batch by batch."""
    workers: Annotated[int, _INDEX, _EXECUTION] = 0
    """Processes that read and decode images where they are streamed; 0 for none beside this one."""
    steps_per_call: Annotated[int | None, _COUNT, _EXECUTION] = None
    """Most steps that devices take on their own, of images in memory; by default 1 on CPUs, 32 on others."""
    checkpoint_every: Annotated[int | None, _COUNT, _EXECUTION] = None
    """Epochs between checkpoints that are kept; the last state is saved every minute in any case."""
    tensorboard: Annotated[bool, Parameter(negative=""), _EXECUTION] = False
    """Write the metrics for TensorBoard as well."""
    coordinator: Annotated[str | None, _EXECUTION] = None
    """Address of the first of several processes, HOST:PORT; "auto" on TPU pods and under SLURM."""
    processes: Annotated[int | None, _COUNT, _EXECUTION] = None
    """Number of processes, with a coordinator's address."""
    process: Annotated[int | None, _INDEX, _EXECUTION] = None
    """Which of the processes this is, from 0, with a coordinator's address."""


Output = Annotated[
    Path | None,
    OUTPUT,
    Parameter(help="Folder for the results; must be new or empty. By default one under runs/."),
]
Resume = Annotated[
    bool,
    OUTPUT,
    Parameter(
        negative="",
        help="Go on with what is unfinished in --output; what is finished stays. A new folder is begun.",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Files of settings; what the command line says wins over them, and the first over the second."""

    config: Annotated[Path | None, _FILES] = None
    """JSON file of settings, such as the config.json of a run or a comparison."""
    recipe: Annotated[str | None, _FILES] = None
    """Published or own protocol to follow, by its name in experiments/recipes."""
