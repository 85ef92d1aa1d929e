"""Neural networks with binary weights, or ternary, or of a few bits, by any Optax optimizer.

Put `stam` around an optimizer, train as always, evaluate `quantize(params)` and ship `pack(params)`.
"""

from importlib.metadata import version as _version

from stam_jax import diagnostics, regularizers, relaxations, schedules, theory
from stam_jax._admm import AdmmState, admm_quant
from stam_jax._assignment import quantize
from stam_jax._bop import BopState, bop
from stam_jax._inertia import StepInertia
from stam_jax._methods import binary_connect, binary_relax, md_tanh, parq, prox_quant, stam, stam_proximal
from stam_jax._splitting import SplittingState, three_block_splitting
from stam_jax._straight_through import straight_through
from stam_jax._tabulate import tabulate
from stam_jax.packing import Packed, PackedFileError, load_packed, pack, packed_metadata, save_packed, unpack
from stam_jax.quantizers import Binary, LeastSquares, PowerOfTwo, Quantizer, Ternary, Uniform

__version__ = _version("stam-jax")

__all__ = [
    "AdmmState",
    "Binary",
    "BopState",
    "LeastSquares",
    "Packed",
    "PackedFileError",
    "PowerOfTwo",
    "Quantizer",
    "SplittingState",
    "StepInertia",
    "Ternary",
    "Uniform",
    "admm_quant",
    "binary_connect",
    "binary_relax",
    "bop",
    "diagnostics",
    "load_packed",
    "md_tanh",
    "pack",
    "packed_metadata",
    "parq",
    "prox_quant",
    "quantize",
    "regularizers",
    "relaxations",
    "save_packed",
    "schedules",
    "stam",
    "stam_proximal",
    "straight_through",
    "tabulate",
    "theory",
    "three_block_splitting",
    "unpack",
]
