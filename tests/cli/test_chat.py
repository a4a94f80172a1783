from collections.abc import Callable

from click.testing import Result

from tests.cli.stub_server import Received, StubServer, refusal, stream_answer


def piece(text: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def echo(request: Received) -> tuple[int, dict[str, str], bytes]:
    """Answers with the number of messages and the last of them."""
    messages = request.json["messages"]
    start: dict[str, object] = {"choices": [{"index": 0, "delta": {"role": "assistant"}}]}
    return stream_answer(start, piece(f"{len(messages)}: "), piece(messages[-1]["content"]), {"choices": []}, "[DONE]")


def test_one_question(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = echo
    result = sdft("chat", "base", "hello", "--system", "be kind", "--temperature", "0", "--max-tokens", "5")
    assert (result.exit_code, result.stdout) == (0, "2: hello\n")
    sent = stub.received[-1].json
    assert (sent["model"], sent["stream"], sent["temperature"], sent["max_tokens"]) == ("base", True, 0, 5)
    assert sent["messages"][0] == {"role": "system", "content": "be kind"}


def test_options_that_are_not_given_are_not_sent(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = echo
    sdft("chat", "base", "hello")
    assert set(stub.received[-1].json) == {"model", "messages", "stream"}


def test_a_question_from_standard_input(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = echo
    assert sdft("chat", "base", "-", stdin="two\nlines").stdout == "1: two\nlines\n"


def test_a_conversation_remembers_what_was_said(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = echo
    result = sdft("chat", "base", stdin="first\n\nsecond\n")
    assert (result.exit_code, result.stdout) == (0, "1: first\n3: second\n")
    assert [message["role"] for message in stub.received[-1].json["messages"]] == ["user", "assistant", "user"]
    assert stub.received[-1].json["messages"][1]["content"] == "1: first"


def test_an_unknown_model_is_one_line(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = lambda _: refusal(404, "The model 'x' does not exist", "model_not_found")
    result = sdft("chat", "x", "hello")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: The model 'x' does not exist; see `sdft models list`\n")


def test_answers_cannot_drive_the_terminal(sdft: Callable[..., Result], stub: StubServer) -> None:
    stub.routes["POST /chat/completions"] = lambda _: stream_answer(piece("a\x1b]0;title\x07b"), "[DONE]")
    assert sdft("chat", "base", "hello").stdout == "a]0;titleb\n"
