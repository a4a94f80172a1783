"""worker.checkpoint_import without a database: which of the waiting checkpoints are stored."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.storage import Check
from sdft_engine.contract import sealed_directory
from sdft_engine.contract.run_directory import RunDirectory
from worker.checkpoint_import import CheckpointImport


@pytest.mark.parametrize(("stop_after", "stored"), [(None, [1, 2, 3, 4]), (0, [4]), (2, [1, 2, 4])])
def test_once_it_is_to_stop_only_the_newest_checkpoint_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int | None, stored: list[int]
) -> None:
    run, found = RunDirectory(tmp_path), list[int]()
    for step in range(1, 5):
        run.checkpoint_dir(step).mkdir(parents=True)
    lease = SimpleNamespace(check_in_time=lambda: None, stop="cancel" if stop_after == 0 else None)

    def store(step: int, directory: Path, check: Check) -> None:
        found.append(step)
        lease.stop = "cancel" if len(found) == stop_after else lease.stop

    nothing: Any = None
    checkpoints = CheckpointImport(nothing, run, lease, SimpleNamespace(job=None))  # type: ignore[arg-type]
    monkeypatch.setattr(checkpoints, "_store", store)
    monkeypatch.setattr(sealed_directory, "verify", lambda directory: None)
    checkpoints.import_new()
    assert found == stored
