"""A base model's tokenizer is read once, and again where its directory was prepared anew."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from core.base_models import PREPARED_MARK
from core.settings import Settings
from worker.base_models import load_base_model


def test_a_tokenizer_is_read_once_for_each_preparation(make_settings: Callable[..., Settings], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(base_models=[{"id": "tiny", "source": str(tiny_model_dir)}])
    prepared = settings.base_models[0].directory(settings.cache_dir)
    prepared.mkdir(parents=True)
    for path in tiny_model_dir.iterdir():
        (prepared / path.name).write_bytes(path.read_bytes())

    def load() -> object:
        return load_base_model(settings, "tiny", lambda: None).chat_format

    first = load()
    assert load() is first
    os.utime(prepared / PREPARED_MARK, (0, 0))
    assert load() is not first
