"""The tests in tests/gpu run on few machines: what they reach into by name must exist, which can be seen on any."""

import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_what_they_replace_exists() -> None:
    targets = [name for path in (ROOT / "tests" / "gpu").glob("*.py") for name in re.findall(r'setattr\("([\w.]+)"', path.read_text())]
    assert targets
    for target in targets:
        module, _, name = target.rpartition(".")
        assert hasattr(import_module(module), name), target
