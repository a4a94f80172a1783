"""sdft_engine.checkpoint: complete or absent, restored bit for bit, and never used when it is damaged."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdft_engine import checkpoint as checkpoint_module
from sdft_engine.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from sdft_engine.contract import sealed_directory
from sdft_engine.contract.errors import CheckpointDamaged, DiskFull
from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.run_directory import Attestation, AttestationProbe, RunDirectory
from sdft_engine.contract.sealed_directory import MANIFEST_NAME, verify
from sdft_engine.lora import STUDENT
from sdft_engine.model import LanguageModel, load_base_model
from sdft_engine.teacher import TEACHER, Teacher
from tests.sdft_engine.plain import add_adapter, randomise
from tests.sdft_engine.recording import watched

METRICS = StepMetrics(
    step=3,
    total_steps=9,
    epoch=1.5,
    train_loss=0.25,
    gradient_norm=1.0,
    adapter_norm=2.0,
    learning_rate=1e-3,
    loss_tokens=7,
    trained_tokens=40,
    step_seconds=1.0,
    student_seconds=0.5,
    tokens_per_second=40.0,
    peak_memory_bytes=1 << 20,
)
ATTESTATION = Attestation(dtype="float32", probes=[AttestationProbe(token_ids=[1, 2], adapter_logps=[-1.5], base_logps=[-2.5])])
STATE = TrainingState(step=3, trained_tokens=120, temperature=0.65, mask_clipped_completions=True)
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "attestation.json",
    MANIFEST_NAME,
    "metrics.json",
    "optimizer.safetensors",
    "teacher.safetensors",
    "training_state.json",
}


@dataclass
class Run:
    model: LanguageModel
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer

    def step(self, seed: int) -> None:
        """An optimizer step on made-up gradients."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.adapters.parameters(STUDENT).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        if self.teacher:
            self.teacher.follow()

    def save(self, directory: Path, state: TrainingState = STATE) -> None:
        save_checkpoint(directory, self.model, "tiny-llama", self.teacher, self.optimizer, state, METRICS, ATTESTATION)

    def load(self, directory: Path) -> TrainingState:
        return load_checkpoint(directory, self.model, self.teacher, self.optimizer)

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for adapter in self.model.adapters.shapes:
            found |= {f"{adapter}/{name}": value.detach().clone() for name, value in self.model.adapters.parameters(adapter).items()}
        for name, parameter in self.model.adapters.parameters(STUDENT).items():
            found |= {f"optimizer/{name}/{key}": value.clone() for key, value in self.optimizer.state[parameter].items()}
        return found


@pytest.fixture
def make(tiny_model_dir: Path) -> Callable[..., Run]:
    def make(seed: int, kind: Any = "ema") -> Run:
        model = load_base_model(tiny_model_dir, device="cpu", dtype="float32")
        add_adapter(model, STUDENT, seed=seed, trainable=True)
        teacher = Teacher(model, kind, 0.05, "parent") if kind else None
        return Run(model, teacher, torch.optim.AdamW(model.adapters.parameters(STUDENT).values(), lr=1e-2))

    return make


@pytest.fixture
def trained(make: Callable[..., Run]) -> Run:
    run = make(seed=1)
    for seed in range(3):
        run.step(seed)
    return run


