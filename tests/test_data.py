"""Image sets: the formats of their releases, preparing, reading and splitting them. The files are made up."""

import dataclasses
import gzip
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from experiments.cli import main
from experiments.config import DatasetName, SettingsError
from experiments.data import downloads, image_sets, tfds
from experiments.data.downloads import RELEASES, Files, Part, Release
from experiments.data.records import Records, Selected, Split

NAMES: tuple[DatasetName, ...] = ("cifar10", "cifar100", "mnist", "fashion_mnist", "svhn_cropped")
TRAIN, TEST, HELD_OUT = 20, 6, 7


def small(name: str) -> Release:
    return dataclasses.replace(RELEASES[name], sizes={"train": TRAIN, "test": TEST}, held_out=HELD_OUT)


@pytest.fixture(autouse=True)
def small_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(RELEASES, name, small(name))


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def drawn(release: Release) -> dict[str, Part]:
    """Random images and labels in the numbers of a release."""
    rng = np.random.default_rng(0)
    return {
        split: Part(
            split,
            rng.integers(0, 256, (count, *release.shape), np.uint8),
            rng.integers(0, release.classes, count, np.int32),
            rng.integers(0, release.coarse_classes, count, np.int32) if release.coarse_classes else None,
        )
        for split, count in release.sizes.items()
    }


def idx(array: np.ndarray, magic: int = 0x0800) -> bytes:
    return np.array([magic + array.ndim, *array.shape], ">u4").tobytes() + array.astype(np.uint8).tobytes()


def mat(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, arrays)
    return buffer.getvalue()


def as_released(release: Release, part: Part) -> Iterator[tuple[str, bytes]]:
    """The files of a split, by their names."""
    names = release.files[part.split]
    if release.name.startswith("cifar"):
        columns = [part.labels] if part.coarse_labels is None else [part.coarse_labels, part.labels]
        planes = part.images.transpose(0, 3, 1, 2).reshape(len(part.labels), -1)
        records = np.column_stack([*columns, planes]).astype(np.uint8)
        for file, chunk in zip(names, np.split(records, len(names)), strict=True):
            yield file, chunk.tobytes()
    elif release.name == "svhn_cropped":
        labels = np.where(part.labels == 0, 10, part.labels)[:, None].astype(np.uint8)
        yield names[0], mat(X=np.moveaxis(part.images, 0, -1), y=labels)
    else:
        yield names[0], gzip.compress(idx(part.images[..., 0]))
        yield names[1], gzip.compress(idx(part.labels))


def write(folder: Path, name: str) -> Path:
    """A small release as loose files."""
    folder.mkdir(parents=True)
    release = small(name)
    for part in drawn(release).values():
        for file, content in as_released(release, part):
            (folder / file).write_bytes(content)
    for kind, file in release.label_files.items():
        count = release.coarse_classes if kind == "coarse_label" else release.classes
        (folder / file).write_text("\n".join(f"{kind}{i}" for i in range(count)) + "\n\n")
    return folder


def tar(path: Path, folder: Path, prefix: str = "") -> Path:
    with tarfile.open(path, "w:gz") as tarball:
        for file in sorted(folder.iterdir()):
            tarball.add(file, f"{prefix}/{file.name}")
    return path


@pytest.fixture(scope="module")
def loose(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("loose") / "files", name)


