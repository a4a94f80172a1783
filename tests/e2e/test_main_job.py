"""The main job through the stock client: upload, train, follow, chat, download, continue, delete."""

import re
import tarfile
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import NotFoundError
from openai._legacy_response import HttpxBinaryResponseContent

from tests.e2e.conftest import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BASE = "smollm2-135m-instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def sdft(**hyperparameters: Any) -> Any:
    defaults = {"n_epochs": 1, "batch_size": 10, "max_completion_tokens": 16, "mask_clipped_completions": False, "checkpoint_every_steps": 2}
    return {"type": "sdft", "sdft": {"teacher_template": "history", "hyperparameters": defaults | hyperparameters}}


@pytest.fixture(scope="module")
def trained(service: Service, training_file: str) -> Any:
    job = service.client.fine_tuning.jobs.create(model=BASE, training_file=training_file, method=sdft(), seed=7, suffix="e2e")
    assert job.status == "validating_files"
    finished = service.wait(job.id)
    assert finished.status == "succeeded", finished.error
    return finished


def test_the_job_says_what_it_did(service: Service, trained: Any) -> None:
    assert trained.fine_tuned_model.startswith(f"ft:{BASE}:default:e2e:")
    assert trained.trained_tokens > 0
    assert trained.method.sdft["hyperparameters"]["learning_rate"] == pytest.approx(9.4e-4)
    assert trained.method.sdft["hyperparameters"]["temperature"] in (1.0, 0.8, 0.65, 0.5)
    events = service.events(trained.id)
    metrics = [event.data for event in events if event.type == "metrics"]
    assert [data["step"] for data in metrics] == [1, 2, 3]
    assert all(data["step_seconds"] > 0 and data["train_loss"] > 0 for data in metrics)
    assert events[-1].message == "The job has successfully completed"
    result = service.client.files.content(trained.result_files[0]).text
    assert result.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
    assert len(result.strip().splitlines()) == 4


def test_the_tuned_model_answers_plain_and_streamed(service: Service, trained: Any) -> None:
    client = service.client
    assert client.models.retrieve(trained.fine_tuned_model).model_extra["status"] == "servable"
    plain = client.chat.completions.create(model=trained.fine_tuned_model, messages=QUESTION, temperature=0, max_tokens=12)
    stream = client.chat.completions.create(model=trained.fine_tuned_model, messages=QUESTION, temperature=0, max_tokens=12, stream=True)
    chunks = list(stream)
    assert plain.model == trained.fine_tuned_model
    assert all(chunk.model == trained.fine_tuned_model for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == plain.choices[0].message.content
    base = client.chat.completions.create(model=BASE, messages=QUESTION, temperature=0, max_tokens=12)
    assert "Paris" in (base.choices[0].message.content or "")


def test_a_checkpoint_is_a_model(service: Service, trained: Any) -> None:
    checkpoints = service.client.fine_tuning.jobs.checkpoints.list(trained.id).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == [2]
    name = checkpoints[0].fine_tuned_model_checkpoint
    assert name == f"{trained.fine_tuned_model}:ckpt-step-2"
    assert service.client.chat.completions.create(model=name, messages=QUESTION, max_tokens=3).choices[0].message.content


def test_the_downloaded_adapter_is_the_served_model(service: Service, trained: Any, real_model_dir: Path, tmp_path: Path) -> None:
    """Stock PEFT on the download gives the log-probabilities that the service answers with, and not the base's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    archive = tmp_path / "adapter.tar.gz"
    content = service.client.get(f"/models/{trained.fine_tuned_model}/adapter?format=peft", cast_to=HttpxBinaryResponseContent)
    content.write_to_file(archive)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "adapter", filter="data")
    answer = service.client.chat.completions.create(model=trained.fine_tuned_model, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True)
    served = [token.logprob for token in answer.choices[0].logprobs.content]
    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    base = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt + answer.choices[0].message.content, add_special_tokens=False, return_tensors="pt").input_ids
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)

    def logps(model: Any) -> Any:
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        return logits.gather(1, ids[0, start:, None])[:, 0]

    plain = logps(base)
    tuned = logps(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert torch.allclose(tuned, torch.tensor(served[: len(tuned)]), atol=1e-3)
    assert not torch.allclose(plain, tuned, atol=1e-2)


def test_the_next_skill_goes_on_top(service: Service, training_file: str, trained: Any) -> None:
    method = sdft(n_epochs=1, batch_size=24, checkpoint_every_steps=100)
    job = service.client.fine_tuning.jobs.create(model=trained.fine_tuned_model, training_file=training_file, method=method, suffix="second")
    finished = service.wait(job.id)
    assert finished.status == "succeeded", finished.error
    model = service.client.models.retrieve(finished.fine_tuned_model)
    assert model.model_extra["parent"] == trained.fine_tuned_model
    assert model.model_extra["base_model"] == BASE
    service.client.models.delete(finished.fine_tuned_model)
    with pytest.raises(NotFoundError):
        service.client.chat.completions.create(model=finished.fine_tuned_model, messages=QUESTION, max_tokens=3)


def test_supervised_training_on_the_same_rails(service: Service, training_file: str) -> None:
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 15, "learning_rate": 1e-3}}}
    job = service.client.fine_tuning.jobs.create(model=BASE, training_file=training_file, method=method, seed=7)
    finished = service.wait(job.id)
    assert finished.status == "succeeded", finished.error
    losses = [event.data["train_loss"] for event in service.events(job.id) if event.type == "metrics"]
    assert len(losses) == 4
    assert sum(losses[2:]) < sum(losses[:2])


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_other_forms_of_the_model_are_made_and_downloaded(service: Service, trained: Any, tmp_path: Path, form: str) -> None:
    """Merged: stock transformers gives the served answer. What llama.cpp makes of the GGUF is tests/llama's to show."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    archive = tmp_path / "model.tar.gz"
    content = service.client.get(f"/models/{trained.fine_tuned_model}/adapter?format={form}", cast_to=HttpxBinaryResponseContent)
    content.write_to_file(archive)
    with tarfile.open(archive, mode="r:gz") as opened:
        opened.extractall(tmp_path / "model", filter="data")
    if form == "gguf":
        (path,) = (tmp_path / "model").iterdir()
        assert path.suffix == ".gguf"
        assert path.read_bytes()[:4] == b"GGUF"
        return
    tokenizer, network = AutoTokenizer.from_pretrained(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        answer = network.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    served = service.client.chat.completions.create(model=trained.fine_tuned_model, messages=QUESTION, temperature=0, max_tokens=8)
    assert tokenizer.decode(answer, skip_special_tokens=True) == served.choices[0].message.content


def test_the_inference_server_answers_the_service_alone(service: Service) -> None:
    """Other users of the machine reach its port, and could load any adapter that it can read."""
    found = re.search(r"^SDFT_INFERENCE_URLS=(\S+)$", (service.data_dir / "service.env").read_text(), re.MULTILINE)
    assert found is not None
    assert httpx2.get(f"{found[1]}/v1/models").status_code == 401
    assert httpx2.post(f"{found[1]}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/tmp"}).status_code == 401
    assert "KEY" not in (service.data_dir / "service.env").read_text()
