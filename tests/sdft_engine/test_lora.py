"""sdft_engine.lora in memory: what an adapter computes, alone, folded, and row by row."""

import pytest
import torch
from torch import Tensor

from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.lora import LoraShape, RowGroup
from sdft_engine.model import LanguageModel
from tests.sdft_engine.plain import PlainModel, add_adapter, in_float64, randomise, tokens

ROWS = torch.tensor([tokens(seed, 12) for seed in range(4)])


def logits_of(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model.logits(model.hidden_states(ROWS))


def test_every_linear_layer_but_the_head_has_adapters(model: LanguageModel) -> None:
    names = {name.rpartition(".")[2] for name in model.adapters.layers}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(model.adapters.layers) == 2 * 7
    assert type(model.network.get_output_embeddings()) is torch.nn.Linear


def test_a_new_adapter_changes_nothing_and_can_learn(model: LanguageModel) -> None:
    before = logits_of(model)
    model.adapters.add("student", LoraShape(4, 8), trainable=True, generator=torch.Generator().manual_seed(1))
    with model.adapters.use("student"):
        assert torch.equal(logits_of(model), before)
        model.logits(model.hidden_states(ROWS)).square().mean().backward()
    for name, factor in model.adapters.parameters("student").items():
        assert factor.grad is not None
        if name.endswith("lora_B"):
            assert not factor.any()
            assert factor.grad.any()
        else:
            bound = factor.shape[1] ** -0.5  # Kaiming's uniform distribution with a = sqrt(5)
            assert bound * 0.9 < factor.abs().max() <= bound
    assert [name for name, weight in model.network.named_parameters() if weight.grad is not None and "lora_" not in name] == []


def test_the_same_seed_gives_the_same_new_adapter(model: LanguageModel) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model.adapters.add(name, LoraShape(4, 8), trainable=True, generator=torch.Generator().manual_seed(seed))
    a, b, c = (torch.cat([factor.flatten() for factor in model.adapters.parameters(name).values()]) for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("shape", [LoraShape(4, 8), LoraShape(3, 16), LoraShape(1, 1)])
def test_an_adapter_adds_its_scaled_product(model: LanguageModel, plain: PlainModel, shape: LoraShape) -> None:
    factors = in_float64(add_adapter(model, "student", seed=1, shape=shape))
    with model.adapters.use("student"):
        mine = logits_of(model)
    expected = torch.stack([plain.logits(row, factors, shape.alpha / shape.rank) for row in ROWS.tolist()])
    torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-4)
    assert (mine - logits_of(model)).abs().max() > 0.1


def test_folded_equals_unfolded(model: LanguageModel) -> None:
    add_adapter(model, "student", seed=1)
    add_adapter(model, "teacher", seed=2)
    base = logits_of(model)
    for name in ("student", "teacher", "student"):
        with model.adapters.use(name):
            unfolded = logits_of(model)
        with torch.no_grad(), model.adapters.use(name, fold=True):
            folded = logits_of(model)
            assert model.adapters.routing.folded == name
        torch.testing.assert_close(folded, unfolded, rtol=0, atol=1e-5)
        assert (folded - base).abs().max() > 0.1
    assert torch.equal(logits_of(model), base)


def test_a_fold_is_not_used_after_its_block(model: LanguageModel) -> None:
    """The adapter may have moved since: an optimizer step lies between a rollout and the next."""
    add_adapter(model, "student", seed=1)
    with torch.no_grad(), model.adapters.use("student", fold=True):
        before = logits_of(model)
    randomise(model.adapters, "student", seed=5)
    with torch.no_grad(), model.adapters.use("student"):
        assert (logits_of(model) - before).abs().max() > 0.1
        with model.adapters.use("student", fold=True):
            before = logits_of(model)
        randomise(model.adapters, "student", seed=6)
        assert (logits_of(model) - before).abs().max() > 0.1
    with torch.no_grad(), model.adapters.use("student", fold=True), model.adapters.use(None):
        assert (logits_of(model) - before).abs().max() > 0.1


def test_row_groups_equal_single_adapters(model: LanguageModel) -> None:
    single = {None: logits_of(model)}
    for seed, (name, shape) in enumerate({"a": LoraShape(4, 8), "b": LoraShape(2, 16)}.items()):
        add_adapter(model, name, seed, shape=shape)
        with model.adapters.use(name):
            single[name] = logits_of(model)
    groups = [RowGroup("b", torch.tensor([0, 2])), RowGroup("a", torch.tensor([3]))]
    with model.adapters.use(groups):
        mixed = logits_of(model)
    for row, name in enumerate(["b", None, "b", "a"]):
        torch.testing.assert_close(mixed[row], single[name][row], rtol=0, atol=1e-5)


def test_rows_of_an_adapter_that_is_gone_are_refused(model: LanguageModel) -> None:
    """They must never be answered by the bare base instead."""
    add_adapter(model, "a", seed=1)
    model.adapters.remove("a")
    with model.adapters.use([RowGroup("a", torch.tensor([0]))]), pytest.raises(AttributeError, match="'a'"):
        logits_of(model)
    with model.adapters.use("a"), pytest.raises(AttributeError, match="'a'"):
        logits_of(model)


def test_blocks_nest_and_end_with_an_error_too(model: LanguageModel) -> None:
    add_adapter(model, "a", seed=1)
    add_adapter(model, "b", seed=2)
    routing = model.adapters.routing
    with model.adapters.use("a"):
        with pytest.raises(ZeroDivisionError), model.adapters.use("b"):
            raise ZeroDivisionError
        assert routing.active == "a"
    assert (routing.active, routing.folded) == (None, None)


def test_gradient_reaches_the_adapter_in_use_only(model: LanguageModel) -> None:
    student = add_adapter(model, "student", seed=1, trainable=True)
    other = add_adapter(model, "other", seed=2, trainable=True)
    with model.adapters.use("student"):
        model.logits(model.hidden_states(ROWS)).square().mean().backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in student.values())
    assert all(factor.grad is None for factor in other.values())


