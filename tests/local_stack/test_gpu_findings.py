"""`sdft doctor` on GPUs, with a scripted driver and a scripted torch: no machine has every fault."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from core.settings import Settings
from local_stack import gpu_findings as gpus
from local_stack.finding import Finding

TWO_GPUS = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-8932f937-d72c-4106-c12f-20bd9faed9f6)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-d72c-4106-c12f-20bd9faed9f6)
  MIG 3g.40gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
"""
WITHOUT_CUDA = "class version:\n    cuda = None\nclass cuda:\n    is_available = lambda: False\n    device_count = lambda: 0\n"
WITH_CUDA = WITHOUT_CUDA.replace("None", "'13.0'")
WORKING = WITH_CUDA.replace("False", "True").replace("lambda: 0", "lambda: 2")

Examine = Callable[..., list[Finding]]


@pytest.fixture
def examine(make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """`driver`: what nvidia-smi prints; None: there is none. `torch`: the module's text."""

    def run(driver: str | None, torch: str, status: int = 0, **overrides: object) -> list[Finding]:
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        if driver is not None:
            (programs / "listed").write_text(driver)
            (programs / "nvidia-smi").write_text(f"#!/bin/sh\n/bin/cat {programs / 'listed'}\nexit {status}\n")
            (programs / "nvidia-smi").chmod(0o755)
        (programs / "torch.py").write_text(torch)
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setenv("PYTHONPATH", str(programs))
        return gpus.gpu_findings(make_settings(**overrides))

    return run


def test_a_machine_without_a_gpu_is_asked_nothing(examine: Examine) -> None:
    assert examine(None, "raise SystemExit(9)") == []


def test_a_gpu_that_torch_uses(examine: Examine) -> None:
    (finding,) = examine(TWO_GPUS, WORKING)
    assert (finding.problem, finding.what) == (None, "torch and the 2 GPUs that the driver lists (2 CUDA devices)")


def test_a_driver_without_a_torch_for_cuda(examine: Examine) -> None:
    (finding,) = examine(TWO_GPUS, WITHOUT_CUDA)
    assert finding.problem == "torch is built without CUDA, so jobs train on the CPU"
    assert finding.is_warning
    assert "install a torch that is built for CUDA" in finding.mend
    (finding,) = examine(TWO_GPUS, WITHOUT_CUDA, device="cuda")
    assert finding.hinders, "the settings insist on it"


def test_a_torch_for_cuda_without_a_driver(examine: Examine) -> None:
    (finding,) = examine(None, WITH_CUDA, device="cuda")
    assert finding.problem == "torch is built for CUDA 13.0 and finds no CUDA device: there is no driver"
    assert "install the GPU's driver" in finding.mend
    assert finding.hinders


def test_a_driver_that_lists_nothing(examine: Examine) -> None:
    (finding,) = examine("No devices were found\n", WITH_CUDA, status=6)
    assert finding.problem == "nvidia-smi lists no GPU: No devices were found"
    assert finding.is_warning


def test_a_driver_too_old_for_torch(examine: Examine) -> None:
    (finding,) = examine(TWO_GPUS, WITH_CUDA)
    assert finding.problem == "torch is built for CUDA 13.0 and finds no CUDA device, though the driver lists 2"
    assert "update the driver" in finding.mend


def test_a_torch_that_does_not_run(examine: Examine) -> None:
    (finding,) = examine(None, "raise ImportError('wrong libc')", device="cuda")
    assert finding.problem == "torch doesn't run: ImportError: wrong libc"


@pytest.mark.parametrize("names", ["0", "1,0", "GPU-8932f937", "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"])
def test_devices_that_are_there(examine: Examine, names: str) -> None:
    assert [finding.problem for finding in examine(TWO_GPUS, WORKING, devices=names)] == [None, None]


def test_devices_that_are_not_there_are_named_with_those_that_are(examine: Examine) -> None:
    finding = examine(TWO_GPUS, WORKING, devices="0,7,GPU-99")[-1]
    assert str(finding.problem).startswith("there is no 7, GPU-99; the driver lists: 0, 1, GPU-8932f937")
    assert finding.mend == "write SDFT_DEVICES=GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-11111111-d72c-4106-c12f-20bd9faed9f6"
    (Path(os.environ["PATH"]) / "nvidia-smi").unlink()
    without = examine(None, WITH_CUDA, devices="0")[-1]
    assert (without.problem, without.mend) == ("there is no 0; the driver lists: none", "unset SDFT_DEVICES")


def test_processes_on_the_cpu_are_no_gpus(examine: Examine) -> None:
    assert examine(None, "raise SystemExit(9)", devices="cpu,cpu", device="cpu") == []
