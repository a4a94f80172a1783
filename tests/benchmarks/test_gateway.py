"""benchmarks.gateway: pairs, and what is said of them. The program itself is run by hand and by make bench."""

import itertools

import pytest

from benchmarks.gateway import WARM_UP, has_text, measure, report


def test_both_are_asked_in_turn_and_the_first_answers_don_t_count() -> None:
    asked: list[str] = []
    numbers = itertools.count()

    def asking(name: str) -> float:
        asked.append(name)
        return float(next(numbers))

    pairs = measure(lambda: asking("direct"), lambda: asking("gateway"), 4)
    assert len(pairs) == 4
    assert asked[:4] == ["gateway", "direct", "direct", "gateway"]
    assert min(min(pair) for pair in pairs) == 2 * WARM_UP


@pytest.mark.parametrize(("added", "status", "said"), [(4.0, 0, "kept"), (6.0, 1, "missed")])
def test_the_median_of_the_differences_decides(capsys: pytest.CaptureFixture[str], added: float, status: int, said: str) -> None:
    pairs = [(50.0, 50.0 + added)] * 9 + [(50.0, 500.0)]
    assert report(pairs, "embedded", 5.0) == status
    assert f"{added:.1f} ms added (limit 5): {said}" in capsys.readouterr().out


def test_a_piece_without_text_is_not_the_first_token() -> None:
    assert not has_text('data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}')
    assert not has_text('data: {"choices": []}')
    assert has_text('data: {"choices": [{"delta": {"content": "Hello"}}]}')
