import json
import os
import subprocess
import sys

PROGRAM = """
import logging, structlog
from core.logging import configure_logging, get_logger
from core.settings import get_settings
configure_logging(get_settings())
log = get_logger("worker.supervisor")
log.debug("unseen")
with structlog.contextvars.bound_contextvars(job_id="ftjob-1"):
    log.warning("lease_lost", attempt=2)
    logging.getLogger("uvicorn").info("a library's line %s", 7)
try:
    raise RuntimeError("boom")
except RuntimeError:
    log.exception("broken")
"""


def output_of(**environment: str) -> tuple[str, str]:
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True, timeout=60)
    return result.stdout, result.stderr


def test_json_lines_on_standard_error_carry_what_is_bound() -> None:
    stdout, stderr = output_of()
    assert stdout == ""
    own, library, broken = (json.loads(line) for line in stderr.splitlines())
    assert (own["event"], own["level"], own["logger"], own["attempt"], own["job_id"]) == ("lease_lost", "warning", "worker.supervisor", 2, "ftjob-1")
    assert own["timestamp"].endswith("Z")
    assert (library["event"], library["level"], library["logger"], library["job_id"]) == ("a library's line 7", "info", "uvicorn", "ftjob-1")
    assert "job_id" not in broken
    assert "RuntimeError: boom" in broken["exception"]


def test_level_and_format_are_settings() -> None:
    _, stderr = output_of(SDFT_LOG_LEVEL="error", SDFT_LOG_FORMAT="console")
    assert "lease_lost" not in stderr
    assert "broken" in stderr
    assert not stderr.startswith("{")
