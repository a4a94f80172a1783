"""The kernels that vllm_plugin/ gives to vLLM on a CPU, without vLLM: row by row they are what each row's own adapter says."""

import asyncio
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

PLUGIN_DIR = Path(__file__).parents[1] / "vllm_plugin"
sys.path.insert(0, str(PLUGIN_DIR))  # as they are installed: beside one another
INDICES = [0, -1, 2, 2, -1, 1, 0]
SLOTS, RANK, IN, OUT = 3, 4, 6, 5


@pytest.fixture(scope="module")
def plugin() -> Any:
    return importlib.import_module("sdft_vllm_lora")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("stacked", [True, False])
def test_rows_without_an_adapter_get_nothing(plugin: Any, generator: torch.Generator, stacked: bool) -> None:
    shape = (SLOTS, 1) if stacked else (SLOTS,)
    x, a, b = (torch.randn(*size, generator=generator) for size in ((len(INDICES), IN), (*shape, RANK, IN), (*shape, OUT, RANK)))
    indices = torch.tensor(INDICES)
    hidden = torch.full((len(INDICES), RANK + 2), 9.0)
    plugin.bgmv_shrink(x, a, hidden, indices, 0.5)
    output = torch.randn(len(INDICES), OUT + 1, generator=generator)
    before = output.clone()
    plugin.bgmv_expand(hidden[:, :RANK], b, output, indices)
    for row, index in enumerate(INDICES):
        expected = torch.zeros(OUT) if index < 0 else b[index].reshape(OUT, RANK) @ (0.5 * a[index].reshape(RANK, IN) @ x[row])
        torch.testing.assert_close(output[row, :OUT] - before[row, :OUT], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(output[:, OUT:], before[:, OUT:])


def test_a_slice_of_a_packed_projection(plugin: Any, generator: torch.Generator) -> None:
    hidden, b = torch.randn(len(INDICES), RANK, generator=generator), torch.randn(SLOTS, 1, OUT, RANK, generator=generator)
    added, replaced = torch.ones(len(INDICES), 12), torch.ones(len(INDICES), 12)
    plugin.bgmv_expand_slice(hidden, b, added, torch.tensor(INDICES), 3, OUT, True)
    plugin.bgmv_expand_slice(hidden, b, replaced, torch.tensor(INDICES), 3, OUT, False)
    for row, index in enumerate(INDICES):
        expected = torch.zeros(OUT) if index < 0 else b[index, 0] @ hidden[row]
        torch.testing.assert_close(added[row, 3 : 3 + OUT], expected + 1)
        torch.testing.assert_close(replaced[row, 3 : 3 + OUT], expected)
    assert bool((added[:, :3] == 1).all())
    assert bool((added[:, 3 + OUT :] == 1).all())


def test_one_index_stands_for_all_rows_and_any_other_number_is_refused(plugin: Any, generator: torch.Generator) -> None:
    """The numbers differ where the log-probabilities of a prompt are asked for; guessing would be wrong answers."""
    x, a = torch.randn(3, IN, generator=generator), torch.randn(SLOTS, RANK, IN, generator=generator)
    hidden = torch.zeros(3, RANK)
    plugin.bgmv_shrink(x, a, hidden, torch.tensor([1]))
    torch.testing.assert_close(hidden, x @ a[1].T)
    with pytest.raises(ValueError, match="3 rows have 2 adapter indices"):
        plugin.bgmv_shrink(x, a, hidden, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("path", "given", "status"),
    [
        ("/health", b"wrong", 200),
        ("/v1/models", b"", 401),
        ("/adapters", b"", 401),
        ("/metrics", b"Bearer wrong", 401),
        ("/adapters", b"Bearer secret", 200),
    ],
)
def test_every_path_but_health_asks_for_the_key(monkeypatch: pytest.MonkeyPatch, path: str, given: bytes, status: int) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    answered: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        answered.extend([message["status"]] if "status" in message else [])

    async def receive() -> Any:
        raise AssertionError("the body is not read before the key is known")

    scope = {"type": "http", "path": path, "headers": [(b"authorization", given)]}
    asyncio.run(importlib.import_module("sdft_vllm_key").RequireKey(app)(scope, receive, send))
    assert answered == [status]


@pytest.mark.parametrize("value", [None, ""])
def test_no_server_starts_without_a_key(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_API_KEY", value)
    with pytest.raises(RuntimeError, match="VLLM_API_KEY is not set"):
        importlib.import_module("sdft_vllm_key").RequireKey(lambda *_: None)


def test_a_vllm_whose_kernels_have_other_names_is_refused(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without vLLM itself: modules by the names that it has, one of them without a kernel."""
    kernels = dict.fromkeys(("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"))
    modules = {
        "vllm.platforms": SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True)),
        "vllm.lora.ops.torch_ops.lora_ops": SimpleNamespace(__name__="lora_ops", **kernels),
        "vllm.lora.punica_wrapper.punica_cpu": SimpleNamespace(__name__="punica_cpu", **kernels),
    }
    modules["vllm.lora.ops.torch_ops"] = SimpleNamespace(__name__="torch_ops", lora_ops=modules["vllm.lora.ops.torch_ops.lora_ops"], **kernels)
    modules["vllm.lora.ops"] = SimpleNamespace(torch_ops=modules["vllm.lora.ops.torch_ops"])
    modules["vllm.lora.punica_wrapper"] = SimpleNamespace(punica_cpu=modules["vllm.lora.punica_wrapper.punica_cpu"])
    for name in ("vllm", "vllm.lora"):
        modules[name] = SimpleNamespace()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    plugin.register()
    assert modules["vllm.lora.punica_wrapper.punica_cpu"].bgmv_expand is plugin.bgmv_expand
    del modules["vllm.lora.punica_wrapper.punica_cpu"].bgmv_shrink
    with pytest.raises(RuntimeError, match="punica_cpu has no bgmv_shrink"):
        plugin.register()
