"""The rules of the house that no single module can keep: sizes, doors, names, and what is installed."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.settings import Settings

ROOT = Path(__file__).parents[1]
ROOMS = ("api", "cli", "core", "inference", "local_stack", "migrations", "sdft_engine", "worker")
NEVER_INSTALLED = ("tests", "benchmarks", "examples")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python_files(*directories: str) -> list[Path]:
    return sorted(path for directory in directories for path in (ROOT / directory).rglob("*.py"))


SOURCES = python_files(*ROOMS, *(name for name in NEVER_INSTALLED if (ROOT / name).is_dir()))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length in lines of every function, decorators not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_every_room_exists_and_holds_code() -> None:
    assert [room for room in ROOMS if len(python_files(room)) < 2] == []


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = [f"{name_of(path)}::{name} has {length} lines" for path in SOURCES for name, length in functions_of(path) if length > MAX_FUNCTION_LINES]
    assert long == []


def test_package_markers_are_empty() -> None:
    assert [name_of(path) for path in SOURCES if path.name == "__init__.py" and path.read_bytes()] == []


def test_names_say_what_a_thing_is() -> None:
    parts = {name_of(path): {*path.relative_to(ROOT).with_suffix("").parts} for path in SOURCES}
    assert [name for name, words in parts.items() if words & NAMES_THAT_SAY_NOTHING] == []
    suffixes = tuple(f"_{word}" for word in NAMES_THAT_SAY_NOTHING)
    assert [name for name, words in parts.items() if any(word.endswith(suffixes) for word in words)] == []


def test_import_contracts_hold() -> None:
    run = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_engine_contract_is_guarded_against_every_module_of_the_engine() -> None:
    """import-linter wants the modules by name, so the list could go stale."""
    engine = ROOT / "sdft_engine"
    modules = {f"sdft_engine.{path.stem}" for path in engine.glob("*.py") if path.name != "__init__.py"}
    packages = {f"sdft_engine.{path.parent.name}" for path in engine.glob("*/__init__.py")} - {"sdft_engine.contract"}
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    (contract,) = [contract for contract in contracts if contract["source_modules"] == ["sdft_engine.contract"]]
    listed = {module for module in contract["forbidden_modules"] if module.startswith("sdft_engine.")}
    assert listed == modules | packages


@pytest.mark.parametrize("module", ["api.app", "worker.app", "cli.main", "local_stack", "sdft_engine.contract.prompts"])
def test_light_processes_import_no_tensor_library(module: str) -> None:
    program = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'vllm', 'numpy'}} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


def test_installed_packages_are_exactly_the_source_packages() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    existing = [".".join(path.parent.relative_to(ROOT).parts) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    assert sorted(listed) == sorted(existing)
    assert len(set(listed)) == len(listed)


def test_every_directory_with_code_is_a_package() -> None:
    without_marker = {name_of(path.parent) for path in python_files(*ROOMS) if not (path.parent / "__init__.py").exists()}
    assert without_marker == set()


def test_every_setting_is_documented() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    assert [name for name in Settings.model_fields if f"`SDFT_{name.upper()}`" not in operations] == []
