"""A tuned model in one of its other formats, for the worker or by hand:

    python -m sdft_engine.weights_export --format merged|gguf --base DIR --adapter DIR --out DIR --name NAME [--parent PID]

Writes into OUT, which must not exist: the merged model's files, or one .gguf file. Exit status 0; 1 with one JSON line
{"code", "message"} on standard error where it can't be made.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from sdft_engine.contract.death_with_parent import die_with_parent
from sdft_engine.contract.errors import DiskFull, EngineError
from sdft_engine.contract.sealed_directory import is_disk_full
from sdft_engine.gguf_export import write_gguf
from sdft_engine.merging import merge_adapter


def export(format: str, base_dir: Path, adapter_dir: Path, out_dir: Path, name: str) -> None:
    """Raises ConfigurationError where the model can't have this format, DiskFull; nothing is left then."""
    if format == "merged":
        merge_adapter(base_dir, adapter_dir, out_dir)
        return
    merged_dir = out_dir.with_name(f".{out_dir.name}.merged")
    shutil.rmtree(merged_dir, ignore_errors=True)
    try:
        merge_adapter(base_dir, adapter_dir, merged_dir)
        out_dir.mkdir(parents=True)
        write_gguf(merged_dir, out_dir / f"{name}.gguf", name)
    except BaseException as error:
        shutil.rmtree(out_dir, ignore_errors=True)
        if isinstance(error, Exception) and is_disk_full(error):
            raise DiskFull(f"the disk is full: {name}.gguf could not be written") from error
        raise
    finally:
        shutil.rmtree(merged_dir, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sdft_engine.weights_export", description="Write a tuned model's weights merged, or as GGUF.")
    parser.add_argument("--format", required=True, choices=("merged", "gguf"))
    parser.add_argument("--base", required=True, type=Path, metavar="DIR", help="the prepared base model")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="the adapter, in PEFT's format")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="is made; must not exist")
    parser.add_argument("--name", required=True, help="the model's, as a file name")
    parser.add_argument("--parent", type=int, metavar="PID", help="end with this process, which started it")
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with_parent()
        if os.getppid() != arguments.parent:  # it died before
            return 1
    try:
        export(arguments.format, arguments.base, arguments.adapter, arguments.out, arguments.name)
    except EngineError as error:
        sys.stderr.write(f"{json.dumps(error.as_dict())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
