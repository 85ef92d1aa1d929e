"""A reader of packed files in plain NumPy, written from docs/format.md, for every quantizer."""

import json
from pathlib import Path

import numpy as np

TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I8": "i1", "U8": "u1", "BOOL": "?"}


def levels(kind: str, bits: int, scales: np.ndarray) -> list[np.ndarray]:
    """The levels of each block in ascending order."""
    if kind == "LeastSquares":
        low, high = scales
        return [-high, -low, low, high]
    m = 2 ** (bits - 1) - 1
    positive = {
        "Binary": [1.0],
        "Ternary": [1.0],
        "Uniform": [j / m for j in range(1, m + 1)],
        "PowerOfTwo": [2.0**-j for j in reversed(range(m))],
    }[kind]
    zero = [] if kind == "Binary" else [0.0]
    steps = [*(-x for x in reversed(positive)), *zero, *positive]
    return [scales.dtype.type(step) * scales for step in steps]


def read(path: Path) -> dict[str, np.ndarray]:
    """Every array of a file by name, whole."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    said = json.loads(header.pop("__metadata__")["stam_jax"])
    arrays = {
        name: np.frombuffer(data[start:][slice(*x["data_offsets"])], TYPES[x["dtype"]]).reshape(x["shape"])
        for name, x in header.items()
    }
    for name, leaf in said["packed"].items():
        shape, bits = leaf["shape"], leaf["bits"]
        rows, count = arrays.pop(name + "#codes"), (shape[-1] if shape else 1) * bits
        flags = np.unpackbits(rows, axis=-1, count=count, bitorder="little")
        codes = (flags.reshape(*shape, bits) << np.arange(bits)).sum(-1)
        table = np.stack(levels(leaf["quantizer"]["name"], bits, arrays.pop(name + "#scales")))
        for axis, length in enumerate(shape):
            table = np.repeat(table, length // table.shape[1 + axis], axis=1 + axis)
        whole = np.take_along_axis(table, codes[None], axis=0)
        arrays[name] = whole.reshape(shape).astype(leaf["dtype"])
    return arrays
