import json
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from inference.errors import AdapterGone
from tests.inference.serving import BASE, RunningServer, held, wait_until

MakeServer = Callable[..., AbstractContextManager[RunningServer]]


def engine_adapters(server: RunningServer) -> list[str]:
    return sorted(server.engine.model.adapters.shapes)


def error_of(answer: Any) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_loading_and_unloading_as_vllm_words_it(make_server: MakeServer) -> None:
    with make_server() as server:
        loaded = server.load("first", server.adapters_dir / "first")
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'first' added successfully.")
        again = server.load("first", server.adapters_dir / "second")
        assert (again.status_code, error_of(again)["message"]) == (400, "The lora adapter 'first' has already been loaded.")
        cards = {card["id"]: card for card in server.client.get("/v1/models").json()["data"]}
        assert cards[BASE] | {"created": 0} == {
            "id": BASE, "object": "model", "created": 0, "owned_by": "sdft", "root": BASE, "parent": None, "max_model_len": 512, "dtype": "float32",
        }  # fmt: skip
        assert (cards["first"]["root"], cards["first"]["parent"]) == (str(server.adapters_dir / "first"), BASE)
        unloaded = server.unload("first")
        assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'first' removed successfully.")
        assert (server.model_ids(), engine_adapters(server)) == ([BASE], [])
        assert server.unload("first").status_code == 404
        assert server.post("/v1/completions", model="first", prompt="a").status_code == 404


def test_a_name_can_be_loaded_again_with_other_weights(make_server: MakeServer) -> None:
    with make_server() as server:
        said = []
        for adapter in ("first", "second"):
            server.load("model", server.adapters_dir / adapter)
            said.append(server.complete("the lamp", model="model", temperature=0)["choices"][0]["text"])
            server.unload("model")
        assert said[0] != said[1]


def test_a_relative_path_is_inside_the_adapters_directory(make_server: MakeServer) -> None:
    with make_server() as server:
        assert server.load("first", "first").status_code == 200


@pytest.mark.parametrize("path", ["..", ".", "", "/etc", "../outside", "link", "first/../../outside", "nul\x00byte", "x" * 5000, "missing", "linked_weights"])
def test_a_path_that_leads_out_is_refused(make_server: MakeServer, tmp_path: Path, path: str) -> None:
    with make_server() as server:
        outside = Path(shutil.copytree(server.adapters_dir / "first", tmp_path / "outside"))
        (server.adapters_dir / "link").symlink_to(outside)
        linked = Path(shutil.copytree(server.adapters_dir / "first", server.adapters_dir / "linked_weights"))
        (linked / "adapter_model.safetensors").unlink()
        (linked / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
        answer = server.load("stray", path)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "lora_path")
        assert (server.model_ids(), engine_adapters(server)) == ([BASE], [])


@pytest.mark.parametrize("name", ["", BASE, "../x", "a/b", "-x", "x" * 257, "a b"])
def test_a_name_that_is_none_is_refused(make_server: MakeServer, name: str) -> None:
    with make_server() as server:
        answer = server.load(name, server.adapters_dir / "first")
        assert (answer.status_code, error_of(answer)["param"]) == (400, "lora_name")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled_weights(directory: Path) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    torch.save(weights, directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def weights_of_another_model(directory: Path) -> None:
    config = LlamaConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(str(directory))


def weights_missing_a_layer(directory: Path) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, directory / "adapter_model.safetensors")


