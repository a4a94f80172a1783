"""The list of protections fits the code and the tests; whether the tests notice their absence takes half an hour (see the module)."""

import subprocess
import sys

import pytest

from tests.faults.protections import PROTECTIONS, ROOT, Protection, texts_without


def test_every_fault_has_one() -> None:
    assert {protection.fault for protection in PROTECTIONS} == set(range(1, 23))


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda protection: f"{protection.fault}: {protection.what}")
def test_it_can_be_taken_away(protection: Protection) -> None:
    for path, text in texts_without(protection).items():
        compile(text, str(path), "exec")


def test_every_test_is_there() -> None:
    tests = sorted({protection.test for protection in PROTECTIONS})
    found = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-2000:]
