import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft_engine.contract.dataset import (
    MAX_REPORTED_PROBLEMS,
    DatasetLimits,
    DatasetProblem,
    DatasetReader,
    Demonstration,
    parse_line,
    read_dataset,
    summarise_problems,
)

LIMITS = DatasetLimits(max_line_bytes=5000, max_lines=20, max_messages=6, max_json_depth=12)
USER = {"role": "user", "content": "Which lamp?"}
ANSWER = {"role": "assistant", "content": "The red one."}
RESULT = {"role": "tool", "content": "on", "tool_call_id": "c1"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def line(*messages: Any, **keys: Any) -> bytes:
    return json.dumps({"messages": list(messages), **keys}).encode()


def parse(raw: bytes | dict[str, Any]) -> Demonstration | DatasetProblem:
    return parse_line(raw if isinstance(raw, bytes) else json.dumps(raw).encode(), 13, LIMITS)


GOOD_LINES: dict[str, tuple[bytes | dict[str, Any], Demonstration]] = {
    "messages": (line(USER, ANSWER), Demonstration(13, [USER], ANSWER)),
    "prompt and completion": ({"prompt": "Which lamp?", "completion": "The red one."}, Demonstration(13, [USER], ANSWER)),
    "context": (line(USER, ANSWER, context="Lamps are red."), Demonstration(13, [USER], ANSWER, None, "Lamps are red.")),
    "nulls for what is absent": (line(USER, ANSWER, context=None, tools=None), Demonstration(13, [USER], ANSWER)),
    "tools": (line(USER, ANSWER, tools=[{"type": "function"}]), Demonstration(13, [USER], ANSWER, [{"type": "function"}])),
    "no tools in the list": (line(USER, ANSWER, tools=[]), Demonstration(13, [USER], ANSWER)),
    "several turns": (line(USER, ANSWER, USER, ANSWER), Demonstration(13, [USER, ANSWER, USER], ANSWER)),
    "empty system message": (
        line({"role": "system", "content": ""}, USER, ANSWER),
        Demonstration(13, [{"role": "system", "content": ""}, USER], ANSWER),
    ),
    "tool calls instead of content": (
        line(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        Demonstration(13, [USER], {"role": "assistant", "content": None, "tool_calls": [CALL]}),
    ),
    "tool calls beside empty content": (
        line(USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        Demonstration(13, [USER], {"role": "assistant", "content": "", "tool_calls": [CALL]}),
    ),
    "tool that returned nothing": (
        line({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "", "tool_call_id": "c1"}, ANSWER),
        Demonstration(13, [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "", "tool_call_id": "c1"}], ANSWER),
    ),
    "weight of an earlier turn": (line(USER, ANSWER | {"weight": 0}, USER, ANSWER), Demonstration(13, [USER, ANSWER | {"weight": 0}, USER], ANSWER)),
    "whole surrogate pair": (
        b'{"prompt": "Which lamp? \\ud83d\\udca1", "completion": "The red one."}',
        Demonstration(13, [{"role": "user", "content": "Which lamp? 💡"}], ANSWER),
    ),
    "a document alone": (line(USER, context="Lamps are red."), Demonstration(13, [USER], None, context="Lamps are red.")),
    "a document alone, short form": (
        {"prompt": "Which lamp?", "context": "Red."},
        Demonstration(13, [{"role": "user", "content": "Which lamp?"}], None, context="Red."),
    ),
    "feedback alone": (line(USER, feedback="Not blue."), Demonstration(13, [USER], None, feedback="Not blue.")),
    "everything": (
        line(USER, ANSWER, context="Red.", attempt="Blue?", feedback="Not blue."),
        Demonstration(13, [USER], ANSWER, None, "Red.", "Blue?", "Not blue."),
    ),
    "the last answer that counts": (line(USER, ANSWER, USER, ANSWER | {"weight": 0}), Demonstration(13, [USER], ANSWER)),
    "the last answer that counts, of three": (
        line(USER, ANSWER | {"weight": 1}, USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 0}),
        Demonstration(13, [USER], ANSWER | {"weight": 1}),
    ),
    "a context and a tool's result": (line(USER, CALLS, RESULT, context="Red."), Demonstration(13, [USER, CALLS, RESULT], None, context="Red.")),
}


@pytest.mark.parametrize(("raw", "expected"), GOOD_LINES.values(), ids=GOOD_LINES)
def test_usable_lines(raw: bytes | dict[str, Any], expected: Demonstration) -> None:
    assert parse(raw) == expected


BAD_LINES: list[tuple[str, bytes | dict[str, Any]]] = [
    ("line_too_long", line(USER | {"content": "x" * 5000}, ANSWER)),
    ("invalid_encoding", b'{"prompt": "a\x00b", "completion": "c"}'),
    ("invalid_encoding", '{"prompt": "é", "completion": "c"}'.encode("latin-1")),
    ("invalid_encoding", '{"prompt": "a", "completion": "c"}'.encode("utf-16")),
    ("invalid_encoding", b'{"prompt": "\xed\xa0\x80", "completion": "c"}'),
    ("invalid_encoding", b'{"prompt": "half \\ud83d", "completion": "c"}'),
    ("invalid_encoding", b'{"messages": [{"role": "user", "content": "a", "name": "\\udca1"}, {"role": "assistant", "content": "b"}]}'),
    ("invalid_encoding", b'{"\\ud83d": 1}'),
    ("invalid_json", b"not json"),
    ("invalid_json", b'{"prompt": "a"'),
    ("invalid_json", b'{"prompt": NaN, "completion": "c"}'),
    ("invalid_json", b'{"prompt": "a", "completion": "c"} {"second": 1}'),
    ("invalid_json", b'{"prompt": ' + b"9" * 4900 + b"}"),
    ("invalid_json", b"\xef\xbb\xbf{}"),
    ("json_too_deep", b'{"messages": ' + b"[" * 13 + b"]" * 13 + b"}"),
    ("invalid_json", b'{"prompt": "a", "completion": "b", "tools": [{"x": 1e400}]}'),
    ("invalid_weight", line(USER, ANSWER | {"content": None, "tool_calls": [{"function": {"name": "f"}}], "weight": "abc"})),
    ("data_type", b"[1, 2]"),
    ("data_type", b'"text"'),
    ("data_type", b"null"),
    ("data_type", b"7"),
    ("unrecognized_key", {"prompt": "a", "completion": "b", "answer": "c"}),
    ("invalid_hint", line(USER, ANSWER, context="  ")),
    ("invalid_hint", line(USER, ANSWER, context=["a"])),
    ("invalid_hint", line(USER, ANSWER, feedback="")),
    ("invalid_hint", line(USER, ANSWER, feedback=1)),
    ("invalid_hint", line(USER, ANSWER, attempt="Blue?")),
    ("invalid_hint", line(USER, ANSWER, attempt="Blue?", context="Lamps are red.")),
    ("invalid_hint", line(USER, ANSWER, attempt=" ", feedback="No.")),
    ("example_missing_assistant_message", line(USER, ANSWER | {"weight": 0}, context="Lamps are red.")),
    ("example_missing_assistant_message", line(USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 0})),
    ("missing_content", {"prompt": "a", "completion": "", "context": "Lamps are red."}),
    ("missing_prompt", line({"role": "system", "content": "Be brief."}, context="Lamps are red.")),
    ("invalid_tools", line(USER, ANSWER, tools={"type": "function"})),
    ("invalid_tools", line(USER, ANSWER, tools=["look"])),
    ("ambiguous_line", line(USER, ANSWER, prompt="a", completion="b")),
    ("missing_content", {"prompt": "a"}),
    ("missing_content", {"completion": "a"}),
    ("missing_content", {"prompt": "a", "completion": " "}),
    ("missing_content", {"prompt": ["a"], "completion": "b"}),
    ("missing_messages_list", {}),
    ("missing_messages_list", {"messages": []}),
    ("missing_messages_list", {"messages": {"role": "user"}}),
    ("missing_messages_list", {"messages": None}),
    ("too_many_messages", line(*[USER] * 6, ANSWER)),
    ("data_type", line("Which lamp?", ANSWER)),
    ("message_missing_key", line({"content": "a"}, ANSWER)),
    ("message_missing_key", line({"role": "user"}, ANSWER)),
    ("message_unrecognized_key", line(USER | {"text": "a"}, ANSWER)),
    ("unrecognized_role", line(USER | {"role": "human"}, ANSWER)),
    ("unrecognized_role", line(USER | {"role": ["user"]}, ANSWER)),
    ("invalid_tool_calls", line(USER | {"tool_calls": [CALL]}, ANSWER)),
    ("invalid_tool_calls", line(USER, {"role": "assistant", "tool_calls": []})),
    ("invalid_tool_calls", line(USER, {"role": "assistant", "tool_calls": ["look"]})),
    ("invalid_tool_calls", line(USER, {"role": "assistant", "tool_calls": CALL})),
    ("data_type", line(USER | {"content": [{"type": "text", "text": "a"}]}, ANSWER)),
    ("missing_content", line(USER | {"content": None}, ANSWER)),
    ("missing_content", line(USER | {"content": ""}, ANSWER)),
    ("missing_content", line(USER | {"content": 7}, ANSWER)),
    ("missing_content", line(USER, ANSWER | {"content": ""})),
    ("missing_content", line(USER | {"content": " \n"}, ANSWER)),
    ("missing_content", line(USER, ANSWER | {"content": "   "})),
    ("unrecognized_key", {"x" * 4_000: 1}),
    ("message_unrecognized_key", line(USER | {"x" * 4_000: 1}, ANSWER)),
    ("unrecognized_role", line(USER | {"role": "x" * 4_000}, ANSWER)),
    ("invalid_weight", line(USER, ANSWER | {"weight": 0.5})),
    ("invalid_weight", line(USER, ANSWER | {"weight": "1"})),
    ("invalid_weight", line(USER, ANSWER | {"weight": True})),
    ("example_missing_assistant_message", line(USER)),
    ("example_missing_assistant_message", line(USER, ANSWER, USER)),
    ("example_missing_assistant_message", line(USER, ANSWER | {"weight": 0})),
    ("missing_prompt", line(ANSWER)),
    ("missing_prompt", line({"role": "system", "content": "Be brief."}, ANSWER)),
    ("unsupported_function_call", line(USER, {"role": "assistant", "content": None, "function_call": {"name": "look"}})),
    ("unsupported_function_call", line(USER, {"role": "assistant", "content": None, "function_call": {"name": "look"}}, USER, ANSWER)),
]


