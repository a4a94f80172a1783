import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.descriptors import NEEDED, WANTED
from core.settings import Settings

MakeSettings = Callable[..., Settings]

RAISED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from api.descriptors import allow_enough_descriptors
allow_enough_descriptors()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limits_after(soft: int, hard: int) -> tuple[list[int], list[str]]:
    """In a process of its own, since a limit can't be raised again; and its warnings' events."""
    run = subprocess.run([sys.executable, "-c", RAISED, str(soft), str(hard)], capture_output=True, text=True, check=True)
    *warnings, limits = run.stdout.splitlines()
    return [int(number) for number in limits.split()], [line for line in (*warnings, *run.stderr.splitlines()) if "few_descriptors_allowed" in line]


@pytest.mark.parametrize(("soft", "hard", "expected"), [(256, WANTED * 2, WANTED), (WANTED + 1, WANTED * 2, WANTED + 1), (256, NEEDED, NEEDED)])
def test_the_limit_is_raised_as_far_as_the_system_allows(soft: int, hard: int, expected: int) -> None:
    assert limits_after(soft, hard) == ([expected, hard], [])


def test_too_few_are_told_of() -> None:
    limits, warnings = limits_after(256, 512)
    assert limits == [512, 512]
    assert len(warnings) == 1


def test_the_service_raises_its_own(make_settings: MakeSettings, sqlite_url: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        with TestClient(create_app(make_settings(database_url=sqlite_url))):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (WANTED, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
