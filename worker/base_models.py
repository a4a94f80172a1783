"""Base models on this machine: prepared once by the engine in a subprocess (it needs torch), then read without torch."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from core.base_models import PREPARED_MARK, BaseModelEntry
from core.logging import get_logger
from core.settings import Settings
from sdft_engine.contract.errors import BaseModelError
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.run_directory import Attestation
from sdft_engine.contract.sealed_directory import ATTESTATION_NAME
from worker.engine_process import downloading_environment, run_to_end

PREPARE_COMMAND = (sys.executable, "-m", "sdft_engine.prepare_base_model")
KEPT_TOKENIZERS = 4

log = get_logger(__name__)


@dataclass(frozen=True)
class PreparedBaseModel:
    """What token counts and automatic hyperparameters need to know."""

    entry: BaseModelEntry
    directory: Path
    chat_format: ChatFormat
    hidden_size: int


def load_base_model(settings: Settings, base_model_id: str, check: Callable[[], None]) -> PreparedBaseModel:
    """The base model, prepared first where that is still to be done. `check` is called all the while and may raise.

    Raises BaseModelError where the catalogue doesn't hold it or it can't be prepared or read.
    """
    entry = settings.base_model(base_model_id)
    if entry is None:
        raise BaseModelError(f"the base model {base_model_id} is not in this server's catalogue any more", param="model")
    directory = entry.directory(settings.cache_dir)
    if not entry.is_prepared(settings.cache_dir):
        _prepare(entry, settings, check)
    return PreparedBaseModel(entry, directory, _chat_format(directory, (directory / PREPARED_MARK).stat().st_mtime_ns), _hidden_size(directory))


def require_base_of(adapter_dir: Path, base: BaseModelEntry, model_id: str) -> None:
    """Raise BaseModelError where an adapter says that it was trained from another source or revision than the catalogue's entry names: its
    factors fit those weights alone, and nothing but their shapes would say so."""
    attestation = adapter_dir / ATTESTATION_NAME
    made_from = Attestation.model_validate_json(attestation.read_bytes()).base if attestation.exists() else None
    if not base.is_base_of(made_from):
        message = f"{model_id} was trained from another {base.id}, made from {made_from}, than the catalogue has under that name now"
        raise BaseModelError(f"{message}; put it back, and give the other one an id of its own", param="model")


@lru_cache(maxsize=KEPT_TOKENIZERS)
def _chat_format(directory: Path, prepared_at: int) -> ChatFormat:
    """Kept, because reading a tokenizer takes most of a small file's validation, and the worker's threads would each leave behind tens of
    megabytes of it that the allocator does not give back. Safe for several threads: nothing of it changes. `prepared_at` tells a
    directory from an earlier one of the same name."""
    return ChatFormat.from_directory(directory)


def _prepare(entry: BaseModelEntry, settings: Settings, check: Callable[[], None]) -> None:
    command = [*PREPARE_COMMAND, *entry.preparation_arguments(settings.cache_dir)]
    log.info("preparing_base_model", base_model=entry.id, directory=str(entry.directory(settings.cache_dir)))
    ended = run_to_end(command, downloading_environment(settings), check)
    if ended.status != 0:
        log.error("base_model_unusable", base_model=entry.id, exit_status=ended.status, output=ended.output[-4000:])
        said = ended.output.splitlines()[-1] if ended.output else "no reason given"
        raise BaseModelError(f"the base model {entry.id} can't be prepared: {said}", param="model")


def _hidden_size(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text())
    size = config.get("hidden_size") or config.get("text_config", {}).get("hidden_size")
    if not isinstance(size, int):
        raise BaseModelError(f"{directory / 'config.json'} has no hidden_size", param="model")
    return size