@pytest.mark.parametrize(("code", "raw"), BAD_LINES, ids=[f"{number}-{code}" for number, (code, _) in enumerate(BAD_LINES)])
def test_unusable_lines_are_named_by_code_and_number(code: str, raw: bytes | dict[str, Any]) -> None:
    problem = parse(raw)
    assert isinstance(problem, DatasetProblem)
    assert (problem.code, problem.line) == (code, 13)
    assert str(problem).startswith("line 13: ")
    assert len(str(problem)) < 300


@pytest.mark.parametrize("depth", [12, 13, 100, 400, 700, 1_000, 1_900])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_limited_however_deep_it_goes(depth: int, opening: str, closing: str) -> None:
    """Between the limit and what the interpreter's stack can hold lie depths that only a careful check survives."""
    raw = opening * (depth - 1) + "{}" + closing * (depth - 1)
    problem = parse_line(raw.encode(), 1, DatasetLimits(max_json_depth=12))
    assert isinstance(problem, DatasetProblem)
    assert (problem.code == "json_too_deep") == (depth > 12)


def test_message_in_a_conversation_is_named_by_position() -> None:
    problem = parse(line(USER, ANSWER, USER | {"role": "human"}, ANSWER))
    assert isinstance(problem, DatasetProblem)
    assert problem.message.startswith("messages[2].role must be one of system, developer, user,")


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_files_with_bom_blank_lines_and_either_newline(newline: bytes) -> None:
    content = b"\xef\xbb\xbf" + newline.join([line(USER, ANSWER), b"", b"  ", line(USER, ANSWER), b"broken", line(USER, ANSWER)])
    demonstrations, reader = read_dataset(content.splitlines(keepends=True))
    assert [demonstration.line for demonstration in demonstrations] == [1, 4, 6]
    assert [(problem.line, problem.code) for problem in reader.problems] == [(5, "invalid_json")]
    assert reader.line_count == 6


