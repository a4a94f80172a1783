import errno
import os
from pathlib import Path

import pytest

from core.durable_files import is_disk_full, rename_durably


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is flushed to the disk, and "rename", in order."""
    noted: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        noted.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        noted.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return noted


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, steps: list[str]) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "temporary").write_bytes(b"x")
    rename_durably(tmp_path / "temporary", tmp_path / "target" / "file")
    assert steps == ["temporary", "rename", "target"]
    assert (tmp_path / "target" / "file").read_bytes() == b"x"


def test_a_directory_is_on_the_disk_with_its_files_before_its_name_is(tmp_path: Path, steps: list[str]) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "temporary").mkdir()
    for name in ("a", "b"):
        (tmp_path / "temporary" / name).write_bytes(name.encode())
    rename_durably(tmp_path / "temporary", tmp_path / "target" / "directory")
    assert (sorted(steps[:2]), steps[2:]) == (["a", "b"], ["temporary", "rename", "target"])
    assert sorted(path.name for path in (tmp_path / "target" / "directory").iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "no space"), True),
        (OSError(errno.EDQUOT, "no quota"), True),
        (OSError(errno.EIO, "broken"), False),
        (ValueError("no space"), False),
    ],
)
def test_what_a_full_disk_is(error: Exception, full: bool) -> None:
    assert is_disk_full(error) is full
