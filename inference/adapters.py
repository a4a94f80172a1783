"""The adapters that this server answers with: by name, from one directory, safetensors only.

Names are the client's; the engine knows each loaded version by a name of its own, so that a name which is unloaded and
loaded again never meets the answers still given by the earlier version.
"""

import asyncio
import itertools
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

from inference.engine import Engine
from inference.errors import AdapterInvalid, AdapterUnknown, ModelUnknown
from sdft_engine.contract.errors import EngineError
from sdft_engine.contract.sealed_directory import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME

logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,255}")


MAX_ADAPTERS = 64


@dataclass
class LoadedAdapter:
    name: str
    directory: Path
    engine_name: str
    loaded_at: int
    used: int = 0
    """Number of its last use, among those of all adapters."""


class AdapterRegistry:
    """Read and changed on the event loop only; the weights move on the engine's thread."""

    def __init__(self, engine: Engine, base_model_id: str, adapters_dir: Path, max_adapters: int = MAX_ADAPTERS) -> None:
        self._engine = engine
        self._base_model_id = base_model_id
        self._adapters_dir = adapters_dir.resolve()
        self._max_adapters = max_adapters
        self._numbers = itertools.count(1)
        self._uses = itertools.count(1)
        self._leaving: set[asyncio.Task[None]] = set()
        self._loading: dict[str, asyncio.Future[None]] = {}
        self.loaded: dict[str, LoadedAdapter] = {}

    def resolve(self, model: str) -> str | None:
        """The engine's name of the adapter that answers as `model`; None for the base. Raises ModelUnknown."""
        if model == self._base_model_id:
            return None
        if model not in self.loaded:
            raise ModelUnknown(f"The model `{model}` does not exist.", param="model")
        self.loaded[model].used = next(self._uses)
        return self.loaded[model].engine_name

    async def load(self, name: str, path: str) -> LoadedAdapter:
        """Raises AdapterInvalid with the reason; then nothing is left half-loaded."""
        if not NAME.fullmatch(name) or name == self._base_model_id:
            raise AdapterInvalid("lora_name must be 1 to 256 letters, digits, dots, dashes, colons and underscores, and not the base's", param="lora_name")
        while name in self._loading:  # "already loaded" must mean that it answers
            await asyncio.wait({self._loading[name]})
        if name in self.loaded:
            raise AdapterInvalid(f"The lora adapter '{name}' has already been loaded.", param="lora_name")
        directory = self._adapter_directory(path)
        self._make_room()
        adapter = LoadedAdapter(name, directory, f"served_{next(self._numbers)}", int(time.time()), next(self._uses))
        loading = asyncio.wrap_future(self._engine.call(lambda: self._engine.model.adapters.load(adapter.engine_name, directory)))
        self._loading[name] = loading
        loading.add_done_callback(lambda done: self._settle(adapter, done))
        try:
            await asyncio.shield(loading)  # to its end even where the client leaves: weights must not stay in memory unnamed
        except EngineError as error:
            raise AdapterInvalid(f"the adapter '{name}' can't be loaded: {error.message}", param="lora_path") from error
        return adapter

    def _settle(self, adapter: LoadedAdapter, loading: "asyncio.Future[None]") -> None:
        del self._loading[adapter.name]
        if not loading.cancelled() and loading.exception() is None:
            self.loaded[adapter.name] = adapter

    async def unload(self, name: str) -> None:
        """New requests for it fail at once; answers being given are awaited. Raises AdapterUnknown."""
        adapter = self.loaded.pop(name, None)
        if adapter is None:
            raise AdapterUnknown(f"The lora adapter '{name}' cannot be found.", param="lora_name")
        await self._remove(adapter)

    async def _remove(self, adapter: LoadedAdapter) -> None:
        await asyncio.wrap_future(self._engine.remove_adapter(adapter.engine_name, lambda: self._engine.model.adapters.remove(adapter.engine_name)))

    def _make_room(self) -> None:
        """Let those go that were used longest ago, as soon as nobody is being answered by them: whoever wants one loads it again."""
        while self.loaded and len(self.loaded) + len(self._loading) >= self._max_adapters:
            oldest = min(self.loaded.values(), key=lambda adapter: adapter.used)
            logger.info("%s makes room for another adapter", oldest.name)
            task = asyncio.ensure_future(self._remove(self.loaded.pop(oldest.name)))
            self._leaving.add(task)  # asyncio itself keeps no hold of it
            task.add_done_callback(self._left)

    def _left(self, task: "asyncio.Task[None]") -> None:
        self._leaving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("an adapter that made room could not be removed: %s", error)

    def _adapter_directory(self, path: str) -> Path:
        """The directory, proven to lie inside the adapters' directory, links followed."""
        try:
            directory = (self._adapters_dir / path).resolve()
            if not directory.is_relative_to(self._adapters_dir) or directory == self._adapters_dir:
                raise AdapterInvalid("lora_path must lie inside the server's adapters directory", param="lora_path")
            if not directory.is_dir():
                raise AdapterInvalid(f"lora_path has no adapter: there is no directory {directory.name}", param="lora_path")
            for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
                file = (directory / name).resolve()
                if not file.is_relative_to(self._adapters_dir) or not file.is_file():
                    raise AdapterInvalid(f"{directory.name} has no {name}; adapters are loaded from safetensors only", param="lora_path")
        except (OSError, ValueError) as error:  # a name too long, a NUL byte, a loop of links
            raise AdapterInvalid(f"lora_path is not usable: {error}", param="lora_path") from error
        return directory
