"""docs/api.md lists every route, hyperparameter, metric and error code that the code has, and no other."""

import re
from pathlib import Path
from typing import get_args

from fastapi.routing import iter_route_contexts
from pydantic_core.core_schema import ErrorType

from api.app import app
from core import errors
from sdft_engine.contract import errors as engine_errors
from sdft_engine.contract.hyperparameters import FIELDS_NOT_YET_AVAILABLE, NOT_YET_AVAILABLE, SdftHyperparameters, SupervisedHyperparameters
from sdft_engine.contract.metrics import StepMetrics

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "api.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def without_converters(path: str) -> str:
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", path)


def test_every_route_is_documented() -> None:
    existing = {f"{method} {without_converters(route.path)}" for route in iter_route_contexts(app.routes) for method in route.methods or () if method != "HEAD"}
    assert set(re.findall(r"^\| `([A-Z]+ /[^`]*)`", section("Routes"), flags=re.MULTILINE)) == existing


def test_hyperparameters_are_documented_with_their_defaults() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", section("Hyperparameters"), flags=re.MULTILINE))
    assert set(rows) == set(SdftHyperparameters.model_fields)
    for name, field in SdftHyperparameters.model_fields.items():
        shown = (
            str(field.default).lower() if isinstance(field.default, bool) else f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        )
        assert rows[name] == shown, name


def test_supervised_hyperparameters_are_documented() -> None:
    sentence = section("Hyperparameters").split("`method.supervised.hyperparameters` takes")[1]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(SupervisedHyperparameters.model_fields)


def test_what_is_not_yet_available_is_marked_so() -> None:
    lines = [line for line in section("Hyperparameters").replace("\n`", " `").split("\n") if "ot yet available" in line]
    marked = " ".join(lines)
    values = [value for values in NOT_YET_AVAILABLE.values() for value in values]
    assert [name for name in (*FIELDS_NOT_YET_AVAILABLE, *values) if not re.search(rf'[`"]{name}[`"]', marked)] == []


def test_every_metric_is_documented() -> None:
    names = re.findall(r"^\| (`[^|]*) \|", section("Metrics of a step"), flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(names))) == set(StepMetrics.model_fields)


def test_every_error_code_is_documented() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.ServiceError)]
    rows = re.findall(r"^\| (\d{3}) \| ([^|]*) \|", section("Errors"), flags=re.MULTILINE)
    documented = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert documented == {(error.status, error.default_code) for error in classes if error.default_code and error is not errors.ServiceError}


def test_every_code_of_a_failed_job_is_documented() -> None:
    """Those of the engine's errors, and those that stand as literals in worker and core."""
    documented = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \| [A-Z]", section("Errors"), flags=re.MULTILINE))))
    engine = {value.code for value in vars(engine_errors).values() if isinstance(value, type) and issubclass(value, engine_errors.EngineError)}
    assert engine <= documented
    sources = "".join(path.read_text() for room in ("worker", "core/jobs") for path in (ROOT / room).glob("*.py"))
    assert set(re.findall(r"""(?:code=|"code": )"(\w+)\"""", sources)) <= documented


def test_every_code_that_stands_as_a_literal_is_documented() -> None:
    """pydantic's own codes are documented as such."""
    paths = [path for room in ("api", "core") for path in (ROOT / room).rglob("*.py")]
    literals = {code for path in paths for code in re.findall(r'code="([a-z_]+)"', path.read_text())}
    assert len(literals) > 30
    of_pydantic = set(get_args(ErrorType))
    assert sorted(code for code in literals - of_pydantic if f"`{code}`" not in TEXT) == []