@pytest.fixture(scope="module")
def data_dir(name: str, loose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a small set lies prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(RELEASES, name, small(name))
        tfds.prepare(name, folder, loose)
    return folder


def parsed(name: str, source: Path) -> list[Part]:
    return list(downloads.parse(RELEASES[name], Files(RELEASES[name], source)))


def same_as_drawn(parts: list[Part], name: str) -> bool:
    for split, part in drawn(RELEASES[name]).items():
        read = [each for each in parts if each.split == split]
        np.testing.assert_array_equal(np.concatenate([each.images for each in read]), part.images)
        np.testing.assert_array_equal(np.concatenate([each.labels for each in read]), part.labels)
        if part.coarse_labels is not None:
            coarse = [each.coarse_labels for each in read if each.coarse_labels is not None]
            np.testing.assert_array_equal(np.concatenate(coarse), part.coarse_labels)
    return True


def images_with_labels(*splits: Split) -> list[tuple[bytes, int]]:
    return sorted(
        (image.tobytes(), int(label))
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    )


# The releases' own files.


def test_a_folder_of_files_is_read_exactly(name, loose):
    assert same_as_drawn(parsed(name, loose), name)


def test_images_are_bytes_and_labels_are_ints(name, loose):
    for part in parsed(name, loose):
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int32


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_tarball_is_read_exactly_wherever_it_is_found(name, tmp_path):
    folder = RELEASES[name].folder
    write(tmp_path / folder, name)
    assert same_as_drawn(parsed(name, tmp_path), name), "the folder in which a tarball unpacks"
    (tmp_path / "downloads").mkdir()
    tarball = tar(tmp_path / "downloads" / RELEASES[name].downloads[0], tmp_path / folder, folder)
    assert same_as_drawn(parsed(name, tarball), name)
    assert same_as_drawn(parsed(name, tarball.parent), name), "a folder with the tarball in it"


def test_idx_files_are_read_unpacked_too(tmp_path):
    folder = write(tmp_path / "files", "mnist")
    for file in list(folder.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert same_as_drawn(parsed("mnist", folder), "mnist")


def test_label_names_are_read_where_they_are_told(tmp_path):
    folder, release = write(tmp_path / "files", "cifar100"), RELEASES["cifar100"]
    names = downloads.label_names(release, Files(release, folder))
    assert {kind: (len(found), found[1]) for kind, found in names.items()} == {
        "label": (100, "label1"),
        "coarse_label": (20, "coarse_label1"),
    }
    for file in release.label_files.values():
        (folder / file).unlink()
    assert downloads.label_names(release, Files(release, folder)) == {}
    assert same_as_drawn(parsed("cifar100", folder), "cifar100")


def change(file: str, how: Callable[[bytes], bytes]) -> Callable[[Path], int]:
    return lambda folder: (folder / file).write_bytes(how((folder / file).read_bytes()))


def put(content: bytes) -> Callable[[bytes], bytes]:
    return lambda _: content


def gz(content: bytes) -> Callable[[bytes], bytes]:
    return put(gzip.compress(content))


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
X, Y = np.zeros((32, 32, 3, TRAIN), np.uint8), np.ones((TRAIN, 1), np.uint8)
PIXELS = np.zeros((TRAIN, 28, 28))
DAMAGE = {
    "a cut batch": (
        "cifar10",
        change("data_batch_2.bin", lambda b: b[:-1]),
        "data_batch_2.bin.*12292.*12291",
    ),
    "a longer batch": ("cifar100", change("test.bin", lambda b: b + b"0"), "test.bin.*18444.*18445"),
    "a missing batch": (
        "cifar10",
        lambda folder: (folder / "data_batch_5.bin").unlink(),
        "no file data_batch_5.bin",
    ),
    "a wrong label": (
        "cifar10",
        change("test_batch.bin", lambda b: b"\x0a" + b[1:]),
        "test_batch.bin.* 10.*0 to 9",
    ),
    "a wrong fine label": ("cifar100", change("train.bin", lambda b: b"\0\x64" + b[2:]), "train.bin.* 100"),
    "a wrong coarse label": (
        "cifar100",
        change("train.bin", lambda b: b"\x14" + b[1:]),
        "train.bin.* 20.*0 to 19",
    ),
    "an empty idx file": ("mnist", change(IMAGES, gz(b"")), "train-images.*idx header"),
    "a wrong magic number": ("mnist", change(LABELS, gz(idx(Y[:, 0], 0x0D00))), "train-labels.*2049.*3329"),
    "a wrong count": ("fashion_mnist", change(LABELS, gz(idx(Y[1:, 0]))), "train-labels.*20.*19"),
    "a cut idx file": ("mnist", change(IMAGES, gz(idx(PIXELS)[:-1])), "train-images.*15680.*15679"),
    "a longer idx file": ("mnist", change(IMAGES, gz(idx(PIXELS) + b"00")), "train-images.*15680.*15681"),
    "a cut gzip file": ("mnist", change(IMAGES, lambda b: b[:-20]), "train-images.*not a whole gzip file"),
    "a label of 10": ("mnist", change(LABELS, gz(idx(Y[:, 0] * 10))), "train-labels.* 10.*0 to 9"),
    "no labels": ("mnist", lambda folder: (folder / LABELS).unlink(), "no file train-labels"),
    "no Matlab file": (
        "svhn_cropped",
        change("train_32x32.mat", put(b"text")),
        "train_32x32.mat is not a Matlab",
    ),
    "a cut Matlab file": (
        "svhn_cropped",
        change("train_32x32.mat", lambda b: b[:-9]),
        "train_32x32.mat is not",
    ),
    "another array": ("svhn_cropped", change("train_32x32.mat", put(mat(X=X))), "train_32x32.mat.*'y'"),
    "too few images": (
        "svhn_cropped",
        change("train_32x32.mat", put(mat(X=X[..., 1:], y=Y))),
        r"train_32x32.mat.*\(32, 32, 3, 20.*\(32, 32, 3, 19",
    ),
    "too few labels": (
        "svhn_cropped",
        change("train_32x32.mat", put(mat(X=X, y=Y[1:]))),
        "mat.*20, 1.*19, 1",
    ),
    "a digit of 0": (
        "svhn_cropped",
        change("train_32x32.mat", put(mat(X=X, y=0 * Y))),
        "mat.*1 to 10.*0 to 0",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_nothing_is_written(name, damage, message, tmp_path):
    folder = write(tmp_path / "files", name)
    damage(folder)
    with pytest.raises(SettingsError, match=message) as raised:
        tfds.prepare(name, tmp_path / "data", folder)
    assert "\n" not in str(raised.value)
    assert tfds.find(name, tmp_path / "data") is None


def forged(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tarball of files, and of links where the content is text."""
    with tarfile.open(path, "w") as tarball:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tarball.addfile(member)
            else:
                member.size = len(content)
                tarball.addfile(member, io.BytesIO(content))
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


BATCH = bytes(4 * 3073)
TARBALLS = {
    "no tarball": (lambda at: at.write_bytes(b"text") and at, "not a whole tarball of cifar10"),
    "a cut tarball": (lambda at: cut(tar(at, write(at.parent / "files", "cifar10"))), "not a whole tarball"),
    "a member missing": (lambda at: forged(at, ("a/data_batch_1.bin", BATCH)), "no file data_batch_2.bin"),
    "a link": (lambda at: forged(at, ("a/data_batch_1.bin", "/etc/passwd")), "no file data_batch_1.bin"),
    "a member twice": (
        lambda at: forged(at, ("a/data_batch_1.bin", BATCH), ("data_batch_1.bin", BATCH)),
        "data_batch_1.bin twice",
    ),
    "a huge member": (lambda at: forged(at, ("data_batch_1.bin", 9 * BATCH)), "110628 bytes, more than all"),
}


@pytest.mark.parametrize(("forge", "message"), TARBALLS.values(), ids=TARBALLS)
def test_a_wrong_tarball_is_refused(forge, message, tmp_path):
    tarball = forge(tmp_path / "given.tar")
    with pytest.raises(SettingsError, match=message) as raised:
        tfds.prepare("cifar10", tmp_path / "data", tarball)
    assert str(tarball) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tarball_is_never_unpacked(tmp_path):
    folder = write(tmp_path / "files", "cifar10")
    members = [(f"../../{file.name}", file.read_bytes()) for file in folder.iterdir()]
    (tmp_path / "a" / "b").mkdir(parents=True)
    tarball = forged(tmp_path / "a" / "b" / "given.tar", *members, ("../evil", b"evil"))
    before = set(tmp_path.rglob("*"))
    assert same_as_drawn(parsed("cifar10", tarball), "cifar10")
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_source_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(SettingsError, match=r"no file or folder .*nowhere"):
        parsed(name, tmp_path / "nowhere")


def test_a_file_cannot_stand_for_several(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="is a file; mnist is read from a folder of train-images"):
        parsed("mnist", tmp_path / "file")


# Prepared sets.


def test_what_is_prepared_the_stock_entry_point_reads_exactly(name, data_dir):
    import tensorflow_datasets as tfds

    for split, part in drawn(RELEASES[name]).items():
        source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        examples: list[Any] = list(source)
        read = Split(
            np.stack([example["image"] for example in examples]),
            np.array([example["label"] for example in examples]),
        )
        assert images_with_labels(read) == images_with_labels(Split(part.images, part.labels))
        if part.coarse_labels is not None:
            assert sorted(example["coarse_label"] for example in examples) == sorted(part.coarse_labels)
        if "id" in examples[0]:
            assert len({example["id"] for example in examples}) == len(examples)
            assert all(example["id"].decode().startswith(f"{split}_000") for example in examples)


def test_prepared_records_are_those_of_the_release(name, data_dir):
    for split, part in drawn(RELEASES[name]).items():
        read = tfds.read_all(tfds.open_records(name, split, data_dir), chunk=4)
        assert read.images.dtype == np.uint8
        assert read.labels.dtype == np.int32
        assert images_with_labels(read) == images_with_labels(Split(part.images, part.labels))


@pytest.mark.parametrize(
    "indices", [[3, 1, 1, 19], [], [-1], slice(2, 9, 3), np.arange(TRAIN) % 2 == 0], ids=str
)
def test_records_are_read_at_indices_as_from_memory(name, data_dir, indices):
    indices = np.array(indices, int) if isinstance(indices, list) else indices
    records = tfds.open_records(name, "train", data_dir)
    read, expected = records.at(indices), tfds.read_all(records).at(indices)
    np.testing.assert_array_equal(read.images, expected.images)
    np.testing.assert_array_equal(read.labels, expected.labels)


def test_records_that_are_not_there_are_an_index_error(name, data_dir):
    with pytest.raises(IndexError):
        tfds.open_records(name, "train", data_dir).at(np.array([TRAIN]))


def test_records_can_be_pickled_before_and_after_they_are_opened(name, data_dir):
    records = Selected(tfds.Prepared(name, "train", data_dir), np.arange(1, TRAIN))
    fresh = pickle.loads(pickle.dumps(records))
    read = records.at(np.arange(5))
    assert len(pickle.dumps(records)) < 2000, "files are not part of it"
    for copy in (fresh, pickle.loads(pickle.dumps(records))):
        np.testing.assert_array_equal(copy.at(np.arange(5)).images, read.images)


def test_a_prepared_set_is_left_as_it_is(name, data_dir, capsys):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}

    before = times()
    assert tfds.prepare(name, data_dir) == tfds.find(name, data_dir)
    assert f"{name} is prepared already in {data_dir}" in capsys.readouterr().err
    assert times() == before


def test_the_command_prepares_a_set_and_says_where_it_is(tmp_path, capsys):
    files, data_dir = write(tmp_path / "files", "mnist"), tmp_path / "data"
    assert main(["prepare", "mnist", "--from", str(files), "--data-dir", str(data_dir)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"Prepared: {tfds.find('mnist', data_dir)}\n"
    assert captured.err.startswith(f"Preparing mnist in {data_dir}.")


def test_a_set_in_another_format_is_named(tmp_path):
    folder = tfds.prepare("mnist", tmp_path / "data", write(tmp_path / "files", "mnist"))
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(SettingsError, match=r"holds mnist as tfrecord.*another --data-dir"):
        image_sets.load("mnist", tmp_path / "data")


def test_a_set_of_another_size_is_named(tmp_path, monkeypatch):
    tfds.prepare("mnist", tmp_path / "data", write(tmp_path / "files", "mnist"))
    monkeypatch.setitem(
        RELEASES, "mnist", dataclasses.replace(small("mnist"), sizes={"train": 21, "test": 6})
    )
    with pytest.raises(SettingsError, match="20 images in train where there should be 21"):
        image_sets.load("mnist", tmp_path / "data")


def test_digits_need_no_preparing(tmp_path):
    with pytest.raises(SettingsError, match="digits needs no preparing; cifar10"):
        tfds.prepare("digits", tmp_path)


# Without a network.


def offline(*_: Any, **__: Any) -> Any:
    raise socket.gaierror("Name or service not known")


@pytest.mark.parametrize("load", [image_sets.load, tfds.prepare])
def test_without_a_network_the_message_says_how_to_prepare_by_hand(name, load, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    begun = time.monotonic()
    with pytest.raises(SettingsError) as raised:
        load(name, tmp_path)
    assert time.monotonic() - begun < 10
    message, release = str(raised.value), RELEASES[name]
    assert "\n" not in message
    for part in (
        f"{name} is not prepared in {tmp_path}",
        release.url.split("/")[2],
        f"python -m experiments prepare --dataset {name} --from PATH --data-dir {tmp_path}",
        release.downloads[0],
        "--dataset digits needs nothing",
    ):
        assert part in message
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_that_of_tensorflow_datasets(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert tfds.default_folder() == Path.home() / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "/elsewhere")
    assert tfds.default_folder() == Path("/elsewhere")


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    begun = time.monotonic()
    assert not tfds._resolves("https://example.org/", seconds=0.1)
    assert time.monotonic() - begun < 1


def test_behind_a_proxy_it_is_the_proxy_that_must_be_found(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: asked.append((host, port)) or [host])
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("https_proxy", "http://proxy.example.org:8080")
    assert tfds._resolves("https://example.org/")
    assert asked == [("proxy.example.org", 8080)]


def test_with_a_network_a_set_is_downloaded_once(name, loose, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    wanted = []

    def download(_: Any, urls: dict[str, str]) -> dict[str, Path]:
        wanted.extend(urls.values())
        # Downloads do not keep their names.
        for i, file in enumerate(urls):
            content = loose / file
            if RELEASES[name].archived:
                content = tar(tmp_path / "tarball", loose)
            (tmp_path / str(i)).write_bytes(content.read_bytes())
        return {file: tmp_path / str(i) for i, file in enumerate(urls)}

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ["an address"])
    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    for _ in range(2):
        loaded = image_sets.load(name, tmp_path / "data")
        assert loaded.train.size == TRAIN - HELD_OUT
    assert wanted == [RELEASES[name].url + file for file in RELEASES[name].downloads]
    checksums = tfds.builder_cls(name).url_infos
    assert checksums is not None
    assert set(wanted) <= set(checksums)


def no_route(*_: Any) -> Any:
    raise ConnectionError("no route\nto host")


def wrong_checksum(*_: Any) -> Any:
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    raise NonMatchingChecksumError("another\nchecksum")


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (no_route, r"cifar10 could not be prepared in .*no route to host"),
        (wrong_checksum, r"cifar10 could not be prepared in .*another checksum"),
        (lambda _, urls: {file: Path(os.devnull) for file in urls}, "not a whole tarball of cifar10"),
    ],
)
def test_a_download_that_fails_is_a_line_for_the_user(download, message, tmp_path, monkeypatch):
    import tensorflow_datasets

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ["an address"])
    monkeypatch.setattr(tensorflow_datasets.download.DownloadManager, "download", download)
    with pytest.raises(SettingsError, match=message) as raised:
        image_sets.load("cifar10", tmp_path / "data")
    assert "\n" not in str(raised.value)
    assert tfds.find("cifar10", tmp_path / "data") is None


def test_without_tensorflow_datasets_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(SettingsError, match=r"install \"stam-jax\[experiments\]\".*digits"):
        image_sets.load("cifar10", tmp_path)


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, experiments.data.tfds, experiments.data.batches; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"tensorflow_datasets", "grain", "PIL", "scipy.io"} & set(found.stdout.split())


# The parts of a set.


def test_training_and_validation_are_all_training_images_once(name, data_dir):
    loaded = image_sets.load(name, data_dir)
    expected = {split: Split(part.images, part.labels) for split, part in drawn(RELEASES[name]).items()}
    assert isinstance(loaded.train, Split)
    assert loaded.validation.size == HELD_OUT
    assert images_with_labels(loaded.train, loaded.validation) == images_with_labels(expected["train"])
    assert images_with_labels(loaded.test) == images_with_labels(expected["test"])


def test_a_set_that_is_streamed_is_the_same(name, data_dir):
    loaded, streamed = image_sets.load(name, data_dir), image_sets.load(name, data_dir, streamed=True)
    assert not isinstance(streamed.train, Split)
    assert streamed.train.size == loaded.train.size
    everything = np.arange(loaded.train.size)
    np.testing.assert_array_equal(streamed.train.at(everything).images, loaded.train.at(everything).images)
    np.testing.assert_array_equal(streamed.train.at(everything).labels, loaded.train.at(everything).labels)
    np.testing.assert_array_equal(streamed.validation.images, loaded.validation.images)
    np.testing.assert_array_equal(streamed.test.labels, loaded.test.labels)


@pytest.mark.parametrize("streamed", [False, True])
def test_fewer_training_images_are_the_same_ones_each_time_and_among_any_more(name, streamed, data_dir):
    images_of = lambda count: {
        image.tobytes() for image in _fewer(name, data_dir, streamed, count).at(np.arange(count)).images
    }
    everything = images_of(TRAIN - HELD_OUT)
    assert len(everything) == TRAIN - HELD_OUT
    assert len(images_of(5)) == 5
    assert images_of(5) < images_of(6) < everything
    assert images_of(5) == images_of(5)


def test_fewer_training_images_are_streamed_as_they_are_in_memory(name, data_dir):
    loaded, streamed = (_fewer(name, data_dir, each, 5).at(np.arange(5)) for each in (False, True))
    np.testing.assert_array_equal(streamed.images, loaded.images)
    np.testing.assert_array_equal(streamed.labels, loaded.labels)


def test_fewer_training_images_leave_the_other_parts_whole(name, data_dir):
    loaded = image_sets.load(name, data_dir)
    fewer = loaded.with_fewer(5)
    assert fewer.train.size == 5
    assert (fewer.validation, fewer.test) == (loaded.validation, loaded.test)


def _fewer(name: DatasetName, data_dir: Path, streamed: bool, count: int) -> Records:
    return image_sets.load(name, data_dir, streamed=streamed).with_fewer(count).train


def test_a_set_knows_what_its_release_says(name, data_dir):
    loaded, release = image_sets.load(name, data_dir), RELEASES[name]
    for field in ("classes", "mean", "deviation", "shift", "flip"):
        assert getattr(loaded, field) == getattr(release, field)
    assert len(loaded.mean) == len(loaded.deviation) == loaded.test.images.shape[-1]


def test_the_images_held_out_are_fixed():
    kept, left = image_sets.held_out(50000, 5000)
    assert len(left) == 5000
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, left])), np.arange(50000))
    again = image_sets.held_out(50000, 5000)
    np.testing.assert_array_equal(left, again[1])
    expected = np.random.default_rng(0).permutation(50000)[:5000]
    np.testing.assert_array_equal(left, np.sort(expected))


def test_digits_know_their_mean_and_deviation():
    digits = image_sets.load("digits")
    assert isinstance(digits.train, Split)
    pixels = digits.train.images / 1.0
    assert digits.train.size == 1197
    assert digits.mean == pytest.approx([pixels.mean()])
    assert digits.deviation == pytest.approx([pixels.std()])
    assert image_sets.load("digits", streamed=True).train.size == 1197


def test_long_reading_shows_a_bar_on_a_terminal(capsys, monkeypatch):
    split = Split(np.zeros((9, 1, 1, 1), np.uint8), np.arange(9, dtype=np.int32))
    np.testing.assert_array_equal(tfds.read_all(split, chunk=2).labels, split.labels)
    assert list(tfds._followed(range(3), "Reading", patience=-1)) == [0, 1, 2]
    assert capsys.readouterr().err == "", "no terminal"
    monkeypatch.setenv("FORCE_COLOR", "1")
    tfds.read_all(split, chunk=2)
    assert capsys.readouterr().err == "", "not long"
    assert list(tfds._followed(range(3), "Reading", patience=-1)) == [0, 1, 2]
    assert "Reading" in capsys.readouterr().err


# The real sets, where somebody has them.


@pytest.fixture(scope="module", params=NAMES)
def real(request: pytest.FixtureRequest) -> tuple[Release, list[Part]]:
    variable = f"STAM_JAX_{request.param.upper()}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no folder of the files of {request.param}")
    release = RELEASES[request.param]
    release = dataclasses.replace(release, sizes=ORIGINAL[request.param])
    return release, list(downloads.parse(release, Files(release, Path(os.environ[variable]))))


ORIGINAL = {name: release.sizes for name, release in RELEASES.items()}


def test_the_mean_and_deviation_are_those_of_the_training_images(real):
    release, parts = real
    # By how often each value occurs, which is exact and takes little memory.
    counts = np.zeros((release.shape[-1], 256))
    for part in parts:
        if part.split == "train":
            for channel in range(release.shape[-1]):
                counts[channel] += np.bincount(part.images[..., channel].ravel(), minlength=256)
    shares, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256)
    mean = shares @ values
    np.testing.assert_allclose(release.mean, mean, atol=1e-4)
    np.testing.assert_allclose(release.deviation, np.sqrt(shares @ values**2 - mean**2), atol=1e-4)


def test_every_class_of_the_real_cifar_has_as_many_images(real):
    release, parts = real
    if not release.name.startswith("cifar"):
        pytest.skip("only CIFAR is balanced")
    for split, size in release.sizes.items():
        labels = np.concatenate([part.labels for part in parts if part.split == split])
        assert set(np.bincount(labels, minlength=release.classes)) == {size // release.classes}
