"""Image sets as TensorFlow Datasets keeps them on disk, prepared and read without TensorFlow."""

import contextlib
import dataclasses
import functools
import io
import os
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from experiments.config import SettingsError
from experiments.data import downloads
from experiments.data.downloads import RELEASES, Part, Release
from experiments.data.records import Records, Split

_FORMAT = "array_record"  # The one that is read record by record, and without TensorFlow.


def default_folder() -> Path:
    """Where TensorFlow Datasets keeps its sets if nothing else is said."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def _library() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise SettingsError(f'{error}: install "stam-jax[experiments]", or use --dataset digits.') from error
    return tensorflow_datasets


def _release(name: str) -> Release:
    if name not in RELEASES:
        raise SettingsError(f"{name} needs no preparing; {', '.join(RELEASES)} do.")
    return RELEASES[name]


def find(name: str, data_dir: Path | None = None) -> Path | None:
    """The folder of a prepared set, or None if it is not prepared.

    Args:
        name: of the set.
        data_dir: where TensorFlow Datasets keeps its sets.

    Raises:
        SettingsError: if the set is there, but not in a format that can be read record by record.
    """
    builder = _library().builder(_release(name).name, data_dir=data_dir or default_folder())
    folder = Path(builder.data_path)
    # TFDS would warn of a folder that is not there.
    if not folder.is_dir() or not builder.is_prepared():
        return None
    formats = {form.value for form in builder.info.available_file_formats()}
    if _FORMAT not in formats:
        raise SettingsError(
            f"{folder} holds {name} as {' and '.join(sorted(formats))}, which cannot be read one by one "
            f"without TensorFlow: give another --data-dir to prepare it as {_FORMAT}."
        )
    return folder


def _png(image: np.ndarray) -> bytes:
    """A PNG of an image of one or three channels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "png")
    return buffer.getvalue()


