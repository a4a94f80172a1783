"""sdft_engine.products: the same products by every kernel, and the faster one by measurement."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from sdft_engine import products
from sdft_engine.products import _FrozenLinear, frozen_linear, outer_sum, pack, packed_is_faster, packed_linear, packs, times_frozen

GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


@pytest.fixture(params=["onednn", "default"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whatever this CPU would choose."""
    assert products.onednn_is_available()
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "onednn")
    return str(request.param)


@pytest.fixture
def onednn_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []
    original = products._onednn_linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(tuple(x.shape))
        return original(x, weight, bias)

    monkeypatch.setattr(products, "_onednn_linear", noted)
    return calls


@pytest.mark.parametrize("shape", [(5, 33), (2, 7, 33), (1, 33), (0, 33), (200, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_with_frozen_weights(shape: tuple[int, ...], bias: bool) -> None:
    x, weight, added = noise(*shape), noise(70, 33), noise(70) if bias else None
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    torch.testing.assert_close(frozen_linear(x, weight, added).double(), expected, rtol=1e-5, atol=1e-4)
    gradient = noise(*shape[:-1], 70)
    torch.testing.assert_close(times_frozen(gradient, weight).double(), gradient.double() @ weight.double(), rtol=1e-5, atol=1e-4)


def test_a_sum_of_outer_products() -> None:
    x, y = noise(50, 4), noise(50, 33)
    torch.testing.assert_close(outer_sum(x, y).double(), x.double().T @ y.double(), rtol=1e-5, atol=1e-4)


def test_gradients_flow_to_the_input_alone(kernel: str) -> None:
    weight, bias = noise(6, 4), noise(6)
    x = noise(2, 5, 4).requires_grad_()
    y = frozen_linear(x, weight, bias)
    assert (type(y.grad_fn).__name__ == "_FrozenLinearBackward") == (kernel == "onednn")
    gradient = noise(2, 5, 6)
    y.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ weight)
    assert weight.grad is bias.grad is None


def test_the_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where oneDNN has no product: the function's own arithmetic around it."""
    monkeypatch.setattr(products, "_onednn_linear", torch.nn.functional.linear)
    weight, bias = noise(6, 4, dtype=torch.float64), noise(6, dtype=torch.float64)
    x = noise(2, 5, 4, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: _FrozenLinear.apply(x, weight, bias), (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_use_torchs_own_products(dtype: torch.dtype, onednn_calls: list[tuple[int, ...]]) -> None:
    x, weight = noise(5, 33, dtype=dtype), noise(70, 33, dtype=dtype)
    torch.testing.assert_close(frozen_linear(x, weight), torch.nn.functional.linear(x, weight))
    torch.testing.assert_close(times_frozen(x[:, :7], weight[:7]), x[:, :7] @ weight[:7])
    torch.testing.assert_close(outer_sum(x, x), x.T @ x)
    assert onednn_calls == []


@pytest.mark.parametrize("rows", [1, 8, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_packed_weights(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weight, bias = noise(rows, 33, dtype=dtype), noise(70, 33, dtype=dtype), noise(70, dtype=dtype)
    if weight.dtype == torch.bfloat16 and not products._packs_bfloat16():
        pytest.skip("torch packs no bfloat16 on this CPU")
    assert packs(weight)
    expected = x.double() @ weight.double().T + bias.double()
    found = packed_linear(x, pack(weight), bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_what_cannot_be_packed() -> None:
    assert not packs(noise(4, 4, dtype=torch.float64))
    assert not packs(torch.empty(4, 4, device="meta"))


def test_packed_products_are_used_where_they_are_faster(kernel: str) -> None:
    assert packed_is_faster(noise(2, products.FEW_ROWS // 2, 9))
    assert packed_is_faster(noise(products.FEW_ROWS + 1, 9)) == (kernel == "onednn")
    assert packed_is_faster(noise(products.FEW_ROWS + 1, 9, dtype=torch.bfloat16))


@pytest.mark.parametrize(("slower_kernel", "factor", "faster"), [("default", 3.0, True), ("default", 1.1, False), ("onednn", 3.0, False)])
def test_the_choice_is_measured_with_a_margin(monkeypatch: pytest.MonkeyPatch, slower_kernel: str, factor: float, faster: bool) -> None:
    """On a clock that both kernels move."""
    now = [0.0]

    def taking(name: str) -> Any:
        def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            now[0] += factor if name == slower_kernel else 1.0
            return x

        return product

    def clock() -> Iterator[float]:
        while True:
            yield now[0]

    monkeypatch.undo()
    monkeypatch.setattr(products, "linear", taking("default"))
    monkeypatch.setattr(products, "_onednn_linear", taking("onednn"))
    monkeypatch.setattr(products, "onednn_is_available", lambda: True)
    ticks = clock()
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks))
    before = torch.get_num_threads()
    assert products._is_measured_faster.__wrapped__() is faster
    assert torch.get_num_threads() == before


def test_without_onednn_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(products, "onednn_is_available", lambda: False)
    assert products._is_measured_faster.__wrapped__() is False
