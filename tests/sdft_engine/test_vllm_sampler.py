"""Rollouts by another server: from this step's weights, proved before anything is sampled. The server is scripted here, and real in
tests/vllm."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdft_engine import vllm_sampler
from sdft_engine.contract.errors import SamplerUnavailable, StaleSampler
from sdft_engine.contract.run_directory import RunDirectory, StopReason
from sdft_engine.lora import read_adapter
from sdft_engine.trainer import train
from tests.fixtures.scripted_vllm import ScriptedVllm
from tests.sdft_engine.runs import make_run, messages_of, records


@pytest.fixture
def server(tiny_model_dir: Path) -> Iterator[ScriptedVllm]:
    server = ScriptedVllm(tiny_model_dir)
    yield server
    server.stop()


def sampled_run(path: Path, model_dir: Path, server: ScriptedVllm, **options: Any) -> RunDirectory:
    sampler = {"url": server.url, "adapters_dir": str(path.parent / "served"), "name_prefix": "rollout-job-1"} | options.pop("sampler", {})
    return make_run(path, model_dir, config={"sampler": sampler} | options.pop("config", {}), **options)


def test_a_run_learns_what_one_with_its_own_rollouts_learns(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm) -> None:
    """The scripted server samples as the trainer does where the seeds are the same; here they differ, so only the course is compared."""
    run = sampled_run(tmp_path / "run", tiny_model_dir, server)
    own = make_run(tmp_path / "own", tiny_model_dir)
    assert (train(run).outcome, train(own).outcome) == ("succeeded", "succeeded")
    theirs, ours = records(run.metrics_path), records(own.metrics_path)
    assert [row["step"] for row in theirs] == list(range(1, 9))
    assert all(row["importance_ratio"] == pytest.approx(1, abs=1e-3) for row in theirs)
    assert all(row["importance_ratio"] is None for row in ours)
    assert theirs[-1]["adapter_norm"] == pytest.approx(ours[-1]["adapter_norm"], rel=0.2)


def test_every_step_has_a_name_of_its_own_and_leaves_nothing(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm) -> None:
    run = sampled_run(tmp_path / "run", tiny_model_dir, server)
    train(run)
    assert server.ever_loaded == [f"rollout-job-1-{step}" for step in range(1, 9)]
    assert server.loaded == {}
    assert list((tmp_path / "served").iterdir()) == []


def test_a_server_that_sees_no_disk_of_the_trainer_s_is_sent_every_step_s_adapter(
    tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sent.taken = True
    loaded_from: list[Path] = []
    load = server._load
    monkeypatch.setattr(server, "_load", lambda name, directory: (loaded_from.append(directory), load(name, directory))[1])
    run = sampled_run(tmp_path / "run", tiny_model_dir, server, sampler={"upload": True})
    assert train(run).outcome == "succeeded"
    assert loaded_from == [server.sent.directory / f"rollout-job-1-{step}" for step in range(1, 9)]
    assert (server.loaded, server.sent.names()) == ({}, [])
    assert list((tmp_path / "served").iterdir()) == []
    shared = sampled_run(tmp_path / "shared", tiny_model_dir, server)
    train(shared)
    (_, expected), (_, actual) = read_adapter(shared.final_dir), read_adapter(run.final_dir)
    assert all(bool((actual[name] == value).all()) for name, value in expected.items())


def test_a_server_that_takes_no_adapters_ends_the_run(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm) -> None:
    """It would say the same in five minutes."""
    with pytest.raises(SamplerUnavailable, match=r"refused /adapter_files/rollout-job-1-1/adapter_config.json with 404"):
        train(sampled_run(tmp_path / "run", tiny_model_dir, server, sampler={"upload": True}))
    assert loads_asked_for(server) == 0


def test_prompts_are_token_ids_and_the_sampling_is_the_run_s(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm) -> None:
    run = sampled_run(tmp_path / "run", tiny_model_dir, server, temperature=0.7, n_epochs=1)
    train(run)
    sampled = [body for path, body, _ in server.requests if path == "/v1/completions" and "stop_token_ids" in body]
    assert len(sampled) == 6
    assert all(isinstance(token, int) for body in sampled for token in body["prompt"])
    assert {(body["temperature"], body["max_tokens"], tuple(body["stop_token_ids"])) for body in sampled} == {(0.7, 8, (0, 2))}
    assert len({body["seed"] for body in sampled}) == 6
    plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert all(body.items() >= plain.items() for body in sampled), "the model's generation_config.json says nothing here"


def test_a_server_that_goes_on_with_old_weights_ends_the_run(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm) -> None:
    server.stale = True
    run = sampled_run(tmp_path / "run", tiny_model_dir, server, sampler={"tolerance": 0.001})
    with pytest.raises(StaleSampler, match=r"at step 2 the inference server's log-probabilities differ from the trainer's by up to 0\.\d+ nats"):
        train(run)
    assert [row["step"] for row in records(run.metrics_path)] == [1]
    assert list((tmp_path / "served").iterdir()) == []


def test_old_weights_are_found_at_the_usual_tolerance_too(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm) -> None:
    """A little later: as soon as training has moved the student by more than two precisions differ."""
    server.stale = True
    run = sampled_run(tmp_path / "run", tiny_model_dir, server, n_epochs=20)
    with pytest.raises(StaleSampler):
        train(run)
    assert 1 <= len(records(run.metrics_path)) <= 5


def test_another_precision_is_told_apart_from_none(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm) -> None:
    server.drift = 0.04
    run = sampled_run(tmp_path / "within", tiny_model_dir, server, n_epochs=1)
    assert train(run).outcome == "succeeded"
    assert records(run.metrics_path)[0]["importance_ratio"] == pytest.approx(0.961, abs=2e-3)  # exp(-0.04)
    server.drift = 0.06
    with pytest.raises(StaleSampler, match="SDFT_DTYPE"):
        train(sampled_run(tmp_path / "beyond", tiny_model_dir, server, n_epochs=1))


def test_a_server_that_was_restarted_gets_the_adapter_again(
    tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_sampler, "RETRY_SECONDS", 0.05)
    undisturbed = sampled_run(tmp_path / "undisturbed", tiny_model_dir, server)
    train(undisturbed)
    before = len(server.ever_loaded)
    server.forgets_after = len(server.requests) + 17  # between two rollouts of the third step
    run = sampled_run(tmp_path / "run", tiny_model_dir, server)
    assert train(run).outcome == "succeeded"
    assert len(server.ever_loaded) == before + 9
    (_, expected), (_, actual) = read_adapter(undisturbed.final_dir), read_adapter(run.final_dir)
    assert all(bool((actual[name] == value).all()) for name, value in expected.items())


def test_a_server_that_is_away_or_refuses_is_named(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_sampler, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(vllm_sampler, "PATIENCE_SECONDS", 0.3)
    server.refuses = (400, "LoRA rank 4 is greater than max_lora_rank 1")
    with pytest.raises(SamplerUnavailable, match="greater than max_lora_rank"):
        train(sampled_run(tmp_path / "refused", tiny_model_dir, server))
    assert [path for path, _, _ in server.requests].count("/v1/load_lora_adapter") == 1, "what is refused for good is not asked for again"
    with pytest.raises(SamplerUnavailable, match="can't be reached"):
        train(sampled_run(tmp_path / "away", tiny_model_dir, server, sampler={"url": "http://127.0.0.1:9"}))


RANK_REFUSED = (500, "Call to add_lora method failed: LoRA rank 4 is greater than max_lora_rank 1.")


def loads_asked_for(server: ScriptedVllm) -> int:
    return [path for path, _, _ in server.requests].count("/v1/load_lora_adapter")


def test_a_load_that_a_healthy_server_fails_three_times_is_refused_for_good(
    tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_sampler, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(vllm_sampler, "PATIENCE_SECONDS", 5)
    server.refuses = RANK_REFUSED
    run = sampled_run(tmp_path / "run", tiny_model_dir, server)
    with pytest.raises(SamplerUnavailable, match="greater than max_lora_rank 1"):
        train(run)
    assert loads_asked_for(server) == 3
    waiting = [message for message in messages_of(run, "warn") if message.startswith("Waiting for the inference server that samples the rollouts: ")]
    assert len(waiting) == 1, "not one for every try"
    assert "max_lora_rank 1" in waiting[0]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_s_errors_and_those_of_a_server_that_is_not_well_pass(
    tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(vllm_sampler, "RETRY_SECONDS", 0.01)
    server.refuses, server.refusals_left = (status, "restarting"), 5
    assert train(sampled_run(tmp_path / "proxy", tiny_model_dir, server, n_epochs=1)).outcome == "succeeded"
    server.refuses, server.refusals_left, server.healthy = RANK_REFUSED, 5, False
    assert train(sampled_run(tmp_path / "ill", tiny_model_dir, server, n_epochs=1)).outcome == "succeeded"


def test_waiting_and_its_end_are_told_once_each(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_sampler, "RETRY_SECONDS", 0.01)
    server.refuses, server.refusals_left = (503, "restarting"), 4
    run = sampled_run(tmp_path / "run", tiny_model_dir, server, n_epochs=1)
    train(run)
    told = [(event["level"], event["message"]) for event in records(run.events_path) if "the rollouts" in event["message"]]
    assert [level for level, _ in told] == ["warn", "info"]
    assert "503" in told[0][1]
    assert told[1][1].startswith("The inference server that samples the rollouts answers again after ")


def test_the_key_is_the_environment_s(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLER_API_KEY", "secret")
    train(sampled_run(tmp_path / "run", tiny_model_dir, server, n_epochs=1, sampler={"api_key_env": "SAMPLER_API_KEY"}))
    assert {key for _, _, key in server.requests} == {"Bearer secret"}
    assert "secret" not in (tmp_path / "run" / "config.json").read_text()


def test_a_stop_is_heard_while_a_server_is_waited_for(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained before is kept in a checkpoint."""
    monkeypatch.setattr(vllm_sampler, "RETRY_SECONDS", 0.05)
    run = sampled_run(tmp_path / "run", tiny_model_dir, server)

    def stop_requested() -> StopReason | None:
        if len(server.ever_loaded) == 3:
            server.refuses = (503, "restarting")
            server.loaded.clear()
        return "requeue" if server.refuses else None

    asked_at_step: list[int] = []

    def late() -> StopReason | None:
        """At the steps' beginnings nothing is wanted, in the middle of the third it is."""
        wanted = stop_requested()
        asked_at_step.append(len(server.ever_loaded))
        return wanted if len(asked_at_step) > 4 else None

    result = train(run, late)
    assert (result.outcome, result.stop) == ("stopped", "requeue")
    assert [step for step, _ in run.complete_checkpoints()] == [result.final_step]
    assert result.final_step >= 2


