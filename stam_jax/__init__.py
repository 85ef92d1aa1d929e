"""Binary neural networks in JAX: stochastic three-block alternating minimisation, and its relatives.

Chain `stam` (or `binary_connect`, `binary_relax`) as the last element of an Optax optimiser, train as
always, and take the binary network from `hard_params(opt_state, params)`.
"""

from importlib.metadata import version as _version

from stam_jax._transform import StamState, stam
from stam_jax.diagnostics import quantisation_gap, sign_flips
from stam_jax.hard import QuantizedLeaf, hard_params, quantized_leaves
from stam_jax.methods import binary_connect, binary_relax, prox_quant
from stam_jax.quantizers import Binary, PowerOfTwo, Quantizer, Ternary, Uniform
from stam_jax.regularizers import L1, Box, GroupLasso, Regularizer, Ridge
from stam_jax.relaxations import Hard, L1Distance, LinearBlend, Relaxation, SquaredDistance
from stam_jax.selection import Selection, select

__version__ = _version("stam-jax")

__all__ = [
    "L1",
    "Binary",
    "Box",
    "GroupLasso",
    "Hard",
    "L1Distance",
    "LinearBlend",
    "PowerOfTwo",
    "QuantizedLeaf",
    "Quantizer",
    "Regularizer",
    "Relaxation",
    "Ridge",
    "Selection",
    "SquaredDistance",
    "StamState",
    "Ternary",
    "Uniform",
    "binary_connect",
    "binary_relax",
    "hard_params",
    "prox_quant",
    "quantisation_gap",
    "quantized_leaves",
    "select",
    "sign_flips",
    "stam",
]