def test_bom_belongs_to_the_first_line_only() -> None:
    _, reader = read_dataset([line(USER, ANSWER), b"\xef\xbb\xbf" + line(USER, ANSWER)])
    assert [problem.line for problem in reader.problems] == [2]


def test_line_limit_is_reported_once_and_the_rest_is_not_parsed() -> None:
    demonstrations, reader = read_dataset([line(USER, ANSWER)] * 22 + [b"broken"] * 3, LIMITS)
    assert len(demonstrations) == 20
    assert [(problem.line, problem.code) for problem in reader.problems] == [(21, "too_many_lines")]
    assert reader.line_count == 25


def test_first_hundred_problems_are_kept_and_all_are_counted() -> None:
    reader = DatasetReader()
    for _ in range(250):
        assert reader.feed(b"broken") is None
    assert reader.problem_count == 250
    assert [problem.line for problem in reader.problems] == list(range(1, MAX_REPORTED_PROBLEMS + 1))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, "line 1: not valid JSON (Expecting value)"),
        (3, "line 1 (also 2, 3): not valid JSON (Expecting value)"),
        (12, "line 1 (also 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more): not valid JSON (Expecting value)"),
        (250, "line 1 (also 2, 3, 4, 5, 6, 7, 8, 9, 10 and 90 more): not valid JSON (Expecting value); and 150 more"),
    ],
)
def test_a_reason_that_lines_share_is_given_once(count: int, expected: str) -> None:
    _, reader = read_dataset([b"broken"] * count)
    assert summarise_problems(reader.problems, reader.problem_count) == expected


def test_summary_names_the_first_reasons_and_counts_the_rest() -> None:
    _, reader = read_dataset([json.dumps({f"key{number}": 1}).encode() for number in range(8)])
    summary = summarise_problems(reader.problems, reader.problem_count)
    assert summary.startswith("line 1: unknown key 'key0'")
    assert summary.count("line ") == 5
    assert summary.endswith("; and 3 more")


@given(st.binary(max_size=200))
def test_no_bytes_can_raise(raw: bytes) -> None:
    assert isinstance(parse(raw), DatasetProblem)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5) | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "messages", "tools", "tool_calls", "weight"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("messages", "prompt", "completion", "tools", "context"), JSON_VALUES)))
def test_no_json_can_raise(value: dict[str, Any]) -> None:
    parsed = parse(json.dumps(value).encode())
    if isinstance(parsed, Demonstration):
        assert parsed.answer["role"] == "assistant"
        assert parsed.prompt
