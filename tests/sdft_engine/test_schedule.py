"""sdft_engine.schedule: which rows a step takes, and at which learning rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft_engine.contract.hyperparameters import total_steps_of
from sdft_engine.schedule import learning_rate_at, rows_of_step


def test_learning_rates_by_hand() -> None:
    """Ten steps, two of warm-up: then a cosine over eight, from the peak down, zero only after the last."""
    rates = [learning_rate_at(step, 10, 1.0, 0.2) for step in range(1, 11)]
    eighths = [1.0, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602]
    assert rates == pytest.approx([0.5, 1.0, *eighths], abs=1e-7)
    assert learning_rate_at(11, 10, 1.0, 0.2) == pytest.approx(0, abs=1e-15)


def test_warm_up_is_rounded_up_and_may_be_all_or_nothing() -> None:
    assert [learning_rate_at(step, 11, 3.0, 0.1) for step in (1, 2, 3)] == pytest.approx([1.5, 3.0, 3.0])
    assert learning_rate_at(1, 10, 1.0, 0.0) == 1.0
    assert [learning_rate_at(step, 4, 1.0, 1.0) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_at(1, 1, 1.0, 0.1) == 1.0


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 12), n_epochs=st.integers(1, 5), seed=st.integers(0, 5))
def test_every_row_is_taken_once_an_epoch(rows: int, batch_size: int, n_epochs: int, seed: int) -> None:
    total = total_steps_of(rows, batch_size, n_epochs)
    batches = [rows_of_step(step, batch_size, rows, seed, n_epochs) for step in range(1, total + 1)]
    taken = [row for batch in batches for row in batch]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert len(taken) == rows * n_epochs
    for epoch in range(n_epochs):
        assert sorted(taken[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    epochs = [rows_of_step(step, 30, 30, 1, 3) for step in (1, 2, 3)]
    assert len({tuple(epoch) for epoch in [*epochs, rows_of_step(1, 30, 30, 2, 3)]}) == 4
    assert rows_of_step(2, 30, 30, 1, 3) == epochs[1]
