"""`method` of a job: what the user wrote, checked name by name, with its defaults filled in.

The result is what the job's row keeps and the worker reads:
`{"type": "sdft", "sdft": {"hyperparameters": {…}, "teacher_template": …, "reasoning": …, "retention_file": …, "sampler": …, "baseline": …}}` or
`{"type": "supervised", "supervised": {"hyperparameters": {…}}}`. Values may still be "auto".
"""

from typing import Any

from pydantic import ValidationError

from api.error_handlers import bad_request
from core.errors import BadRequest
from sdft_engine.contract.errors import ConfigurationError
from sdft_engine.contract.hyperparameters import FIELDS_NOT_YET_AVAILABLE, NOT_YET_AVAILABLE, SdftHyperparameters, SupervisedHyperparameters
from sdft_engine.contract.quoting import quoted, shortened
from sdft_engine.contract.teacher_prompts import check_teacher_template

METHODS = {"sdft": SdftHyperparameters, "supervised": SupervisedHyperparameters}
KNOWN_BUT_REFUSED = ("dpo", "reinforcement")
SDFT_OPTIONS: dict[str, tuple[Any, ...]] = {"sampler": ("auto", "in_process", "vllm"), "baseline": ("none",)}
"""What may stand beside `hyperparameters` in `method.sdft`, with its values, the default first."""
BESIDE_HYPERPARAMETERS = ("teacher_template", "reasoning", "retention_file", *SDFT_OPTIONS)
DEFAULT_TEACHER_TEMPLATE = "example"
MAX_TEMPLATE_LENGTH = 32_768


def resolve_method(method: dict[str, Any] | None, deprecated_hyperparameters: dict[str, Any] | None, default_type: str) -> dict[str, Any]:
    """The complete method object. `deprecated_hyperparameters` is the job's top-level field, for clients that still use it.

    Raises BadRequest naming the field, with the code `not_yet_available` for what this version does not do yet.
    """
    given = _without_nulls(method or {"type": default_type})
    kind = _kind_of(given)
    section = _object(given.get(kind, {}), f"method.{kind}")
    where = f"method.{kind}.hyperparameters"
    hyperparameters = _object(section.pop("hyperparameters", {}), where)
    if deprecated_hyperparameters:
        if hyperparameters:
            raise BadRequest(f"hyperparameters: give them here or in {where}, not in both", code="invalid_value", param="hyperparameters")
        hyperparameters, where = _without_nulls(deprecated_hyperparameters), "hyperparameters"
    resolved = {"hyperparameters": _checked_hyperparameters(kind, hyperparameters, where)}
    return {"type": kind, kind: resolved | _checked_options(kind, section)}


def _kind_of(given: dict[str, Any]) -> str:
    kind = given.get("type")
    if kind is None:
        raise BadRequest("method.type: field required", code="missing", param="method.type")
    if kind in KNOWN_BUT_REFUSED:
        raise BadRequest(f"method.type: this server does not train with {kind!r}; use sdft or supervised", code="unsupported_method", param="method.type")
    if not isinstance(kind, str) or kind not in METHODS:
        raise BadRequest(f"method.type: must be sdft or supervised, not {quoted(kind)}", code="invalid_value", param="method.type")
    for name in given:
        if name not in ("type", kind):
            reason = f"does not belong to the method {kind}" if name in (*METHODS, *KNOWN_BUT_REFUSED) else "unknown field"
            param = f"method.{shortened(name)}"
            raise BadRequest(f"{param}: {reason}", code="unknown_parameter", param=param)
    return kind


def _checked_hyperparameters(kind: str, given: dict[str, Any], where: str) -> dict[str, Any]:
    wire = METHODS[kind]
    for name in given:
        if name not in wire.model_fields:
            param, known = f"{where}.{shortened(name)}", ", ".join(wire.model_fields)
            beside = kind == "sdft" and name in BESIDE_HYPERPARAMETERS
            reason = f"it stands beside hyperparameters, as method.sdft.{name}" if beside else f"unknown hyperparameter; known are {known}"
            raise BadRequest(f"{param}: {reason}", code="unknown_parameter", param=param)
    try:
        return wire.model_validate(given).model_dump()
    except ValidationError as error:
        raise bad_request(error.errors(), given, prefix=where) from error


def _checked_options(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    if kind != "sdft":
        if given:
            raise _unknown_option(kind, next(iter(given)))
        return {}
    for name, value in given.items():
        param = f"method.sdft.{name}"
        if _not_yet(name, value):
            raise _not_yet_available(param, value)
        if name not in BESIDE_HYPERPARAMETERS:
            raise _unknown_option(kind, name)
        if name == "reasoning" and not isinstance(value, bool):
            raise BadRequest(f"{param}: must be true or false, not {quoted(value)}", code="bool_type", param=param)
        if name == "retention_file" and not (isinstance(value, str) and "\x00" not in value):
            raise BadRequest(f"{param}: must be the id of a file, not {quoted(value)}", code="string_type", param=param)
        if name in SDFT_OPTIONS and value not in SDFT_OPTIONS[name]:
            raise BadRequest(f"{param}: must be {' or '.join(SDFT_OPTIONS[name])}, not {quoted(value)}", code="invalid_value", param=param)
    options = {name: given.get(name, values[0]) for name, values in SDFT_OPTIONS.items()}
    template = _checked_template(given.get("teacher_template", DEFAULT_TEACHER_TEMPLATE))
    return {"teacher_template": template, "reasoning": given.get("reasoning", False), "retention_file": given.get("retention_file"), **options}


def _checked_template(template: Any) -> str:
    param = "method.sdft.teacher_template"
    if not isinstance(template, str) or "\x00" in template or len(template) > MAX_TEMPLATE_LENGTH:
        raise BadRequest(f"{param}: must be a text of at most {MAX_TEMPLATE_LENGTH:,} characters", code="invalid_value", param=param)
    try:
        check_teacher_template(template)
    except ConfigurationError as error:
        raise BadRequest(error.message, code="invalid_template", param=error.param) from error
    return template


def _not_yet(name: str, value: Any) -> bool:
    return name in FIELDS_NOT_YET_AVAILABLE or (isinstance(value, str) and value in NOT_YET_AVAILABLE.get(name, ()))


def _not_yet_available(param: str, value: Any) -> BadRequest:
    return BadRequest(f"{param}: {quoted(value)} is not yet available in this version", code="not_yet_available", param=param)


def _unknown_option(kind: str, name: str) -> BadRequest:
    param = f"method.{kind}.{shortened(name)}"
    return BadRequest(f"{param}: unknown field", code="unknown_parameter", param=param)


def _object(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{param}: must be an object", code="dict_type", param=param)
    return _without_nulls(value)


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """A null is a field that was not given."""
    return {name: item for name, item in value.items() if item is not None}
