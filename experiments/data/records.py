"""Images with their labels, in memory or on disk."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np


class Split(NamedTuple):
    """Some images with their labels.

    Args:
        images: uint8, of shape [count, height, width, channels].
        labels: int32, of shape [count].
    """

    images: np.ndarray
    labels: np.ndarray

    @property
    def size(self) -> int:
        """How many images there are."""
        return len(self.labels)

    def at(self, indices: np.ndarray) -> "Split":
        """The images of those indices, with their labels."""
        return Split(self.images[indices], self.labels[indices])


class Records(Protocol):
    """Images to be had by their indices: a split in memory, or one read from disk as it is asked for."""

    @property
    def size(self) -> int:
        """How many images there are."""
        ...

    def at(self, indices: np.ndarray) -> Split:
        """The images of those indices, with their labels."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Selected:
    """Some of other records, under new indices.

    Args:
        records: the others.
        indices: which of them.
    """

    records: Records
    indices: np.ndarray

    @property
    def size(self) -> int:
        """How many images there are."""
        return len(self.indices)

    def at(self, indices: np.ndarray) -> Split:
        """The images of those indices, with their labels."""
        return self.records.at(self.indices[indices])