def truncated_weights(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (pickled_weights, "safetensors"),
        (weights_of_another_model, "shape"),
        (weights_missing_a_layer, "layers don't match"),
        (truncated_weights, "no readable adapter"),
        (lambda directory: (directory / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda directory: (directory / "adapter_config.json").write_text("[1]"), "not a LoRA"),
        (lambda directory: (directory / "adapter_config.json").write_text("{"), "no readable adapter"),
        (lambda directory: edit_config(directory, r=10**9), "rank"),
        (lambda directory: edit_config(directory, r="4"), "positive whole number"),
        (lambda directory: edit_config(directory, use_dora=True), "use_dora"),
        (lambda directory: edit_config(directory, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (lambda directory: edit_config(directory, peft_type="IA3"), "not a LoRA"),
    ],
)
def test_a_broken_or_foreign_adapter_is_refused_and_nothing_of_it_stays(make_server: MakeServer, damage: Callable[[Path], Any], reason: str) -> None:
    with make_server() as server:
        damage(server.adapters_dir / "first")
        answer = server.load("first", server.adapters_dir / "first")
        assert answer.status_code == 400
        assert reason in error_of(answer)["message"]
        assert (server.model_ids(), engine_adapters(server)) == ([BASE], [])
        assert server.load("first", server.adapters_dir / "second").status_code == 200


def test_of_two_loads_of_one_name_one_is_told_that_it_was_loaded(make_server: MakeServer) -> None:
    with make_server() as server:
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(server.load("first", "first").status_code)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 400, 400, 400]
        assert (server.model_ids(), len(engine_adapters(server))) == ([BASE, "first"], 1)


def test_unloading_waits_for_the_answers_being_given(make_server: MakeServer) -> None:
    with make_server() as server:
        server.load("first", "first")
        whole = server.complete("the lamp", model="first", max_tokens=40, temperature=0, ignore_eos=True)["choices"][0]["text"]
        with held(server.engine):
            said: list[str] = []
            asking = threading.Thread(
                target=lambda: said.append(server.complete("the lamp", model="first", max_tokens=40, temperature=0, ignore_eos=True)["choices"][0]["text"])
            )
            asking.start()
            wait_until(lambda: server.engine.load == (0, 1))
            unloading = threading.Thread(target=server.unload, args=("first",))
            unloading.start()
            wait_until(lambda: server.model_ids() == [BASE])
            assert server.post("/v1/completions", model="first", prompt="the").status_code == 404
            assert len(engine_adapters(server)) == 1
        asking.join()
        unloading.join()
        assert said == [whole]
        assert engine_adapters(server) == []


def test_unloading_while_streaming_ends_the_stream_complete(make_server: MakeServer) -> None:
    with make_server() as server:
        server.load("first", "first")
        options: dict[str, Any] = {"model": "first", "prompt": "the lamp", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        whole = server.complete(**options)["choices"][0]["text"]
        server.slow_down(0.02)
        events = server.stream("/v1/completions", **options)
        first = next(events)
        assert server.unload("first").status_code == 200
        rest = list(events)
        assert rest[-1] == "[DONE]"
        assert "".join(event["choices"][0]["text"] for event in [first, *rest[:-1]]) == whole


def test_unloading_ends_answers_that_take_too_long(make_server: MakeServer) -> None:
    """The other answers in the batch go on."""
    with make_server(unload_wait_seconds=0.2) as server:
        server.load("first", "first")
        steps = server.slow_down(0.02)
        options: dict[str, Any] = {"prompt": "the lamp", "max_tokens": 100, "ignore_eos": True}
        doomed, spared = server.stream("/v1/completions", model="first", **options), server.stream("/v1/completions", model=BASE, **options)
        next(doomed), next(spared)
        assert server.unload("first").status_code == 200
        rest = list(doomed)
        assert [event["error"]["code"] for event in rest if "error" in event] == [AdapterGone.code]
        assert rest[-1] == "[DONE]"
        assert list(spared)[-2]["choices"][0]["finish_reason"] == "length"
        assert 2 in steps


def test_the_adapter_that_was_used_longest_ago_makes_room(make_server: MakeServer) -> None:
    with make_server(max_adapters=2) as server:
        server.load("a", "first")
        server.load("b", "second")
        expected = server.complete("the lamp", model="a", temperature=0)["choices"][0]["text"]
        server.load("c", "second")
        assert server.model_ids() == [BASE, "a", "c"]
        wait_until(lambda: len(engine_adapters(server)) == 2)
        assert server.post("/v1/completions", model="b", prompt="x").status_code == 404
        assert server.complete("the lamp", model="a", temperature=0)["choices"][0]["text"] == expected
        assert server.load("b", "second").status_code == 200
        assert server.model_ids() == [BASE, "a", "b"]


def test_an_answer_that_is_on_its_way_keeps_its_adapter(make_server: MakeServer) -> None:
    with make_server(max_adapters=1) as server:
        server.load("a", "first")
        expected = server.complete("the lamp", model="a", temperature=0, max_tokens=20, ignore_eos=True)["choices"][0]["text"]
        server.slow_down(0.02)
        events = server.stream("/v1/completions", model="a", prompt="the lamp", temperature=0, max_tokens=20, ignore_eos=True)
        texts = [next(events)["choices"][0]["text"]]
        assert server.load("b", "second").status_code == 200
        assert server.model_ids() == [BASE, "b"]
        texts += [event["choices"][0]["text"] for event in events if event != "[DONE]"]
        assert "".join(texts) == expected
        wait_until(lambda: len(engine_adapters(server)) == 1)
