"""The tiny model in memory, and the same weights as a plain float64 model to check it against."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the contract's tests, below this directory, need no torch
    from sdft_engine.model import LanguageModel
    from tests.sdft_engine.plain import PlainModel


@pytest.fixture(autouse=True)
def products_of_the_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a run chooses is chosen for its process; the next test is another."""
    yield
    if products := sys.modules.get("sdft_engine.products"):
        products._chosen = None  # type: ignore[attr-defined]


@pytest.fixture
def model(tiny_model_dir: Path) -> "LanguageModel":
    """A fresh copy without adapters, in float32 on the CPU."""
    from sdft_engine.model import load_base_model

    return load_base_model(tiny_model_dir, device="cpu", dtype="float32")


@pytest.fixture
def bfloat16_model(tiny_model_dir: Path) -> "LanguageModel":
    from sdft_engine.model import load_base_model

    return load_base_model(tiny_model_dir, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="session")
def plain(tiny_model_dir: Path) -> "PlainModel":
    from tests.sdft_engine.plain import PlainModel

    return PlainModel(tiny_model_dir)
