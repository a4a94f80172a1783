"""The list of protections fits the code and the tests; whether the tests notice their absence takes half an hour (see the module)."""

import re

import pytest

from tests.faults.protections import PROTECTIONS, ROOT, Protection


def test_every_fault_has_one() -> None:
    assert {protection.fault for protection in PROTECTIONS} == set(range(1, 23))


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda protection: f"{protection.fault}: {protection.what}")
def test_it_can_be_taken_away_from_code_that_a_test_covers(protection: Protection) -> None:
    paths = {ROOT / edit.path for edit in protection.edits}
    before = {path: path.read_text() for path in paths}
    changed = before.copy()
    for edit in protection.edits:
        assert changed[ROOT / edit.path].count(edit.old) == 1, edit
        changed[ROOT / edit.path] = changed[ROOT / edit.path].replace(edit.old, edit.new)
    for path, text in changed.items():
        compile(text, str(path), "exec")
    file, _, name = protection.test.partition("::")
    assert re.search(rf"^def {re.escape(name.partition('[')[0])}\(", (ROOT / file).read_text(), re.MULTILINE)
