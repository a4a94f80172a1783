"""The demo's decisions, on a scripted client: which SFT checkpoint is compared, and with what status it exits."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.examples.scripted_client import Moment, ScriptedClient, silent_progress

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo
import demo_service
from demo_report import Results
from demo_scoring import Question, Score
from demo_service import DemoFailed
from openai import OpenAIError

TRAINED = [Question(f"q{number}", (f"a{number}",), number + 1, None) for number in range(10)]


@pytest.fixture(autouse=True)
def _no_pause_between_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_service, "POLL_SECONDS", 0)


def score(right: int, n: int) -> Score:
    return Score(tuple(index < right for index in range(n)), ("",) * n)


def client_of(moments: list[Moment], knows: dict[int, int], **options: bool) -> ScriptedClient:
    """A checkpoint answers the first `knows[step]` questions."""

    def answer(model: str, question: str) -> str:
        number = int(question.removeprefix("q"))
        return f"a{number}" if number < knows[int(model.removeprefix("step-"))] else "no idea"

    return ScriptedClient(moments, answer, **options)


def matched_sft(client: ScriptedClient, sdft_right: int) -> tuple[str, int, int]:
    model, step, found = demo.train_matched_sft(client, "file-1", 7, TRAINED, score(sdft_right, 10), silent_progress())
    return model, step, found.right


def test_sft_stops_at_the_first_checkpoint_that_knows_as_much() -> None:
    running = Moment("running", ((6, 0.95), (12, 0.97), (18, 0.99)))
    client = client_of([Moment("queued"), running, running], {6: 3, 12: 8, 18: 10})
    assert matched_sft(client, sdft_right=8) == ("step-12", 12, 8)
    assert client.scored_models == ["step-6", "step-12"]
    assert client.cancellations == 1
    assert client.created["method"]["type"] == "supervised"
    assert (client.created["training_file"], client.created["seed"]) == ("file-1", 7)


def test_no_checkpoint_is_scored_after_the_match() -> None:
    client = client_of([Moment("running", ((6, 0.95),)), Moment("running", ((6, 0.95), (12, 0.99)))], {6: 9, 12: 10})
    assert matched_sft(client, sdft_right=8) == ("step-6", 6, 9)
    assert client.scored_models == ["step-6"]


def test_a_checkpoint_is_scored_once() -> None:
    running = Moment("running", ((6, 0.95),))
    client = client_of([running, running, running, Moment("succeeded", ((6, 0.95),))], {6: 3})
    matched_sft(client, sdft_right=8)
    assert len(client.asked) == len(TRAINED)


def test_checkpoints_of_low_token_accuracy_are_skipped() -> None:
    running = Moment("running", ((6, 0.3), (12, 0.89), (18, 0.9)))
    client = client_of([running], {6: 10, 12: 10, 18: 10})
    assert matched_sft(client, sdft_right=8) == ("step-18", 18, 10)
    assert client.scored_models == ["step-18"]


def test_a_checkpoint_without_a_token_accuracy_is_scored() -> None:
    assert matched_sft(client_of([Moment("running", ((6, None),))], {6: 10}), sdft_right=8) == ("step-6", 6, 10)


def test_the_last_checkpoint_is_scored_whatever_its_token_accuracy() -> None:
    checkpoints = ((6, 0.5), (12, 0.6))
    client = client_of([Moment("running", checkpoints), Moment("succeeded", checkpoints)], {6: 2, 12: 5})
    assert matched_sft(client, sdft_right=8) == ("step-12", 12, 5)
    assert client.scored_models == ["step-12"]
    assert client.cancellations == 0


def test_where_none_matches_the_best_is_taken_and_the_earliest_of_equals() -> None:
    checkpoints = ((6, 0.95), (12, 0.96), (18, 0.97), (24, 0.98))
    client = client_of([Moment("running", checkpoints[:2]), Moment("succeeded", checkpoints)], {6: 3, 12: 6, 18: 6, 24: 5})
    assert matched_sft(client, sdft_right=8) == ("step-12", 12, 6)
    assert client.cancellations == 0


def test_a_job_that_ended_while_a_checkpoint_was_scored_is_no_failure() -> None:
    moments = [Moment("running", ((6, 0.95),)), Moment("succeeded", ((6, 0.95), (12, 0.99)))]
    client = client_of(moments, {6: 9, 12: 10}, ends_before_cancel=True)
    assert matched_sft(client, sdft_right=8) == ("step-6", 6, 9)
    assert client.scored_models == ["step-6"]


@pytest.mark.parametrize("moment", [Moment("failed", ((6, 0.95),)), Moment("cancelled")], ids=["failed", "without a checkpoint"])
def test_an_sft_job_that_leaves_nothing_to_compare_fails_the_demo(moment: Moment) -> None:
    with pytest.raises(DemoFailed, match=moment.status):
        matched_sft(client_of([moment], {6: 3}), sdft_right=8)


def test_sdft_has_to_succeed() -> None:
    client = ScriptedClient([Moment("running"), Moment("succeeded")], unverified_looks=2)
    model, seconds = demo.train_sdft(client, "file-1", 7, silent_progress())
    assert model == "tuned"
    assert 0 <= seconds < 5
    with pytest.raises(DemoFailed, match="cancelled"):
        demo.train_sdft(ScriptedClient([Moment("cancelled")]), "file-1", 7, silent_progress())


def results(sft_trained: int) -> Results:
    questions = {
        "trained": TRAINED,
        "paraphrases": [Question("p", ("x",), 1, None)] * 20,
        "retention": [Question("g", ("x",), None, "facts")] * 40,
    }
    base = {"trained": score(0, 10), "paraphrases": score(0, 20), "retention": score(30, 40)}
    sdft = {"trained": score(9, 10), "paraphrases": score(18, 20), "retention": score(29, 40)}
    sft = {"trained": score(sft_trained, 10), "paraphrases": score(12, 20), "retention": score(20, 40)}
    return Results(questions, base, {}, sdft, sft, 12, {"sdft_training": 90.0, "scoring": 5.0, "sft": 30.0})


def exit_status(monkeypatch: pytest.MonkeyPatch, data_dir: Path, outcome: Results | Exception) -> int:
    @contextmanager
    def service(data_dir: Path, console: object) -> Iterator[None]:
        data_dir.mkdir(exist_ok=True)
        yield None

    def run(client: object, console: object, seed: int, data_dir: Path) -> Results:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(demo, "running_service", service)
    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data-dir", str(data_dir), "--seed", "4"])
    return demo.main()


def test_the_demo_succeeds_where_every_check_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(monkeypatch, tmp_path / "data", results(sft_trained=9)) == 0
    printed = capsys.readouterr().out
    assert "SDFT training 1.5 min" in printed
    assert "NO" not in printed
    report = json.loads((tmp_path / "data" / "demo-report.json").read_text())
    assert report["seed"] == 4
    assert report["right"]["sft"] == {"trained": 9, "paraphrases": 12, "retention": 20}
    assert all(check["holds"] for check in report["checks"])
    assert list(report["seconds"]) == ["service_start", "sdft_training", "scoring", "sft", "whole_run"]


def test_an_unmatched_comparison_fails_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(monkeypatch, tmp_path / "data", results(sft_trained=8)) == 1
    printed = capsys.readouterr().out
    assert "SFT reached SDFT's accuracy on the trained questions (80% against 90%)" in printed
    report = json.loads((tmp_path / "data" / "demo-report.json").read_text())
    assert [check["holds"] for check in report["checks"]] == [True, True, True, False, True]


@pytest.mark.parametrize("error", [DemoFailed("the SDFT job ended as failed"), OpenAIError("connection lost")])
def test_a_demo_that_cannot_go_on_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    assert exit_status(monkeypatch, tmp_path / "data", error) == 2
    assert str(error) in capsys.readouterr().out
    assert not (tmp_path / "data" / "demo-report.json").exists()