def test_an_answer_that_is_no_number_proves_nothing(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm) -> None:
    server.drift = float("nan")
    with pytest.raises(StaleSampler, match="nan nats"):
        train(sampled_run(tmp_path / "run", tiny_model_dir, server, n_epochs=1))


def test_a_stop_is_heard_while_the_first_measurements_wait_for_a_server(
    tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vLLM that is still loading when the worker is to end, say."""
    monkeypatch.setattr(vllm_sampler, "RETRY_SECONDS", 0.05)
    server.refuses = (503, "loading")
    run = sampled_run(tmp_path / "run", tiny_model_dir, server, mask_clipped_completions="auto")

    def stop_requested() -> StopReason | None:
        return "requeue" if any(path == "/v1/load_lora_adapter" for path, _, _ in server.requests) else None

    result = train(run, stop_requested)
    assert (result.outcome, result.stop, result.final_step) == ("stopped", "requeue", 0)


@pytest.mark.parametrize(
    "choice",
    [{}, {"logprobs": None, "token_ids": [1]}, {"logprobs": {"token_logprobs": [None]}, "token_ids": [1]}, {"logprobs": {"token_logprobs": [-1.0]}}],
)
def test_an_answer_in_another_form_is_named(
    tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any]
) -> None:
    monkeypatch.setattr(server, "_sampled", lambda body: choice)
    with pytest.raises(SamplerUnavailable, match="the inference server"):
        train(sampled_run(tmp_path / "run", tiny_model_dir, server, n_epochs=1))


def test_an_answer_without_choices_is_named(tmp_path: Path, tiny_model_dir: Path, server: ScriptedVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = server.answer
    monkeypatch.setattr(server, "answer", lambda path, body, key: (200, "hello") if path == "/v1/completions" else answer(path, body, key))
    with pytest.raises(SamplerUnavailable, match="answered a completion with None"):
        train(sampled_run(tmp_path / "run", tiny_model_dir, server, n_epochs=1))
