"""Binary neural networks in JAX: stochastic three-block alternating minimisation, and its relatives.

Chain `stam`, or one of its relatives, as the last element of an Optax optimiser, train as
always, and take the binary network from `hard_params(opt_state, params)`.
"""

from importlib.metadata import version as _version

from stam_jax import diagnostics, schedules, theory
from stam_jax._state import StamState
from stam_jax._transform import stam
from stam_jax.admm import admm_quant
from stam_jax.bop import BopState, bop
from stam_jax.diagnostics import quantisation_gap, sign_flips
from stam_jax.hard import QuantizedLeaf, hard_params, quantized_leaves
from stam_jax.inspection import LeafReport, Report, report
from stam_jax.methods import binary_connect, binary_relax, md_tanh, parq, prox_quant
from stam_jax.packed_files import PackedFileError, load_packed, packed_metadata, save_packed
from stam_jax.packing import Packed, pack, unpack
from stam_jax.quantizers import (
    Binary,
    HasCodes,
    HasLevels,
    LeastSquares,
    PowerOfTwo,
    Quantizer,
    Ternary,
    Uniform,
)
from stam_jax.regularizers import L1, Box, GroupLasso, HasValue, Regularizer, Ridge
from stam_jax.relaxations import (
    Hard,
    HardFrom,
    L1Distance,
    LinearBlend,
    PiecewiseAffine,
    Relaxation,
    ScaledTanh,
    SquaredDistance,
)
from stam_jax.selection import Selection, select
from stam_jax.straight_through import StraightThroughState, straight_through
from stam_jax.tracing import StepDiagnostics, TraceState, trace_diagnostics

__version__ = _version("stam-jax")

__all__ = [
    "L1",
    "Binary",
    "BopState",
    "Box",
    "GroupLasso",
    "Hard",
    "HardFrom",
    "HasCodes",
    "HasLevels",
    "HasValue",
    "L1Distance",
    "LeafReport",
    "LeastSquares",
    "LinearBlend",
    "Packed",
    "PackedFileError",
    "PiecewiseAffine",
    "PowerOfTwo",
    "QuantizedLeaf",
    "Quantizer",
    "Regularizer",
    "Relaxation",
    "Report",
    "Ridge",
    "ScaledTanh",
    "Selection",
    "SquaredDistance",
    "StamState",
    "StepDiagnostics",
    "StraightThroughState",
    "Ternary",
    "TraceState",
    "Uniform",
    "admm_quant",
    "binary_connect",
    "binary_relax",
    "bop",
    "diagnostics",
    "hard_params",
    "load_packed",
    "md_tanh",
    "pack",
    "packed_metadata",
    "parq",
    "prox_quant",
    "quantisation_gap",
    "quantized_leaves",
    "report",
    "save_packed",
    "schedules",
    "select",
    "sign_flips",
    "stam",
    "straight_through",
    "theory",
    "trace_diagnostics",
    "unpack",
]