def _builder(release: Release, data_dir: Path, source: Path | None) -> Any:
    """The stock builder of a set, save that it reads a release and writes PNGs without TensorFlow."""
    stock: Any = _library().builder_cls(release.name)
    given = None if source is None else _read(release, source)

    class Builder(stock, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        name = stock.name
        pkg_dir_path = stock.pkg_dir_path
        url_infos = stock.url_infos  # The checksums of the downloads.

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            urls = {file: urllib.parse.urljoin(release.url, file) for file in release.downloads}
            parts, names = given or _read(release, dl_manager.download(urls))
            for kind, labels in names.items():
                self.info.features[kind].names = labels
            return {
                split: self._generate_examples(split, [part for part in parts if part.split == split])
                for split in release.sizes
            }

        def _generate_examples(
            self, split: str, parts: Iterable[Part]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            features, digits = self.info.features, 6 if release.name == "svhn_cropped" else 5
            index = 0
            for part in parts:
                for i in range(len(part.labels)):
                    record: dict[str, Any] = {"image": _png(part.images[i]), "label": int(part.labels[i])}
                    if part.coarse_labels is not None:
                        record["coarse_label"] = int(part.coarse_labels[i])
                    if "id" in features:
                        record["id"] = f"{split}_{index:0{digits}}"
                    yield index, record
                    index += 1

    return Builder(data_dir=data_dir)


def _read(release: Release, source: Path | Mapping[str, Path]) -> tuple[list[Part], dict[str, list[str]]]:
    """All of a release and the names of its labels; read at once, to find what is wrong before writing."""
    files = downloads.Files(release, source)
    return list(downloads.parse(release, files)), downloads.label_names(release, files)


def _resolves(url: str, seconds: float = 5) -> bool:
    """Whether the host of a URL, or of the proxy to it, has an address."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(proxy)
    found = threading.Event()

    def look_up() -> None:
        with contextlib.suppress(OSError):
            if socket.getaddrinfo(parts.hostname, parts.port or 443):
                found.set()

    thread = threading.Thread(target=look_up, daemon=True)  # It may hang for longer than anybody waits.
    thread.start()
    thread.join(seconds)
    return found.is_set()


def _unreachable(release: Release, data_dir: Path) -> SettingsError:
    host = urllib.parse.urlsplit(release.url).hostname
    wanted = f"the tarball {release.downloads[0]} or its extracted files"
    if not release.archived:
        wanted = f"the folder of {', '.join(release.downloads)}"
    return SettingsError(
        f"{release.name} is not prepared in {data_dir}, and {host} cannot be reached to download it. "
        "Prepare it by hand: "
        f"python -m experiments prepare --dataset {release.name} --from PATH --data-dir {data_dir} "
        f"with PATH {wanted}. --dataset digits needs nothing."
    )


def prepare(name: str, data_dir: Path | None = None, source: Path | None = None) -> Path:
    """Write a set to disk as TensorFlow Datasets does; one that is there already is left as it is.

    Args:
        name: of the set.
        data_dir: where TensorFlow Datasets keeps its sets.
        source: the release's own tarball, or a folder of its files; None to download it.

    Returns:
        The folder of the set.

    Raises:
        SettingsError: if the source is damaged, or there is none and it cannot be downloaded.
    """
    release, folder = _release(name), data_dir or default_folder()
    console = Console(stderr=True)
    if found := find(name, folder):
        console.print(f"{name} is prepared already in {found}.", soft_wrap=True, highlight=False)
        return found
    if source is None and not _resolves(release.url):
        raise _unreachable(release, folder)
    tfds = _library()
    console.print(f"Preparing {name} in {folder}.", soft_wrap=True, highlight=False)
    builder = _builder(release, folder, source)
    download = tfds.download
    config = download.DownloadConfig(try_download_gcs=False, force_checksums_validation=True)
    failures = (OSError, download.DownloadError, download.download_manager.NonMatchingChecksumError)
    tfds.display_progress_bar(sys.stderr.isatty())
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS says it all once more.
            builder.download_and_prepare(download_config=config, file_format=_FORMAT)
    except failures as error:
        raise SettingsError(
            f"{name} could not be prepared in {folder}: {' '.join(str(error).split())}"
        ) from error
    return Path(builder.data_path)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A split of a prepared set, its images read and decoded as they are asked for.

    It can be pickled; each process opens the files for itself.

    Args:
        name: of the set.
        split: "train" or "test".
        data_dir: where TensorFlow Datasets keeps its sets.
    """

    name: str
    split: str
    data_dir: Path

    @functools.cached_property
    def _source(self) -> Any:
        tfds = _library()
        return tfds.data_source(
            self.name,
            split=self.split,
            data_dir=self.data_dir,
            download=False,
            # `at` decodes in half the time that TFDS takes; TFDS would also warn that OpenCV is not there.
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def size(self) -> int:
        """How many images there are."""
        return len(self._source)

    def at(self, indices: np.ndarray) -> Split:
        """The images of those indices, with their labels."""
        from PIL import Image
        from tensorflow_datasets.proto import tf_example_pb2

        example: Any = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
        shape = RELEASES[self.name].shape
        wanted = np.arange(self.size)[indices].tolist()
        images = np.empty((len(wanted), *shape), np.uint8)
        labels = np.empty(len(wanted), np.int32)
        for i, record in enumerate(self._source.__getitems__(wanted)):
            features = example.FromString(record).features.feature
            with Image.open(io.BytesIO(features["image"].bytes_list.value[0]), formats=["PNG"]) as image:
                images[i] = np.frombuffer(image.tobytes(), np.uint8).reshape(shape)
            labels[i] = features["label"].int64_list.value[0]
        return Split(images, labels)


def label_names(name: str, data_dir: Path | None = None) -> tuple[str, ...]:
    """The names of the labels of a prepared set, in order."""
    builder = _library().builder(_release(name).name, data_dir=data_dir or default_folder())
    return tuple(builder.info.features["label"].names)


def open_records(name: str, split: str, data_dir: Path | None = None) -> Prepared:
    """A split of a set, to be read record by record; a set that is not prepared is first downloaded.

    Args:
        name: of the set.
        split: "train" or "test".
        data_dir: where TensorFlow Datasets keeps its sets.

    Raises:
        SettingsError: if the set is not there and cannot be downloaded, or has another number of images.
    """
    folder = data_dir or default_folder()
    if find(name, folder) is None:
        prepare(name, folder)
    records = Prepared(name, split, folder)
    expected = RELEASES[name].sizes[split]
    if records.size != expected:
        raise SettingsError(
            f"{folder} holds {name} with {records.size} images in {split} where there should be {expected}."
        )
    return records


def read_all(records: Records, chunk: int = 500) -> Split:
    """All of some records, in memory; where that takes long, a bar shows how far it is.

    Args:
        records: to read.
        chunk: how many at a time.
    """
    starts = range(0, records.size, chunk)
    parts = [
        records.at(np.arange(start, min(start + chunk, records.size)))
        for start in _followed(starts, f"Reading {records.size:,} images")
    ]
    return Split(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _followed(steps: range, title: str, patience: float = 5) -> Iterator[int]:
    """The steps of a range, with a bar on standard error once they have taken some seconds."""
    begun = time.monotonic()
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(title, total=len(steps))
    try:
        for step in steps:
            yield step
            bar.advance(task)
            if time.monotonic() - begun > patience:
                bar.start()
    finally:
        if bar.live.is_started:  # Else stopping it would write an empty line.
            bar.stop()
