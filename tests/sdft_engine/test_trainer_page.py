"""docs/trainer.md: its example trains, and it names every file and field."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdft_engine import train as train_module
from sdft_engine.contract import run_directory
from sdft_engine.contract.config import TrainingConfig
from sdft_engine.contract.run_directory import RunDirectory
from sdft_engine.trainer import train

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainer.md").read_text()
LIBRARY_PAGE = (ROOT / "docs" / "library.md").read_text()


def table_names() -> set[str]:
    """What stands in backquotes in the first column of any table."""
    return {name for cell in re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)}


def test_the_example_trains(tmp_path: Path, tiny_model_dir: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"BASE_MODEL_DIR": str(tiny_model_dir)}, check=True, timeout=60)
    run = RunDirectory(tmp_path / "first-run")
    config = json.loads(run.config_path.read_text())
    run.config_path.write_text(json.dumps(config | {"device": "cpu", "dtype": "float32", "threads": 1}))
    result = train(run)
    assert (result.outcome, result.final_step) == ("succeeded", 4)
    assert run.final_dir.is_dir()


def test_the_librarys_example_runs_beside_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    for page in (PAGE, LIBRARY_PAGE):
        (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        environment = {"BASE_MODEL_DIR": str(tiny_model_dir), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=120, capture_output=True, text=True)
        if page is PAGE:
            train(RunDirectory(tmp_path / "first-run"))
    assert re.search(r"right without the demonstration \d of 4, with it \d\n", done.stdout)
    assert re.search(r"shown the demonstration \d+\.\d\d, tuned \d+\.\d\d\n", done.stdout)


def test_what_the_librarys_page_names_exists() -> None:
    for row in re.findall(r"^\| (`sdft_engine\..*) \|$", LIBRARY_PAGE, re.MULTILINE):
        modules, _, named = row.partition(" | ")
        found = [importlib.import_module(name) for name in re.findall(r"`([\w.]+)`", modules)]
        for name in re.findall(r"`(\w+)`", named):
            assert any(hasattr(module, name) for module in found), name


def test_every_file_and_every_field_is_described() -> None:
    files = set(re.findall(r"^    (\w\S*) {2,}", run_directory.__doc__ or "", re.MULTILINE))
    assert len(files) > 10
    assert files - table_names() == {"trainer.log"}
    assert "`trainer.log`" in PAGE
    assert set(TrainingConfig.model_fields) <= table_names()


def test_exit_statuses_are_those_of_the_code() -> None:
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == {0, train_module.EXIT_NOT_STARTED, run_directory.EXIT_LEASE_EXPIRED}


@pytest.mark.parametrize("name", [name for name, field in TrainingConfig.model_fields.items() if not field.is_required()])
def test_defaults_are_those_of_the_code(name: str) -> None:
    if name in ("sdft", "supervised"):  # one of them has to be given
        return
    (shown,) = re.findall(rf"^\| `{name}` \| (.*?) \|", PAGE, re.MULTILINE)
    default = TrainingConfig.model_fields[name].default
    assert shown == (f"`{default}`" if isinstance(default, str) else json.dumps(default))
