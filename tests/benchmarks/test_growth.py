"""benchmarks.growth: one thing changes at a time, and the page holds every point."""

from pathlib import Path

from benchmarks.growth import AXES, CENTRE, DEFAULT_VOCABULARY, RANK, page, plot, shape_at

CENTRES = {"completion": CENTRE.completion, "batch": CENTRE.batch, "rank": RANK, "vocabulary": DEFAULT_VOCABULARY}


def test_one_thing_changes_at_a_time() -> None:
    for axis, values in AXES.items():
        points = [shape_at(axis, value) for value in values]
        assert len(set(points)) == len(values)
        changed = {
            name
            for shape, rank in points
            for name, value in {"batch": shape.batch, "completion": shape.completion, "vocabulary": shape.vocabulary, "rank": rank}.items()
            if value != {"batch": CENTRE.batch, "completion": CENTRE.completion, "vocabulary": None, "rank": RANK}[name]
        }
        assert changed == {axis}
        assert shape_at(axis, CENTRES[axis]) == (CENTRE, RANK)


def test_the_page_and_the_picture_hold_every_point(tmp_path: Path) -> None:
    at = {"step": 1.5, "rollout": 0.5, "teacher": 0.25, "student": 0.75, "peak": 2.5e9}
    measured = {"batch": {2: at, 4: at}, "vocabulary": {150_000: at}}
    text = page(measured, "a machine")
    assert "| prompts a step | 2 | 1.50 | 0.50 | 0.25 | 0.75 | 2.50 |" in text
    assert "| vocabulary | 150,000 | 1.50 |" in text
    assert text.count("| 2.50 |") == 3
    plot(measured, tmp_path / "growth.svg")
    assert "<svg" in (tmp_path / "growth.svg").read_text()