@pytest.fixture
def saved(trained: Run, tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoints" / "step_000003"
    trained.save(directory)
    return directory


@pytest.mark.parametrize("kind", ["ema", "frozen", "live", None])
def test_a_round_trip_restores_everything_bit_for_bit(make: Callable[..., Run], kind: Any, tmp_path: Path) -> None:
    run = make(seed=1, kind=kind)
    for seed in range(3):
        run.step(seed)
    run.save(tmp_path / "step_000003")
    other = make(seed=2, kind=kind)
    assert other.load(tmp_path / "step_000003") == STATE
    before, after = run.tensors(), other.tensors()
    assert before.keys() == after.keys()
    assert len(before) == 28 * (5 if kind in ("ema", "frozen") else 4)  # student, teacher, two moments and a count of steps
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for continued in (run, other):
        continued.step(99)
    assert all(torch.equal(value, other.tensors()[name]) for name, value in run.tensors().items())


def test_a_checkpoint_before_the_first_update(make: Callable[..., Run], tmp_path: Path) -> None:
    """Steps that taught nothing leave the optimizer without a state."""
    run, other = make(seed=1), make(seed=2)
    run.save(tmp_path / "step_000001", TrainingState(step=1))
    assert other.load(tmp_path / "step_000001") == TrainingState(step=1)
    for continued in (run, other):
        continued.step(5)
    assert all(torch.equal(value, other.tensors()[name]) for name, value in run.tensors().items())


def test_what_a_checkpoint_holds(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    assert StepMetrics.model_validate_json((saved / "metrics.json").read_bytes()) == METRICS
    assert Attestation.model_validate_json((saved / "attestation.json").read_bytes()) == ATTESTATION
    assert json.loads((saved / MANIFEST_NAME).read_text()).keys() == FILES - {MANIFEST_NAME}
    assert [path.name for path in saved.parent.iterdir()] == ["step_000003"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "bit_flipped": flip_a_bit,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", sorted(FILES - {MANIFEST_NAME}))
def test_damage_is_found_and_named_and_nothing_is_loaded(trained: Run, saved: Path, name: str, damage: str) -> None:
    DAMAGE[damage](saved / name)
    randomise(trained.model.adapters, STUDENT, seed=8)
    before = trained.tensors()
    with pytest.raises(CheckpointDamaged, match=name):
        trained.load(saved)
    assert all(torch.equal(value, trained.tensors()[key]) for key, value in before.items())


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"training_state.json": 1}'])
def test_a_damaged_manifest_is_damage(saved: Path, content: bytes) -> None:
    (saved / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(CheckpointDamaged, match="step_000003"):
        verify(saved)


@pytest.mark.parametrize("name", sorted(FILES - {MANIFEST_NAME, "attestation.json", "metrics.json"}))
def test_a_checkpoint_that_never_had_a_file_is_damaged(trained: Run, saved: Path, name: str) -> None:
    """Even where the manifest doesn't list it."""
    manifest = json.loads((saved / MANIFEST_NAME).read_text())
    (saved / MANIFEST_NAME).write_text(json.dumps({key: value for key, value in manifest.items() if key != name}))
    (saved / name).unlink()
    with pytest.raises(CheckpointDamaged, match="step_000003"):
        trained.load(saved)


def test_a_directory_that_is_no_checkpoint_is_damaged(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match="nowhere"):
        trained.load(tmp_path / "nowhere")


def test_a_checkpoint_of_the_same_step_is_replaced(trained: Run, saved: Path, make: Callable[..., Run]) -> None:
    trained.step(7)
    trained.save(saved)
    other = make(seed=2)
    other.load(saved)
    assert all(torch.equal(value, other.tensors()[name]) for name, value in trained.tensors().items())


def no_space(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_safetensors(*args: Any, **options: Any) -> None:
    raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28) "')


WHERE: dict[str, tuple[object, str, Callable[..., None]]] = {
    "tensors": (checkpoint_module, "save_file", no_space_in_safetensors),
    "json": (Path, "write_text", no_space),
    "directory": (Path, "mkdir", no_space),
    "fsync": (os, "fsync", no_space),
    "rename": (Path, "rename", no_space),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(
    trained: Run, saved: Path, make: Callable[..., Run], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.step(7)
    target, name, failing = WHERE[where]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failing)
        with pytest.raises(DiskFull, match="step_000004"):
            trained.save(saved.with_name("step_000004"))
    assert [path.name for path in saved.parent.iterdir()] == ["step_000003"]
    assert make(seed=2).load(saved) == STATE


def test_a_write_that_the_system_refuses_leaves_nothing(trained: Run, tmp_path: Path) -> None:
    """For real: a limit on the size of any file that this process writes."""
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises((OSError, SafetensorError)):
            trained.save(tmp_path / "step_000004")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_rise_as_they_are(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(sealed_directory, "seal", refused)
    with pytest.raises(PermissionError):
        trained.save(tmp_path / "step_000004")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_checkpoint_never_bears_the_name_of_one(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file is being written: a reader sees no checkpoint. A process killed there leaves none either."""
    run = RunDirectory(tmp_path)
    seen: list[tuple[int, list[Any]]] = []
    rename, sealed = Path.rename, sealed_directory.seal

    def look(directory: Path) -> None:
        seen.append((len(list(directory.iterdir())), run.complete_checkpoints()))
        sealed(directory)
        seen.append((len(list(directory.iterdir())), run.complete_checkpoints()))

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(sealed_directory, "seal", look)
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        trained.save(run.checkpoint_dir(3))
    assert seen == [(7, []), (8, [])]
    assert run.complete_checkpoints() == []
    monkeypatch.setattr(Path, "rename", rename)
    left = run.checkpoints_dir / ".step_000003.tmp"  # as a kill would leave it
    left.mkdir()
    (left / "half").write_text("x")
    assert run.complete_checkpoints() == []
    trained.save(run.checkpoint_dir(3))
    assert run.complete_checkpoints() == [(3, run.checkpoint_dir(3))]
    assert not left.exists()


def test_every_file_is_flushed_before_the_rename(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[str] = set()
    order: list[str] = []
    rename = watched(Path.rename, lambda *paths: order.extend(sorted(flushed)))
    monkeypatch.setattr(os, "fsync", watched(os.fsync, lambda descriptor: flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))))
    monkeypatch.setattr(Path, "rename", rename)
    directory = tmp_path / "step_000003"
    trained.save(directory)
    temporary = tmp_path / ".step_000003.tmp"
    assert order == sorted([str(temporary), *(str(temporary / name) for name in FILES)])
    assert str(tmp_path) in flushed


def test_the_teacher_is_saved_beside_the_student(saved: Path, make: Callable[..., Run]) -> None:
    other = make(seed=2)
    other.load(saved)
    student, teacher = (other.model.adapters.parameters(name) for name in (STUDENT, TEACHER))
    assert all(not torch.equal(value, student[name]) for name, value in teacher.items())


def reseal(directory: Path) -> None:
    """As if it had been written like this."""
    (directory / MANIFEST_NAME).unlink()
    sealed_directory.seal(directory)


@pytest.mark.parametrize(
    "content",
    [
        b'{"last_answers": null}',
        b'{"step": -3}',
        b'{"step": "3"}',
        b'{"step": 4}',
        b'{"step": 3, "from_the_future": 1}',
        b"[" * 100_000,
        b"[]",
    ],
    ids=lambda content: content[:30].decode(),
)
def test_a_state_that_no_trainer_writes_is_damage(trained: Run, saved: Path, content: bytes) -> None:
    (saved / "training_state.json").write_bytes(content)
    reseal(saved)
    with pytest.raises(CheckpointDamaged, match="step_000003"):
        trained.load(saved)


def test_a_file_that_the_manifest_does_not_list_is_damage(saved: Path) -> None:
    (saved / "stray").write_text("x")
    with pytest.raises(CheckpointDamaged, match="does not list stray"):
        verify(saved)


@pytest.mark.parametrize("content", [b"{}", b"[" * 100_000], ids=["empty", "deep"])
def test_a_manifest_that_says_nothing_is_damage(saved: Path, content: bytes) -> None:
    (saved / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(CheckpointDamaged):
        verify(saved)


@pytest.mark.parametrize("damage", ["half", "no_steps", "shape"])
def test_an_optimizer_that_does_not_fit_is_damage(trained: Run, saved: Path, damage: str) -> None:
    tensors = load_file(saved / "optimizer.safetensors")
    names = sorted(tensors)
    kept = {
        "half": {name: tensors[name] for name in names[: len(names) // 2]},
        "no_steps": {name: value for name, value in tensors.items() if not name.endswith("/step")},
        "shape": tensors | {names[0]: tensors[names[0]].flatten()[:-1].clone()},
    }[damage]
    (saved / "optimizer.safetensors").unlink()
    save_file(kept, saved / "optimizer.safetensors")
    reseal(saved)
    with pytest.raises(CheckpointDamaged, match=r"optimizer\.safetensors does not fit"):
        trained.load(saved)
