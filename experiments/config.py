"""Every setting of an experiment, typed, with its default and its bounds."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from cyclopts import Parameter, Token
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
    "stam_proximal",
    "stam",
]
METHODS: tuple[Method, ...] = get_args(Method)
DatasetName = Literal["digits"]
ModelName = Literal["resnet8"]


def _whole(kind: Any, tokens: Sequence[Token]) -> int:
    """An int from its digits; Cyclopts itself would round 1.5 to 2."""
    del kind
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'"{tokens[0].value}" is not a whole number.') from None


_COUNT = Parameter(converter=_whole, validator=Number(gte=1))
_SEED = Parameter(converter=_whole, validator=Number(gte=0, lt=2**32))
_POSITIVE = Parameter(validator=Number(gt=0, lt=math.inf))
_AT_LEAST_0 = Parameter(validator=Number(gte=0, lt=math.inf))
_SHARE = Parameter(validator=Number(gte=0, lte=1))


class SettingsError(ValueError):
    """Settings that are each well-formed but do not go together; one line for the user."""


class DivergedError(ArithmeticError):
    """A run whose loss is no longer a number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a single run and a comparison have in common."""

    dataset: DatasetName = "digits"
    """Images to learn from."""
    model: ModelName = "resnet8"
    """Network to train."""
    width: Annotated[int, _COUNT] = 16
    """Channels of the network's first stage."""
    epochs: Annotated[int, _COUNT] = 40
    """Passes over the training images."""
    batch_size: Annotated[int, _COUNT] = 64
    """Images per step."""
    learning_rate: Annotated[float, _POSITIVE] = 0.1
    """Step size at the start; it falls to 0 along a cosine."""
    momentum: Annotated[float, Parameter(validator=Number(gte=0, lt=1))] = 0.9
    """Nesterov momentum."""
    weight_decay: Annotated[float, _AT_LEAST_0] = 1e-4
    """Weight decay of all kernels, added to the gradient."""
    scale: Literal["channel", "tensor", "none"] = "channel"
    """Which binary weights share a scale: those of one output channel, of one layer, or all are +-1."""
    exclude: Annotated[
        tuple[str, ...], Parameter(consume_multiple=True, negative="", allow_leading_hyphen=False)
    ] = ()
    """Kernels to leave in float: "first", "last", or patterns of paths such as "blocks/0/*"."""
    hard_from: Annotated[float, _SHARE] = 0.75
    """Share of the run after which the relaxed methods train the binary network itself."""
    calibration_images: Annotated[int, _COUNT] = 5000
    """Training images (at most) on which batch-norm statistics are estimated anew for evaluation."""

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """One run."""

    method: Method = "stam"
    """How the binary weights are trained."""
    seed: Annotated[int, _SEED] = 0
    """Seed of the initial weights, the order of the images and their augmentation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """One run per method and seed."""

    methods: Annotated[tuple[Method | Literal["all"], ...], Parameter(consume_multiple=True, negative="")] = (
        "float",
        "binary_connect",
        "binary_relax",
        "stam",
    )
    """Methods to train with; "all" for every one."""
    seeds: Annotated[tuple[Annotated[int, _SEED], ...], Parameter(consume_multiple=True, negative="")] = (0,)
    """Seeds, each a run per method."""

    def chosen(self) -> tuple[Method, ...]:
        """The methods to train with, each by its name.

        Raises:
            SettingsError: if there is none, or one is named twice.
        """
        if self.methods == ("all",):
            return METHODS
        named = cast(tuple[Method, ...], tuple(method for method in self.methods if method != "all"))
        if not named or len(set(named)) < len(self.methods):
            raise SettingsError('--methods: give at least one, and none twice; "all" stands alone.')
        return named

    def runs_of(self, method: Method) -> Sequence[TrainSettings]:
        """The settings of one method's runs, a seed each."""
        names = {field.name for field in dataclasses.fields(Settings)}
        common = {name: value for name, value in vars(self).items() if name in names}
        return [TrainSettings(**common, method=method, seed=seed) for seed in self.seeds]


Output = Annotated[
    Path | None,
    Parameter(help="Folder for the results; must be new or empty. By default one under runs/."),
]
