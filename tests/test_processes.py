"""The command line on several devices, in several processes, and under the signals of a cluster."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from experiments.reporting import run_folder
from stam_jax import pack, quantize, stam

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TINY = ("train", "--width", "0.125", "--batch-size", "128")


def start(folder: Path, *arguments: str, **surroundings: str) -> subprocess.Popen[str]:
    """`python -m experiments` in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", *TINY, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **surroundings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen[str], code: int = 0) -> list[tuple[str, str]]:
    """What each has printed, once all have ended with that exit code."""
    said = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in run_folder.read_csv(folder / "metrics.csv")]


def free_address() -> str:
    """Where the first of several processes can wait for the others."""
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The folder of a run on one device."""
    folder = tmp_path_factory.mktemp("single")
    finish(start(folder, "--epochs", "2", "--output", "run"))
    return folder / "run"


def test_eight_devices_follow_the_loss_curve_of_one(single, tmp_path):
    finish(start(tmp_path, "--epochs", "2", "--output", "run", JAX_NUM_CPU_DEVICES="8"))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(single), rtol=1e-5)


@pytest.mark.parametrize("loader", ["memory", "stream"])
def test_two_processes_follow_the_loss_curve_of_one(single, tmp_path, loader):
    address = free_address()
    together = ("--epochs", "2", "--output", "run", "--loader", loader)
    together += ("--coordinator", address, "--processes", "2")
    said = finish(*(start(tmp_path, *together, "--process", str(i)) for i in (0, 1)))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(single), rtol=1e-5)
    # Only the first of them talks and writes.
    assert ["Results:" in out for out, _ in said] == [True, False]
    assert len(losses(tmp_path / "run")) == 2


def comes(path: Path, process: subprocess.Popen[str]) -> bool:
    """Whether there is something at a path before the process ends."""
    while process.poll() is None:
        if path.exists() and (path.is_dir() or path.stat().st_size):
            return True
        time.sleep(0.05)
    return False


def test_a_killed_run_goes_on_and_ends_like_the_whole_one(tmp_path):
    long = ("--epochs", "20", "--checkpoint-every", "5", "--resume")
    finish(start(tmp_path, *long, "--output", "whole"))
    cut = start(tmp_path, *long, "--output", "cut")
    assert comes(tmp_path / "cut" / "checkpoints" / "45", cut), cut.communicate()
    cut.kill()
    finish(cut, code=-signal.SIGKILL)
    assert not (tmp_path / "cut" / "results.csv").exists()
    ((_, said),) = finish(start(tmp_path, *long, "--output", "cut"))
    assert "WARNING" not in said
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, resumed = (load_file(tmp_path / name / "packed.safetensors") for name in ("whole", "cut"))
    assert {k: v.tobytes() for k, v in whole.items()} == {k: v.tobytes() for k, v in resumed.items()}


def test_two_processes_that_are_asked_to_stop_stop_together(single, tmp_path):
    address = free_address()
    together = ("--epochs", "200", "--output", "run", "--coordinator", address, "--processes", "2")
    both = [start(tmp_path, *together, "--process", str(i)) for i in (0, 1)]
    assert comes(tmp_path / "run" / "metrics.csv", both[0])
    both[1].send_signal(signal.SIGTERM)
    ((_, said), _) = finish(*both, code=143)
    assert "To go on:" in said
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def check_packing(address: str, process: int) -> None:
    """In one of two processes with a device each: what is whole on both packs, what is spread does not."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 2, 1)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    value = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    place = lambda x, *axes: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, PartitionSpec(*axes)), lambda index: x[index]
    )
    whole = {"a": {"kernel": place(value)}, "b": place(value[0])}
    spread = {"a": {"kernel": place(value, "rows")}, "b": place(value[0])}
    optimizer = stam(optax.sgd(0.1), hard_from=1)

    @jax.jit
    def trained(params: Any) -> Any:
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    expected = trained({"a": {"kernel": value}, "b": value[0]})
    hard = trained(whole)
    packed = pack(hard)
    np.testing.assert_array_equal(packed["a"]["kernel"].unpack(), quantize(expected)["a"]["kernel"])
    np.testing.assert_array_equal(packed["b"], expected["b"])

    hard = trained(spread)
    assert not hard["a"]["kernel"].is_fully_addressable
    for params in (hard, quantize(hard)):
        with pytest.raises(ValueError, match=r"'a/kernel'.*process_allgather"):
            pack(params)
    # A leaf that is not quantized is part of what is shipped, too.
    unquantized = {"a": {"kernel": whole["a"]["kernel"]}, "b": spread["a"]["kernel"]}
    with pytest.raises(ValueError, match=r"'b'.*process_allgather"):
        pack(quantize(unquantized))
    gathered = multihost_utils.process_allgather(hard, tiled=True)
    np.testing.assert_allclose(pack(gathered)["a"]["kernel"].unpack(), expected["a"]["kernel"], rtol=1e-6)
    print("packed")


def test_what_spans_processes_is_gathered_before_it_is_packed():
    address = free_address()
    code = "import sys; from tests import test_processes as t; t.check_packing(sys.argv[1], int(sys.argv[2]))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(process)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    assert all(out.endswith("packed\n") for out, _ in finish(*both))
