"""Training lines: what one JSONL line may look like, and every way in which it can be wrong.

A line is `{"messages": [...], "tools"?: [...], "context"?: "..."}` whose last message is the assistant's (the
demonstration), or `{"prompt": "...", "completion": "...", "context"?: "..."}`. A line with a `context`, or with `feedback` on an
earlier `attempt`, may do without an answer: the teacher sees those instead. Problems are collected, never raised
one by one: the caller reports up to `MAX_REPORTED_PROBLEMS` of them with their line numbers. Torch-free; used by the
API while an upload streams, by the worker before a job queues and by the trainer.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sdft_engine.contract.quoting import quoted
from sdft_engine.contract.strict_json import has_lone_surrogate, is_deeper, strictly_parsed

MAX_REPORTED_PROBLEMS = 100
SHOWN_REASONS = 5
SHOWN_LINES = 10
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAY_BE_EMPTY = ("system", "developer", "tool", "function")
MESSAGE_KEYS = frozenset({"role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call"})
HINTS = ("context", "attempt", "feedback")
LINE_KEYS = frozenset({"messages", "tools", "context", "prompt", "completion", "attempt", "feedback", "parallel_tool_calls"})


@dataclass(frozen=True)
class DatasetLimits:
    max_line_bytes: int = 1 << 20
    max_lines: int = 1_000_000
    max_messages: int = 512
    max_json_depth: int = 32


@dataclass(frozen=True)
class DatasetProblem:
    """One reason why a line can't be used. `line` counts from 1; `code` is one of the names in docs/dataset_format.md."""

    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True)
class Demonstration:
    """One usable line: the conversation before the answer, and what only the teacher is shown: at least one of answer,
    context and feedback."""

    line: int
    prompt: list[dict[str, Any]]
    answer: dict[str, Any] | None
    tools: list[dict[str, Any]] | None = None
    context: str | None = None
    attempt: str | None = None
    """An earlier answer of the model, which `feedback` is about."""
    feedback: str | None = None


@dataclass
class DatasetReader:
    """Parses lines as they arrive and keeps count of what was wrong. Feed raw lines without their newline."""

    limits: DatasetLimits = field(default_factory=DatasetLimits)
    line_count: int = 0
    problem_count: int = 0
    problems: list[DatasetProblem] = field(default_factory=list)

    def feed(self, raw: bytes) -> Demonstration | None:
        """Parse one line. Returns None where the line is blank or has a problem (recorded in `problems`)."""
        self.line_count += 1
        line = self.line_count
        if line == 1 and raw.startswith(b"\xef\xbb\xbf"):
            raw = raw[3:]
        raw = raw.removesuffix(b"\r")
        if line == self.limits.max_lines + 1:
            self.report(line, "too_many_lines", f"the file has more than {self.limits.max_lines:,} lines")
        if line > self.limits.max_lines or not raw.strip():
            return None
        parsed = parse_line(raw, line, self.limits)
        if isinstance(parsed, Demonstration):
            return parsed
        self.report(line, parsed.code, parsed.message)
        return None

    def report(self, line: int, code: str, message: str) -> None:
        self.problem_count += 1
        if len(self.problems) < MAX_REPORTED_PROBLEMS:
            self.problems.append(DatasetProblem(line, code, message))


def read_dataset(lines: Iterable[bytes], limits: DatasetLimits | None = None) -> tuple[list[Demonstration], DatasetReader]:
    """Read a whole file. Returns the usable demonstrations, and the reader with the problems of the others."""
    reader = DatasetReader(limits or DatasetLimits())
    demonstrations = [d for d in (reader.feed(raw.rstrip(b"\n")) for raw in lines) if d is not None]
    return demonstrations, reader


def summarise_problems(problems: list[DatasetProblem], problem_count: int) -> str:
    """One message naming the lines, for the `message` of an error (which is all that the stock client shows). A reason that
    several lines share is given once."""
    lines_of: dict[str, list[int]] = {}
    for problem in problems:
        lines_of.setdefault(problem.message, []).append(problem.line)
    shown = list(lines_of.items())[:SHOWN_REASONS]
    told = sum(len(lines) for _, lines in shown)
    parts = [f"{_named(lines)}: {message}" for message, lines in shown] + ([f"and {problem_count - told} more"] if problem_count > told else [])
    return "; ".join(parts)


def _named(lines: list[int]) -> str:
    if len(lines) == 1:
        return f"line {lines[0]}"
    also = ", ".join(map(str, lines[1:SHOWN_LINES]))
    more = f" and {len(lines) - SHOWN_LINES} more" if len(lines) > SHOWN_LINES else ""
    return f"line {lines[0]} (also {also}{more})"


def parse_line(raw: bytes, line: int, limits: DatasetLimits) -> Demonstration | DatasetProblem:
    """Parse and check one line of bytes."""
    if len(raw) > limits.max_line_bytes:
        return DatasetProblem(line, "line_too_long", f"the line is longer than {limits.max_line_bytes:,} bytes")
    if b"\x00" in raw:
        return DatasetProblem(line, "invalid_encoding", "the line holds a NUL byte; the file must be UTF-8 text")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return DatasetProblem(line, "invalid_encoding", f"not valid UTF-8 at byte {error.start} of the line")
    try:
        value = strictly_parsed(text)
        too_deep = is_deeper(value, limits.max_json_depth)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return DatasetProblem(line, "invalid_json", f"not valid JSON ({reason})")
    except RecursionError:
        return DatasetProblem(line, "json_too_deep", f"JSON nested deeper than {limits.max_json_depth} levels")
    if too_deep:
        return DatasetProblem(line, "json_too_deep", f"JSON nested deeper than {limits.max_json_depth} levels")
    if "\\u" in text and has_lone_surrogate(value):
        return DatasetProblem(line, "invalid_encoding", "the text holds half of a surrogate pair")
    return _parse_value(value, line, limits)


