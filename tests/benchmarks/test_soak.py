"""benchmarks.soak: what counts as growth, and what is said of it; and a few minutes of the real thing."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak_parts.trends import MIB, Sample, Sampler, trend_of


def samples(rss: Callable[[float], float], descriptors: Callable[[float], float] = lambda at: 20, count: int = 300) -> list[Sample]:
    return [Sample(at, int(rss(at)), int(descriptors(at)), 5, 0) for at in map(float, range(count))]


def test_growth_is_that_after_the_warm_up() -> None:
    trend = trend_of("api", samples(lambda at: 100 * MIB + min(at, 90) * MIB))
    assert abs(trend.grown_bytes) < MIB
    assert trend.faults == []


def test_what_grows_is_a_fault() -> None:
    (fault,) = trend_of("api", samples(lambda at: 100 * MIB + at * MIB / 10)).faults
    assert "memory grew by 19.9 MiB (at most 8.0)" in fault
    (fault,) = trend_of("api", samples(lambda at: 100 * MIB, lambda at: 20 + at / 20)).faults
    assert "descriptors grew by" in fault


def test_a_large_process_may_breathe() -> None:
    assert trend_of("inference", samples(lambda at: 1000 * MIB + at * MIB / 10)).faults == []
    assert trend_of("inference", samples(lambda at: 1000 * MIB + at * MIB / 2)).faults != []
    assert trend_of("api", samples(lambda at: 100 * MIB + at % 10 * MIB)).faults == [], "up and down is no growth"


def test_a_few_samples_are_no_trend() -> None:
    with pytest.raises(ValueError, match="api: 6 samples"):
        trend_of("api", samples(lambda at: MIB, count=9))


def test_a_sampler_sees_this_process_grow() -> None:
    sampler = Sampler({"this": os.getpid(), "gone": os.getpid()}, 0.02)
    sampler.start()
    time.sleep(0.2)
    opened = [open(os.devnull) for _ in range(50)]  # noqa: SIM115
    held = b"x" * (64 * MIB)
    time.sleep(0.3)
    sampler.stop()
    first, last = sampler.samples["this"][0], sampler.samples["this"][-1]
    assert last.descriptors >= first.descriptors + 50
    assert last.rss_bytes > first.rss_bytes + len(held) // 2
    for file in opened:
        file.close()


def test_processes_that_end_are_told_of() -> None:
    assert soak.ends_of({"api": 2**22 - 1}) == {"api ended": 1}


def test_the_page_tells_growth_and_errors(tmp_path: Path) -> None:
    of_process = samples(lambda at: 100 * MIB + at * MIB / 10)
    trend = trend_of("api", of_process)
    soak.write(tmp_path, {"api": of_process}, [trend], {"chats": 1200}, {"_chat: status 500": 2}, 30, "sqlite")
    page = (tmp_path / "soak.md").read_text()
    assert "1,200 chats. Errors: 2 _chat: status 500." in page
    assert "| api | 119.9 | 19.9 |" in page
    assert "- api: memory grew" in page


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs(tmp_path: Path, real_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute and a half, too short to say anything about growth: no error."""
    monkeypatch.setattr("benchmarks.soak_parts.trends.Trend.faults", property(lambda trend: []))
    status = soak.main(["--minutes", "1.5", "--out", str(tmp_path)])
    assert (status, capsys.readouterr().out.count("FAULT")) == (0, 0)
    assert "Errors: none." in (tmp_path / "soak.md").read_text()
