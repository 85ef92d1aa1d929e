"""Quantized networks in few bits per weight, in memory and in a file."""

from stam_jax._packed import Packed
from stam_jax.packing._file import PackedFileError, load_packed, packed_metadata, save_packed
from stam_jax.packing._pack import pack, unpack

__all__ = ["Packed", "PackedFileError", "load_packed", "pack", "packed_metadata", "save_packed", "unpack"]
