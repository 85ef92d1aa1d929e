"""Image sets as their authors released them: which files, of which format, with what in them."""

import dataclasses
import gzip
import io
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from experiments.config import SettingsError


class Part(NamedTuple):
    """Some images of a release with their labels, in the order of its files.

    Args:
        split: "train" or "test".
        images: uint8, of shape [count, height, width, channels].
        labels: int32, of shape [count].
        coarse_labels: int32, of shape [count], where a release has labels of two kinds.
    """

    split: str
    images: np.ndarray
    labels: np.ndarray
    coarse_labels: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """An image set as it was released, and what training should know of it.

    Args:
        name: of the set, as in TensorFlow Datasets.
        url: where its files are.
        downloads: the files there.
        archived: whether these are tarballs of the files read.
        folder: the folder in which a tarball puts its files.
        files: the names of the files read of each split, in order.
        label_files: files that name the labels, by the kind of label.
        sizes: images of each split.
        classes: number of labels.
        coarse_classes: number of labels of the second kind; 0 without one.
        shape: of an image: height, width and channels.
        mean: of the training pixels, per channel, of values from 0 to 255.
        deviation: standard deviation of the training pixels, per channel.
        shift: pixels by which an image may be moved and keep its label.
        flip: whether an image may be mirrored and keep its label.
        held_out: training images to keep for validation.
        parse: reads the parts of a split.
    """

    name: str
    url: str
    downloads: tuple[str, ...]
    archived: bool = False
    folder: str = ""
    files: Mapping[str, tuple[str, ...]]
    label_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int]
    classes: int
    coarse_classes: int = 0
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    shift: int
    flip: bool
    held_out: int = 5000
    parse: "Callable[[Release, Files, str], Iterator[Part]]"


class Files:
    """The files of a release by their names: loose ones, or the members of a tarball, which is not unpacked.

    Args:
        release: whose files they are.
        source: a folder of them, their tarball, or where each download lies.

    Raises:
        SettingsError: if there is no such folder or tarball.
    """

    def __init__(self, release: Release, source: Path | Mapping[str, Path]):
        self.where = str(source) if isinstance(source, Path) else release.url
        self._members: dict[str, bytes] = {}
        self._paths: dict[str, Path] = {}
        if isinstance(source, Path):
            self._search(release, source)
        elif release.archived:
            self._read_tarball(release, source[release.downloads[0]])
        else:
            self._paths = {name: Path(path) for name, path in source.items()}

    def _search(self, release: Release, source: Path) -> None:
        """Find files below a path that somebody gave."""
        if source.is_dir():
            for folder in (source, source / release.folder):
                if folder.is_dir():
                    self._paths |= {path.name: path for path in folder.iterdir()}
            tarball = self._paths.get(release.downloads[0])
            if release.archived and tarball and not self._names(release) & self._paths.keys():
                self._read_tarball(release, tarball)
        elif not source.is_file():
            raise SettingsError(f"There is no file or folder {source}.")
        elif release.archived:
            self._read_tarball(release, source)
        else:
            wanted = ", ".join(release.downloads)
            raise SettingsError(f"{source} is a file; {release.name} is read from a folder of {wanted}.")

    @staticmethod
    def _names(release: Release) -> set[str]:
        return {name for names in release.files.values() for name in names}

    def _read_tarball(self, release: Release, path: Path) -> None:
        """Take the files of the release out of a tarball, and nothing else: it may come from anywhere."""
        names = self._names(release) | set(release.label_files.values())
        largest = max(release.sizes.values()) * (math.prod(release.shape) + 2)
        try:
            with tarfile.open(path, "r:*") as tarball:
                for member in tarball:
                    name = PurePosixPath(member.name).name
                    if name not in names or not member.isfile():
                        continue
                    if name in self._members:
                        raise SettingsError(f"{path} holds {name} twice.")
                    if member.size > largest:
                        raise SettingsError(f"{path}: {name} has {member.size} bytes, more than all images.")
                    stream = tarball.extractfile(member)
                    assert stream is not None
                    self._members[name] = stream.read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            reason = str(error).partition("\n")[0].rstrip(":")  # What each kind of tarball lacks comes after.
            raise SettingsError(f"{path} is not a whole tarball of {release.name}: {reason}.") from error

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return name in self._members or name in self._paths

    def read(self, *names: str) -> bytes:
        """The bytes of the first of those files that is there.

        Raises:
            SettingsError: if none is, or it cannot be read.
        """
        for name in names:
            if name in self._members:
                return self._members[name]
            if name in self._paths:
                path = self._paths[name]
                try:
                    return path.read_bytes()
                except OSError as error:
                    raise SettingsError(f"{path} cannot be read: {error}.") from error
        raise SettingsError(f"{self.where} holds no file {' or '.join(names)}.")


def _expect(name: str, what: str, expected: object, found: object) -> None:
    """Raise a SettingsError if what a file should have is not what it has."""
    if expected != found:
        raise SettingsError(f"{name} should have {what} {expected} but has {found}.")


