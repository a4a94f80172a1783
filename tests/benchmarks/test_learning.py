"""benchmarks.learning: its table and verdicts by hand, what it skips, and a short run of the real thing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import learning
from benchmarks.learning import run_arms, settings_of
from benchmarks.learning_parts import arms
from benchmarks.learning_parts.arms import ARMS, Arm
from benchmarks.learning_parts.bench import DATA_DIR, VIEW, Bench, Count, Scores
from benchmarks.learning_parts.report import Rows, from_json, plot, table, to_json, verdicts
from sdft_engine.contract.dataset import read_dataset
from sdft_engine.contract.prompts import ChatFormat
from sdft_engine.sampling import Decoding

ROOT = Path(__file__).resolve().parents[2]


def scores(trained: int, paraphrases: int, general: int, kept: int, kl: float, **extra: float) -> Scores:
    return Scores(Count(trained, 24), Count(paraphrases, 48), Count(general, 200), Count(kept, 160), kl, extra)


ROWS: Rows = {
    "base": {1: scores(0, 0, 160, 160, 0.0)},
    "teacher": {1: Scores(Count(23, 24), Count(40, 48), extra={"kl_of_own_samples": 0.7})},
    "SDFT": {1: scores(24, 48, 160, 150, 0.1), 2: scores(24, 40, 144, 140, 0.3)},
    "SDFT, reverse": {1: scores(0, 0, 156, 150, 0.05)},
    "SFT, lr 0.001, matched": {1: scores(24, 36, 80, 80, 1.0, step=20, seconds=30), 2: scores(24, 36, 80, 80, 0.6, step=24, seconds=40)},
}


def test_the_table_pools_seeds_and_shows_their_spread() -> None:
    lines = table(ROWS).splitlines()
    assert lines[2].startswith("| base | 1 | 0% [0, 14] | 0% [0, 7] | 100% | 100% [98, 100] | 0.000 |")
    assert lines[3].endswith("| 83% [70, 91] |  |  |  |")
    assert lines[4].startswith("| SDFT | 2 | 100% [93, 100] (100 to 100) | 92% [84, 96] (83 to 100) | 95% (90 to 100) | 91% [87, 93] (88 to 94) | 0.200 |")
    assert lines[6].startswith("| SFT, lr 0.001, matched (stopped at step 20 to 24) | 2 |")
    assert lines[6].endswith("| 0.800 |")


def test_verdicts_compare_with_the_aims_and_with_matched_sft() -> None:
    assert verdicts(ROWS) == [
        "SDFT: paraphrases 91.7% (aim: at least 90%, reached); general questions 95.0% of the base's (aim: at least 95%, reached); "
        "of those that the base answers, 90.6% are still answered; KL from base 0.25 of matched SFT's (aim: at most 0.5, reached)",
        "SDFT, reverse: paraphrases 0.0% (aim: at least 90%, missed); general questions 97.5% of the base's (aim: at least 95%, reached); "
        "of those that the base answers, 93.8% are still answered; KL from base 0.05 of matched SFT's (aim: at most 0.5, reached)",
    ]


def test_a_seed_whose_distance_was_not_measured_is_left_out_of_the_ratio() -> None:
    rows = {**ROWS, "SDFT": {1: ROWS["SDFT"][1], 2: replace(ROWS["SDFT"][2], kl_from_base=None)}}
    assert "KL from base 0.10 of matched SFT's" in verdicts(rows)[0]


def test_results_survive_a_file_and_become_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": to_json(ROWS)}))
    assert from_json(path) == ROWS
    plot(ROWS, tmp_path / "results.svg")
    assert (tmp_path / "results.svg").read_text().count("<svg") == 1


def test_what_is_there_already_is_not_run_again(tmp_path: Path) -> None:
    ran: list[tuple[str, int, list[str]]] = []

    def arm(name: str, *, seeded: bool = True) -> Arm:
        def run(bench: Any, seed: int, so_far: dict[str, Scores]) -> dict[str, Scores]:
            ran.append((name, seed, sorted(so_far)))
            return {name: scores(seed, 0, 0, 0, 0.0)}

        return Arm(name, run, seeded)

    bench: Any = None
    arms = [arm("base", seeded=False), arm("SDFT")]
    run_arms(bench, arms, [1], tmp_path / "results.json", {"of": "a test"})
    rows = run_arms(bench, [*arms, arm("CPT")], [1, 2], tmp_path / "results.json", {"of": "a test"})
    assert ran == [("base", 1, []), ("SDFT", 1, ["base"]), ("CPT", 1, ["SDFT", "base"]), ("SDFT", 2, []), ("CPT", 2, ["SDFT"])]
    assert {name: sorted(by_seed) for name, by_seed in rows.items()} == {"base": [1], "SDFT": [1, 2], "CPT": [1, 2]}


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    before = json.dumps({"settings": settings_of(short=False) | {"answer_tokens": 7}, "machines": [], "rows": {}})
    path.write_text(before)
    monkeypatch.setattr(sys, "argv", ["learning", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        learning.main()
    assert "holds results of other settings" in capsys.readouterr().err
    assert path.read_text() == before


def test_every_arm_has_a_name_of_its_own() -> None:
    assert len({arm.name for arm in ARMS}) == len(ARMS)


class Written(Exception):
    pass


def test_offline_answers_are_asked_of_the_teacher(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = object.__new__(Bench)  # without the real model
    bench.model_dir = tiny_model_dir
    with (DATA_DIR / "demonstrations.jsonl").open("rb") as lines:
        bench.demonstrations = read_dataset(lines)[0]
    asked: list[list[int]] = []

    def write(model: Any, decodings: list[Decoding]) -> None:
        asked.extend(each.prompt_ids for each in decodings)
        raise Written

    monkeypatch.setattr(arms, "decode_all", write)
    with pytest.raises(Written):
        arms.offline_distillation(bench, 1, {})
    chat = ChatFormat.from_directory(tiny_model_dir)
    rows = len(bench.demonstrations)
    assert asked[:rows] == asked[rows : 2 * rows] == [chat.teacher_prompt_ids(each, VIEW) for each in bench.demonstrations]


def test_matched_sft_is_the_first_checkpoint_that_knows_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows one more trained question every four steps, and SDFT knew three."""
    state = SimpleNamespace(step=0)

    def take(session: Any, steps: int) -> float:
        state.step += steps
        return 1.0

    class Learner:
        @contextmanager
        def session(self, *_: Any) -> Iterator[Any]:
            yield SimpleNamespace(state=state, total_steps=6 * arms.MATCH_EVERY_STEPS, model=None)

        def learned(self, model: Any) -> Scores:
            return Scores(Count(state.step // 4, 24), Count(0, 48))

        def scores(self, model: Any) -> Scores:
            return Scores(Count(state.step // 4, 24), Count(0, 48))

    monkeypatch.setattr(arms, "take_steps", take)
    found = arms.sft("SFT").run(Learner(), 1, {"SDFT": scores(3, 0, 0, 0, 0.0)})  # type: ignore[arg-type]
    steps = next(step for step in range(0, 6 * arms.MATCH_EVERY_STEPS + 1, arms.MATCH_EVERY_STEPS) if step // 4 >= 3)
    assert 0 < steps < 6 * arms.MATCH_EVERY_STEPS
    assert (found["SFT, matched"].extra["step"], found["SFT, matched"].trained.right) == (steps, steps // 4)
    assert found["SFT"].extra["seconds"] == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_run_of_the_real_model(tmp_path: Path) -> None:
    """Two steps of each kind of arm, three questions of each kind: that it works, not that it learns."""
    names = ["teacher", "oracle retrieval", "SDFT, anchored", "SFT, lr 0.001", "offline distillation", "CPT", "SFT, then restoration"]
    command = [sys.executable, "-m", "benchmarks.learning", "--short", "--out", str(tmp_path), "--arms", *names]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # of the tests, which run side by side
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = from_json(tmp_path / "results.json")
    assert rows.keys() == {"base", *names}
    assert rows["base"][1].kl_from_base == pytest.approx(0, abs=1e-6)
    assert rows["base"][1].retained is not None
    assert rows["teacher"][1].trained.right >= 1  # shown the answer, even a small model knows some of three
    trained = [rows[name][1].kl_from_base for name in names[2:]]
    assert all(value is not None and value > 0 for value in trained)
    page = (tmp_path / "results.md").read_text()
    assert all(f"| {name}" in page for name in names)
    assert (tmp_path / "results.svg").stat().st_size > 1000
