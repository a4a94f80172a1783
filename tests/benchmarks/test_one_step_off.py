"""benchmarks.one_step_off: both ways take the same steps, and the second samples while it trains. Its figures are made by hand."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import one_step_off as program

SECONDS = 0.5


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sampling and training take SECONDS each. `trained`: which weights the rollouts of each step came from."""
    session = SimpleNamespace(state=SimpleNamespace(step=0), trained=[])

    def sample(session: Any, name: str, step: int) -> Any:
        time.sleep(SECONDS)
        return (name, step)

    def update(session: Any, rollouts: Any, step: int) -> None:
        time.sleep(SECONDS)
        session.trained.append((step, *rollouts))
        session.state.step = step

    monkeypatch.setattr(program, "load", lambda session, step: f"weights of step {session.state.step}")
    monkeypatch.setattr(program, "sample", sample)
    monkeypatch.setattr(program, "update", update)
    return session


def test_in_turn_every_step_has_its_own_weights_rollouts(session: Any) -> None:
    spent = program.in_turn(session, 3)
    assert session.trained == [(step, f"weights of step {step - 1}", step) for step in (1, 2, 3)]
    assert spent["step"] >= 2 * SECONDS
    assert spent["rollouts"] >= SECONDS


def test_one_step_off_samples_meanwhile_from_the_weights_before(session: Any) -> None:
    spent = program.one_step_off(session, 3)
    assert session.trained == [(1, "weights of step 0", 1), (2, "weights of step 0", 2), (3, "weights of step 1", 3)]
    assert spent["step"] < 1.7 * SECONDS


def test_the_report_compares_round_by_round(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = {"load": 0.1, "rollouts": 1.0, "gradient": 1.0, "step": 2.1}, {"load": 0.1, "rollouts": 0.0, "gradient": 1.3, "step": 1.4}
    program.report([(slow, fast)] * 3, 20)
    assert "1/1.50 of the time (median of 3 rounds)" in capsys.readouterr().out
