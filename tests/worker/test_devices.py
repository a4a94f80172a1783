"""Which devices a worker owns and which a job sees."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from core.settings import Settings
from worker import devices
from worker.devices import DeviceGroup, DevicesMissing, Slots, _listed_by_driver, training_groups


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an nvidia-smi on PATH that does what its script says."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    _listed_by_driver.cache_clear()

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
        program.chmod(0o755)
        _listed_by_driver.cache_clear()

    return install


FOUR = "assert sys.argv[1:] == ['--query-gpu=uuid', '--format=csv,noheader']\nfor n in range(4): print(f'GPU-{n}')"


def groups(make_settings: Callable[..., Settings], **options: Any) -> list[tuple[str, ...]]:
    return [group.devices for group in training_groups(make_settings(**options))]


def test_without_gpus_the_cpu_is_one_slot_or_as_many_as_set(make_settings: Callable[..., Settings], driver: Callable[[str], None]) -> None:
    assert groups(make_settings) == [()]
    assert groups(make_settings, training_slots=3) == [(), (), ()]
    assert groups(make_settings, training_slots=0) == []
    driver("sys.exit('No devices were found')")
    assert groups(make_settings) == [()]


def test_every_gpu_trains_a_job_of_its_own_unless_a_job_takes_several(make_settings: Callable[..., Settings], driver: Callable[[str], None]) -> None:
    driver(FOUR)
    assert groups(make_settings) == [("GPU-0",), ("GPU-1",), ("GPU-2",), ("GPU-3",)]
    assert groups(make_settings, devices_per_job=2) == [("GPU-0", "GPU-1"), ("GPU-2", "GPU-3")]
    assert groups(make_settings, devices_per_job=3) == [("GPU-0", "GPU-1", "GPU-2")]
    assert groups(make_settings, device="cpu") == [()]


def test_a_driver_that_does_not_answer_is_not_taken_for_no_gpu(
    make_settings: Callable[..., Settings], driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "DRIVER_SECONDS", 0.3)
    driver("import time\ntime.sleep(30)")
    with pytest.raises(DevicesMissing, match="has not listed its GPUs within"):
        groups(make_settings)
    assert groups(make_settings, device="cpu") == [()]


def test_cuda_that_is_asked_for_and_not_there_is_an_error(make_settings: Callable[..., Settings], driver: Callable[[str], None]) -> None:
    driver("sys.exit('No devices were found')")
    with pytest.raises(DevicesMissing, match="SDFT_DEVICE is cuda"):
        groups(make_settings, device="cuda")


def test_fewer_devices_than_a_job_takes_are_an_error(make_settings: Callable[..., Settings], driver: Callable[[str], None]) -> None:
    driver(FOUR)
    with pytest.raises(DevicesMissing, match="SDFT_DEVICES_PER_JOB is 5, and this worker has 4"):
        groups(make_settings, devices_per_job=5)


def test_the_driver_is_asked_once(make_settings: Callable[..., Settings], driver: Callable[[str], None], tmp_path: Path) -> None:
    """One that answers the second time only must not give a worker threads for one job and slots for eight."""
    driver(f"open({str(tmp_path / 'asked')!r}, 'a').write('.')\nprint('GPU-0')")
    for _ in range(2):
        assert groups(make_settings) == [("GPU-0",)]
    assert (tmp_path / "asked").read_text() == "."


def test_what_is_set_goes_before_what_is_seen(make_settings: Callable[..., Settings], driver: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    driver(FOUR)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-3")
    assert groups(make_settings) == [("2",), ("GPU-3",)]
    monkeypatch.setenv("SDFT_DEVICES", "0, 1")
    assert groups(make_settings, devices_per_job=2) == [("0", "1")]
    monkeypatch.delenv("SDFT_DEVICES")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert groups(make_settings) == [()]


@pytest.mark.parametrize("value", ["", "0,0", "cpu,1"])
def test_devices_that_make_no_sense_are_refused(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SDFT_DEVICES", value)
    with pytest.raises(ValueError, match="devices"):
        make_settings()


def test_a_job_sees_its_own_devices_alone_and_several_mean_torchrun() -> None:
    trainer = ("python", "-m", "sdft_engine.train")
    assert DeviceGroup().environment() == {}
    assert DeviceGroup().command(trainer) == DeviceGroup(("GPU-1",)).command(trainer) == trainer
    assert DeviceGroup(("GPU-1",)).environment() == {"CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert DeviceGroup(("GPU-1", "GPU-2")).environment() == {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}
    assert DeviceGroup(("GPU-1", "GPU-2")).command(trainer) == (sys.executable, "-m", "sdft_engine.launch", "2")
    assert DeviceGroup(("cpu", "cpu")).environment() == {"CUDA_VISIBLE_DEVICES": ""}


def test_a_group_is_one_job_s_at_a_time() -> None:
    slots = Slots([DeviceGroup(("0",)), DeviceGroup(("1",))])
    in_use: list[DeviceGroup] = []

    def work(_: int) -> bool:
        with slots.take() as group:
            if group is None:
                return False
            assert group not in in_use
            in_use.append(group)
            in_use.remove(group)
            return True

    with ThreadPoolExecutor(8) as threads:
        assert any(threads.map(work, range(500)))
    with slots.take() as first, slots.take() as second, slots.take() as third:
        assert {first, second} == {DeviceGroup(("0",)), DeviceGroup(("1",))}
        assert third is None
    with slots.take() as again:
        assert again is not None
