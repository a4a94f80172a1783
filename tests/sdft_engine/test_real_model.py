"""The engine on the real 135M model: it answers, it trains, and its prompts are those of transformers."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sdft_engine.contract.metrics import StepMetrics
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.contract.run_directory import Attestation
from sdft_engine.generation import decode_all
from sdft_engine.model import LanguageModel, load_base_model
from sdft_engine.sampling import Decoding, SamplingParams
from sdft_engine.trainer import train
from tests.sdft_engine.runs import make_run, messages_of, records

CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Où est la tour Eiffel ? 🗼\n\tdeuxième ligne"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "<|im_end|> is not the end: 1+1?"}],
]


@pytest.fixture(scope="module")
def real_model(real_model_dir: Path) -> LanguageModel:
    return load_base_model(real_model_dir, device="cpu", dtype="float32")


def answer(model: LanguageModel, question: str) -> str:
    prompt = model.chat_format.prompt_ids([{"role": "user", "content": question}])
    sequence = Decoding(prompt, SamplingParams(24, temperature=0.0, stop_token_ids=model.chat_format.eos_token_ids))
    decode_all(model, [sequence])
    return model.chat_format.decode(sequence.token_ids)


def test_a_greedy_answer_knows_the_capital_of_france(real_model: LanguageModel) -> None:
    assert "Paris" in answer(real_model, "What is the capital of France?")


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_prompts_equal_those_of_transformers(real_model_dir: Path, number: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    chat_format = ChatFormat.from_directory(real_model_dir)
    conversation = CONVERSATIONS[number]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert chat_format.render(conversation) == text
    assert chat_format.prompt_ids(conversation) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat_format.decode(chat_format.prompt_ids(conversation)) == tokenizer.decode(
        chat_format.prompt_ids(conversation), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_logits_equal_the_transformers_forward(real_model: LanguageModel) -> None:
    ids = torch.tensor([real_model.chat_format.prompt_ids(CONVERSATIONS[0])])
    with torch.no_grad():
        mine = real_model.logits(real_model.hidden_states(ids))
        theirs = real_model.network(input_ids=ids).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_three_steps_of_self_distillation(real_model_dir: Path, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        real_model_dir,
        rows=4,
        validation_rows=1,
        batch_size=4,
        n_epochs=3,
        learning_rate=1e-3,
        temperature="auto",
        mask_clipped_completions="auto",
        max_completion_tokens=12,
        config={"teacher_template": "history_twice", "base_model": "smollm2-135m-instruct", "threads": None},
    )
    assert train(run).outcome == "succeeded"
    metrics = [StepMetrics.model_validate(record) for record in records(run.metrics_path)]
    assert [m.step for m in metrics] == [1, 2, 3]
    assert all(math.isfinite(m.train_loss) and m.train_loss > 0 and m.gradient_norm > 0 and m.loss_tokens > 0 for m in metrics)
    assert [message for message in messages_of(run) if message.startswith("Temperature settled at")]
    attestation = Attestation.model_validate_json((run.final_dir / "attestation.json").read_bytes())
    for probe in attestation.probes:
        values = probe.adapter_logps + probe.base_logps
        assert all(math.isfinite(value) and value <= 0 for value in values)
        assert max(abs(a - b) for a, b in zip(probe.adapter_logps, probe.base_logps, strict=True)) > 1e-3
