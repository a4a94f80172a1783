"""The service's own client against this server: what `core` expects of vLLM's surface is what is here."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from core.inference_client import AdapterRefused, InferenceClient
from core.settings import Settings
from tests.inference.serving import BASE, RunningServer

MakeServer = Callable[..., AbstractContextManager[RunningServer]]


def test_loading_scoring_and_unloading(
    make_server: MakeServer, make_settings: Callable[..., Settings], reference_logprobs: Callable[..., torch.Tensor]
) -> None:
    with make_server(api_key="geheim") as server:
        client = InferenceClient(server.url, make_settings(inference_api_key="geheim"))
        ids = [70, 81, 92, 103]
        with pytest.raises(AdapterRefused, match="does not exist"):
            client.prompt_logprobs("first", ids)
        with pytest.raises(AdapterRefused, match="no directory"):
            client.load_adapter("first", server.adapters_dir / "nowhere")
        for _ in range(2):
            client.load_adapter("first", server.adapters_dir / "first")
        for model, adapter in ((BASE, None), ("first", "first")):
            expected = reference_logprobs(ids, adapter).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            assert client.prompt_logprobs(model, ids) == pytest.approx(expected, abs=1e-4)
        for _ in range(2):
            client.unload_adapter("first")
        assert client.healthy()
        assert client.served_dtype(BASE) == "float32"


def test_answers_whole_and_streamed(make_server: MakeServer, make_settings: Callable[..., Settings]) -> None:
    body: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "which lamp?"}], "max_tokens": 9, "temperature": 0}

    async def ask(client: InferenceClient) -> tuple[str, str]:
        whole = await client.complete("/v1/chat/completions", body)
        async with client.stream("/v1/chat/completions", {**body, "stream": True}) as (status, chunks):
            assert (whole.status, status) == (200, 200)
            lines = (b"".join([chunk async for chunk in chunks])).decode().splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        await client.aclose()
        return whole.body["choices"][0]["message"]["content"], "".join(e["choices"][0]["delta"].get("content", "") for e in events)

    with make_server() as server:
        whole, streamed = asyncio.run(ask(InferenceClient(server.url, make_settings())))
        assert whole
        assert whole == streamed