def _labels(name: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels as int32, seen to be below the number of classes."""
    if labels.size and labels.max() >= classes:
        raise SettingsError(f"{name} has a label {labels.max()}, but labels are from 0 to {classes - 1}.")
    return labels.astype(np.int32)


def _cifar(release: Release, files: Files, split: str) -> Iterator[Part]:
    """Records of one or two bytes of labels, the fine one last, and an image in planes of colors."""
    kinds = 2 if release.coarse_classes else 1
    height, width, channels = release.shape
    names = release.files[split]
    count = release.sizes[split] // len(names)
    for name in names:
        content = files.read(name)
        record = kinds + math.prod(release.shape)
        _expect(name, "bytes:", count * record, len(content))
        records = np.frombuffer(content, np.uint8).reshape(count, record)
        yield Part(
            split,
            images=records[:, kinds:].reshape(count, channels, height, width).transpose(0, 2, 3, 1),
            labels=_labels(name, records[:, kinds - 1], release.classes),
            coarse_labels=_labels(name, records[:, 0], release.coarse_classes) if kinds == 2 else None,
        )


_IDX_OF_BYTES = 0x0800  # A magic number of two zero bytes, 8 for uint8, and the number of dimensions.


def _idx(files: Files, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of an idx file, compressed or not, of the shape that it must have."""
    content = files.read(name, name.removesuffix(".gz"))
    if content[:2] == b"\x1f\x8b":
        try:
            # One byte more than should come is enough to see that there is too much.
            with gzip.open(io.BytesIO(content)) as stream:
                content = stream.read(4 + 4 * len(shape) + math.prod(shape) + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise SettingsError(f"{name} is not a whole gzip file: {error}.") from error
    header = np.frombuffer(content[: 4 + 4 * len(shape)], ">u4") if len(content) >= 4 + 4 * len(shape) else ()
    _expect(name, "the idx header", [_IDX_OF_BYTES + len(shape), *shape], [int(number) for number in header])
    _expect(name, "bytes:", math.prod(shape), len(content) - 4 - 4 * len(shape))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _mnist(release: Release, files: Files, split: str) -> Iterator[Part]:
    """A file of images and one of labels, each an array with its shape before it."""
    count, (images, labels) = release.sizes[split], release.files[split]
    pixels = _idx(files, images, (count, *release.shape[:2]))
    yield Part(split, pixels[..., None], _labels(labels, _idx(files, labels, (count,)), release.classes))


def _svhn(release: Release, files: Files, split: str) -> Iterator[Part]:
    """A Matlab file of X, the images along its last axis, and y, labels from 1 to 10; 10 is the digit 0."""
    from scipy.io import loadmat

    name, count = release.files[split][0], release.sizes[split]
    content = files.read(name)
    try:
        arrays = loadmat(io.BytesIO(content))
        pixels, labels = arrays["X"], arrays["y"]
    except Exception as error:  # What loadmat raises for a damaged file is of any kind.
        raise SettingsError(f"{name} is not a Matlab file of arrays X and y: {error!r}.") from error
    _expect(name, "X of", (*release.shape, count, "uint8"), (*pixels.shape, str(pixels.dtype)))
    _expect(name, "y of", (count, 1), labels.shape)
    if labels.min() < 1 or labels.max() > release.classes:
        found = f"{labels.min()} to {labels.max()}"
        raise SettingsError(f"{name} should have labels from 1 to {release.classes} but has {found}.")
    yield Part(split, np.moveaxis(pixels, -1, 0), (labels[:, 0] % release.classes).astype(np.int32))


def parse(release: Release, files: Files) -> Iterator[Part]:
    """Read a release's own files.

    Args:
        release: which.
        files: where they are.

    Yields:
        The images with their labels, file by file.

    Raises:
        SettingsError: if a file is missing or damaged, or is another than it should be.
    """
    for split in release.files:
        yield from release.parse(release, files, split)


def label_names(release: Release, files: Files) -> dict[str, list[str]]:
    """The names of the labels by their kind, as far as a release's files tell them."""
    found = {kind: name for kind, name in release.label_files.items() if files.has(name)}
    return {kind: files.read(name).decode().split() for kind, name in found.items()}


def _mnist_like(name: str, url: str, *, mean: float, deviation: float, flip: bool) -> Release:
    """A release in the format of MNIST."""
    files = {
        split: (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }
    return Release(
        name=name,
        url=url,
        downloads=files["train"] + files["test"],
        files=files,
        sizes={"train": 60000, "test": 10000},
        classes=10,
        shape=(28, 28, 1),
        mean=(mean,),
        deviation=(deviation,),
        shift=2,
        flip=flip,
        parse=_mnist,
    )


_CIFAR10 = Release(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/",
    downloads=("cifar-10-binary.tar.gz",),
    archived=True,
    folder="cifar-10-batches-bin",
    files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    label_files={"label": "batches.meta.txt"},
    sizes={"train": 50000, "test": 10000},
    classes=10,
    shape=(32, 32, 3),
    mean=(125.306918, 122.950394, 113.865383),
    deviation=(62.993219, 62.088708, 66.704900),
    shift=4,
    flip=True,
    parse=_cifar,
)
_CIFAR100 = dataclasses.replace(
    _CIFAR10,
    name="cifar100",
    downloads=("cifar-100-binary.tar.gz",),
    folder="cifar-100-binary",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    label_files={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
    classes=100,
    coarse_classes=20,
    mean=(129.304166, 124.069963, 112.434050),
    deviation=(68.170243, 65.391808, 70.418370),
)
_MNIST = _mnist_like(
    "mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    mean=33.318421,
    deviation=78.567490,
    flip=False,
)
_FASHION = _mnist_like(
    "fashion_mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    mean=72.940352,
    deviation=90.021182,
    flip=True,
)
_SVHN = Release(
    name="svhn_cropped",
    url="http://ufldl.stanford.edu/housenumbers/",
    downloads=("train_32x32.mat", "test_32x32.mat"),
    files={"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)},
    sizes={"train": 73257, "test": 26032},
    classes=10,
    shape=(32, 32, 3),
    mean=(111.608936, 113.161274, 120.565127),
    deviation=(50.497681, 51.258983, 50.244214),
    shift=4,
    flip=False,
    parse=_svhn,
)
RELEASES = {release.name: release for release in (_CIFAR10, _CIFAR100, _MNIST, _FASHION, _SVHN)}
"""Every release, by the name of its set."""