def test_factors_are_float32_on_a_bfloat16_base(bfloat16_model: LanguageModel, plain: PlainModel) -> None:
    factors = add_adapter(bfloat16_model, "student", seed=1, trainable=True)
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    with bfloat16_model.adapters.use("student"):
        hidden = bfloat16_model.hidden_states(ROWS)
        bfloat16_model.logits(hidden).square().mean().backward()
    assert hidden.dtype == torch.bfloat16
    assert {factor.grad.dtype for factor in factors.values() if factor.grad is not None} == {torch.float32}
    changed = plain.logits(ROWS[0].tolist(), in_float64(factors), 2.0)
    bare = plain.logits(ROWS[0].tolist())
    mine = bfloat16_model.logits(hidden).detach()[0].double()
    assert (mine - changed).abs().mean() < 0.1 * (changed - bare).abs().mean()


def test_a_name_is_taken_once_and_free_again_after_removal(model: LanguageModel) -> None:
    add_adapter(model, "a", seed=1)
    with pytest.raises(ConfigurationError, match="'a'"):
        model.adapters.add("a", LoraShape(2, 2), trainable=False)
    assert model.adapters.shapes == {"a": LoraShape(4, 8)}
    model.adapters.remove("a")
    assert [name for name, _ in model.network.named_parameters() if "lora_" in name] == []
    model.adapters.add("a", LoraShape(2, 2), trainable=False)
    assert {min(factor.shape) for factor in model.adapters.parameters("a").values()} == {2}


def test_assign_copies_by_name_and_refuses_strangers(model: LanguageModel) -> None:
    source = {name: value.detach().clone() for name, value in add_adapter(model, "a", seed=1).items()}
    add_adapter(model, "b", seed=2)
    model.adapters.assign("b", dict(reversed(source.items())))
    for name, value in model.adapters.parameters("b").items():
        assert torch.equal(value, source[name])
        assert value.data_ptr() != source[name].data_ptr()
    first = next(iter(source))
    with pytest.raises(ConfigurationError, match=first):
        model.adapters.assign("b", {name: value for name, value in source.items() if name != first})
    with pytest.raises(ConfigurationError, match="foreign"):
        model.adapters.assign("b", source | {"foreign.lora_A": source[first]})
    with pytest.raises(ConfigurationError, match="shape"):
        model.adapters.assign("b", source | {first: source[first].T})


@pytest.mark.parametrize("name", ["v1.2", "half", "keys", "training"])
def test_names_that_torch_can_not_register_are_refused_before_anything_is_added(model: LanguageModel, name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        model.adapters.add(name, LoraShape(2, 2), trainable=False)
    assert model.adapters.shapes == {}