def _parse_value(value: Any, line: int, limits: DatasetLimits) -> Demonstration | DatasetProblem:
    if not isinstance(value, dict):
        return DatasetProblem(line, "data_type", f"the line must be a JSON object, not {_json_type(value)}")
    if unknown := sorted(set(value) - LINE_KEYS):
        return DatasetProblem(
            line, "unrecognized_key", f"unknown key {quoted(unknown[0])}; known are messages, tools, context, attempt, feedback, prompt, completion"
        )
    tools = value.get("tools")
    hints = {name: value.get(name) for name in HINTS}
    for name, hint in hints.items():
        if hint is not None and not (isinstance(hint, str) and hint.strip()):
            return DatasetProblem(line, "invalid_hint", f'"{name}" must be a non-empty string')
    if hints["attempt"] is not None and hints["feedback"] is None:
        return DatasetProblem(line, "invalid_hint", '"attempt" is shown together with "feedback", which this line lacks')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return DatasetProblem(line, "invalid_tools", '"tools" must be a list of objects')
    if "messages" in value and ("prompt" in value or "completion" in value):
        return DatasetProblem(line, "ambiguous_line", 'give "messages" or "prompt" and "completion", not both')
    if "prompt" in value or "completion" in value:
        messages: Any = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            if key == "completion" and value.get(key) is None and (hints["context"] or hints["feedback"]):
                continue
            if not isinstance(value.get(key), str) or not value[key].strip():
                unless = " (only a line with context or feedback may do without)" if key == "completion" else ""
                return DatasetProblem(line, "missing_content", f'"{key}" must be a non-empty string{unless}')
            messages.append({"role": role, "content": value[key]})
    else:
        messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        return DatasetProblem(line, "missing_messages_list", '"messages" must be a non-empty list')
    if len(messages) > limits.max_messages:
        return DatasetProblem(line, "too_many_messages", f"more than {limits.max_messages} messages")
    for position, message in enumerate(messages):
        if problem := _message_problem(message, line, f"messages[{position}]"):
            return problem
    return _split_conversation(messages, line, tools or None, hints)


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _message_problem(message: Any, line: int, where: str) -> DatasetProblem | None:
    if not isinstance(message, dict):
        return DatasetProblem(line, "data_type", f"{where} must be an object, not {_json_type(message)}")
    if "role" not in message:
        return DatasetProblem(line, "message_missing_key", f'{where} has no "role"')
    if unknown := sorted(set(message) - MESSAGE_KEYS):
        return DatasetProblem(line, "message_unrecognized_key", f"{where} has the unknown key {quoted(unknown[0])}")
    role = message["role"]
    if role not in ROLES:
        return DatasetProblem(line, "unrecognized_role", f"{where}.role must be one of {', '.join(ROLES)}, not {quoted(role)}")
    calls = message.get("tool_calls")
    if calls is not None and not (role == "assistant" and isinstance(calls, list) and calls and all(isinstance(c, dict) for c in calls)):
        return DatasetProblem(line, "invalid_tool_calls", f"{where}.tool_calls must be a non-empty list on an assistant message")
    if message.get("function_call") is not None:
        return DatasetProblem(line, "unsupported_function_call", f'{where}: the deprecated "function_call" is not supported; use "tool_calls"')
    if isinstance(message.get("weight"), bool) or message.get("weight") not in (None, 0, 1):
        return DatasetProblem(line, "invalid_weight", f"{where}.weight must be 0 or 1")
    content = message.get("content")
    if isinstance(content, list):
        return DatasetProblem(line, "data_type", f"{where}.content must be a string; content parts are not supported")
    if content is None and calls:
        return None
    if content is None:
        code = "missing_content" if "content" in message else "message_missing_key"
        return DatasetProblem(line, code, f'{where} has no "content"')
    if not isinstance(content, str) or not (content.strip() or calls or role in MAY_BE_EMPTY):
        return DatasetProblem(line, "missing_content", f"{where}.content must be a non-empty string")
    return None


def _split_conversation(
    messages: list[dict[str, Any]], line: int, tools: list[dict[str, Any]] | None, hints: dict[str, str | None]
) -> Demonstration | DatasetProblem:
    """The last assistant message that counts is the demonstration: later ones of weight 0 are dropped with what led to them."""
    last = len(messages) - 1
    while last >= 0 and messages[last]["role"] == "assistant" and messages[last].get("weight") == 0:
        last = next((at for at in range(last - 1, -1, -1) if messages[at]["role"] == "assistant"), -1)
    if last < 0:
        return DatasetProblem(line, "example_missing_assistant_message", "every assistant message has weight 0, so nothing would be learned")
    answer = messages[last] if messages[last]["role"] == "assistant" else None
    if answer is None and not (hints["context"] or hints["feedback"]):
        return DatasetProblem(
            line,
            "example_missing_assistant_message",
            f"the last message must be the assistant's (the demonstration), not the {messages[last]['role']}'s, unless the line has context or feedback",
        )
    prompt = messages[:last] if answer else messages
    if not any(message["role"] in ("user", "tool", "function") for message in prompt):
        return DatasetProblem(line, "missing_prompt", "there is no user message before the demonstration")
    return Demonstration(line, prompt, answer, tools, **hints)
