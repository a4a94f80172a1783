"""The list of protections fits the code and the tests; whether the tests notice their absence takes half an hour (see the module)."""

import subprocess
import sys

import pytest

from tests.faults.protections import PROTECTIONS, ROOT, Protection


def test_every_fault_has_one() -> None:
    assert {protection.fault for protection in PROTECTIONS} == set(range(1, 23))


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda protection: f"{protection.fault}: {protection.what}")
def test_it_can_be_taken_away(protection: Protection) -> None:
    paths = {ROOT / edit.path for edit in protection.edits}
    before = {path: path.read_text() for path in paths}
    changed = before.copy()
    for edit in protection.edits:
        assert changed[ROOT / edit.path].count(edit.old) == 1, edit
        changed[ROOT / edit.path] = changed[ROOT / edit.path].replace(edit.old, edit.new)
    for path, text in changed.items():
        compile(text, str(path), "exec")


def test_every_test_is_there() -> None:
    tests = sorted({protection.test for protection in PROTECTIONS})
    found = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", *tests], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-2000:]
