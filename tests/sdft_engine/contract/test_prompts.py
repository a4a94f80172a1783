"""ChatFormat against transformers' own rendering, on templates of the kinds that real models ship."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.processors import TemplateProcessing

from sdft_engine.contract.dataset import Demonstration
from sdft_engine.contract.errors import BaseModelError, ConfigurationError, ContextExceeded
from sdft_engine.contract.prompts import ChatFormat, eos_token_ids, template_source
from tests.tiny_model import CHAT_TEMPLATE

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Which lamp?\n"}
ANSWER = {"role": "assistant", "content": " The red one; it's 5 < 6 & 'so' on, naïvely 💡. "}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"lamp": "röd", "deep": [1, None, True]}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": '{"state": "on"}', "tool_call_id": "c1"}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look at <a> lamp.", "parameters": {"type": "object", "properties": {}}}}]

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one question": ([USER], None),
    "system": ([SYSTEM, USER], None),
    "several turns": ([SYSTEM, USER, ANSWER, USER], None),
    "tools": ([USER], TOOLS),
    "system and tools": ([SYSTEM, USER], TOOLS),
    "tool result": ([SYSTEM, USER, CALLING, TOOL], TOOLS),
    "ends with an answer": ([USER, ANSWER], None),
    "special tokens in the text": ([{"role": "user", "content": "a<|im_end|>\n<|im_start|>system\nb"}], None),
}

TEMPLATES = {
    "chatml with tools": CHAT_TEMPLATE,
    "bos, trimming and a namespace": """{{ bos_token }}{% set state = namespace(first=true) %}
    {% for message in messages %}
        {% if state.first %}{% set state.first = false %}[FIRST]{% endif %}
[{{ message.role | upper }}] {{ message['content'] | trim }}{{ eos_token if message.role == 'assistant' }}
    {% endfor %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}""",
    "loop controls and a generation block": """{%- for message in messages %}{%- if message.role == 'tool' %}{% continue %}{% endif %}
{%- if message.role == 'assistant' %}<a>{% generation %}{{ message.content }}{% endgeneration %}</a>{% else %}<u>{{ message.content }}</u>{% endif %}
{%- endfor %}{{ '<a>' if add_generation_prompt }}""",
    "json with options": """{%- if tools %}{{ tools | tojson(indent=4) }}{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}{% endif %}
{%- for message in messages %}{{ message | tojson }}{% endfor %}{{ strftime_now('%Y') }}{{ pad_token }}""",
}


def copy_tokenizer(tiny_model_dir: Path, directory: Path, template: str = CHAT_TEMPLATE) -> Path:
    shutil.copytree(tiny_model_dir, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture
def chat(tiny_model_dir: Path) -> ChatFormat:
    return ChatFormat.from_directory(tiny_model_dir)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_rendering_and_tokens_are_those_of_transformers(tiny_model_dir: Path, tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    directory = copy_tokenizer(tiny_model_dir, tmp_path / "model", template)
    ours = ChatFormat.from_directory(directory)
    theirs: Any = AutoTokenizer.from_pretrained(directory)
    for name, (messages, tools) in CONVERSATIONS.items():
        for generate in (True, False):
            expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)
            assert ours.render(messages, tools, generate=generate) == expected, name
        ids = theirs.apply_chat_template(messages, tools=tools, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ours.prompt_ids(messages, tools) == ids, name
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), name


def test_an_answer_ends_as_the_template_ends_it_where_there_are_tools(tiny_model_dir: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}({{ m.role }}){{ m.content }}{{ '#' if tools }}<|im_end|>{% endfor %}{{ '(assistant)' if add_generation_prompt }}"
    chat = ChatFormat.from_directory(copy_tokenizer(tiny_model_dir, tmp_path / "model", template))
    for tools, ending in ((None, ""), (TOOLS, "#")):
        ids = chat.answer_ids(Demonstration(1, [USER], ANSWER, tools))
        assert chat.tokenizer.decode(ids, skip_special_tokens=False) == f"{ANSWER['content']}{ending}<|im_end|>"


def test_an_answer_that_holds_an_end_token_is_refused(chat: ChatFormat) -> None:
    """It would be learned up to there, and nobody would know."""
    demonstration = Demonstration(4, [USER], {"role": "assistant", "content": "Write <|im_end|> at the end."})
    with pytest.raises(ConfigurationError, match=r"line 4: the answer holds <\|im_end\|>, which ends"):
        chat.answer_ids(demonstration)


def calling(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": arguments}}]}


def test_half_a_surrogate_pair_in_arguments_is_refused(chat: ChatFormat) -> None:
    with pytest.raises(ConfigurationError, match="arguments of a tool call hold half of a surrogate pair"):
        chat.prompt_ids([USER, calling('{"a": "\\ud800"}')])


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": 1e999}'])
def test_arguments_that_are_no_json_stay_text(chat: ChatFormat, arguments: str) -> None:
    assert json.dumps(arguments) in chat.render([USER, calling(arguments)])


def test_real_model_renders_as_transformers_does(real_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    ours = ChatFormat.from_directory(real_model_dir)
    theirs: Any = AutoTokenizer.from_pretrained(real_model_dir)
    for name, (messages, tools) in CONVERSATIONS.items():
        ids = theirs.apply_chat_template(messages, tools=tools, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ours.prompt_ids(messages, tools) == ids, name
    assert ours.eos_token_ids == {theirs.convert_tokens_to_ids("<|im_end|>")}


def test_every_end_of_sequence_id_is_known(chat: ChatFormat) -> None:
    assert chat.eos_token_ids == {chat.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert chat.context_length == 512


def test_tool_call_arguments_given_as_text_are_shown_as_objects(chat: ChatFormat) -> None:
    as_text = {**CALL, "function": {"name": "look", "arguments": json.dumps(CALL["function"]["arguments"])}}  # type: ignore[index]
    message = {"role": "assistant", "content": None, "tool_calls": [as_text]}
    assert chat.render([USER, message, TOOL]) == chat.render([USER, CALLING, TOOL])
    broken = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {"name": "look", "arguments": "{not json"}}]}
    assert "{not json" in chat.render([USER, broken, TOOL])


@pytest.mark.parametrize("depth", [64, 65, 900, 100_000])
def test_arguments_are_nested_64_levels_deep_at_most(chat: ChatFormat, depth: int) -> None:
    call = {**CALL, "function": {"name": "look", "arguments": "[" * depth + "]" * depth}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    if depth <= 64:
        assert "[" * depth in chat.render([USER, message])
        return
    with pytest.raises(ConfigurationError, match="deeper than 64 levels") as caught:
        chat.render([USER, message])
    assert caught.value.param == "messages"


def test_arguments_that_only_the_template_finds_too_deep_are_refused(chat: ChatFormat) -> None:
    arguments: list[Any] = []
    for _ in range(5_000):
        arguments = [arguments]
    with pytest.raises(ConfigurationError, match="chat template refuses"):
        chat.render([USER, {**CALLING, "tool_calls": [{**CALL, "function": {"name": "look", "arguments": arguments}}]}])


def test_what_the_template_shows_is_not_refused(chat: ChatFormat) -> None:
    for messages, tools in CONVERSATIONS.values():
        chat.require_shown(messages, tools)
    chat.require_shown([USER, {**ANSWER, "tool_calls": None}])


def test_tools_and_tool_calls_that_the_template_leaves_out_are_refused(real_model_dir: Path) -> None:
    chat = ChatFormat.from_directory(real_model_dir)
    chat.require_shown([USER, {**ANSWER, "tool_calls": None}], [])
    with pytest.raises(ConfigurationError, match="no place for tools") as caught:
        chat.require_shown([USER], TOOLS)
    assert caught.value.param == "tools"
    with pytest.raises(ConfigurationError, match="no place for tool calls") as caught:
        chat.require_shown([USER, CALLING, TOOL])
    assert caught.value.param == "messages"


def test_a_template_that_can_not_do_without_tools_shows_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    template = "{% if not (tools and messages[-1].tool_calls) %}{{ raise_exception('no tools') }}{% endif %}"
    ChatFormat.from_directory(copy_tokenizer(tiny_model_dir, tmp_path / "model", template)).require_shown([USER, CALLING], TOOLS)


def test_the_longest_text_that_could_fit_is_still_counted(chat: ChatFormat, tiny_model_dir: Path, tmp_path: Path) -> None:
    longest = max(chat.tokenizer.get_vocab(), key=len)
    assert len(chat.encode(longest * 512)) <= 512, "a context full of the longest token"
    with pytest.raises(ContextExceeded, match="more tokens than the 512 that the context holds"):
        chat.encode(longest * 512 + "x")
    directory = copy_tokenizer(tiny_model_dir, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = NFC()
    tokenizer.save(str(directory / "tokenizer.json"))
    composed = ChatFormat.from_directory(directory)
    assert len(composed.encode("\u03b1\u0313\u0300\u0345" * 512)) == len(composed.encode("\u1f82" * 512)), "four characters become one"
    assert composed.encode(longest * 2048)
    with pytest.raises(ContextExceeded):
        composed.encode(longest * 2048 + "x")


def test_training_weights_are_not_shown(chat: ChatFormat) -> None:
    assert chat.render([USER, ANSWER | {"weight": 0}, USER]) == chat.render([USER, ANSWER, USER])


def test_answer_ids_continue_the_prompt_up_to_the_end_of_sequence(chat: ChatFormat) -> None:
    demonstration = Demonstration(1, [SYSTEM, USER], ANSWER | {"weight": 1})
    ids = chat.answer_ids(demonstration)
    assert ids[-1] == chat.tokenizer.token_to_id("<|im_end|>")
    assert chat.decode(ids) == ANSWER["content"]
    whole = chat.render([SYSTEM, USER, ANSWER], generate=False)
    assert chat.encode(whole)[: len(chat.student_prompt_ids(demonstration)) + len(ids)] == chat.student_prompt_ids(demonstration) + ids


def test_shortest_answer_keeps_its_end_of_sequence(chat: ChatFormat) -> None:
    expected = [chat.tokenizer.token_to_id("x"), chat.tokenizer.token_to_id("<|im_end|>")]
    assert chat.answer_ids(Demonstration(1, [USER], {"role": "assistant", "content": "x"})) == expected


def test_the_answer_begins_after_the_last_closing_think_tag(chat: ChatFormat) -> None:
    thoughts, answer = "<think>a lamp or two</think>", "x lamp"
    for text in (thoughts, f"{thoughts} then {thoughts}"):
        ids = chat.encode(text)
        start = chat.answer_start(ids + chat.encode(answer))
        assert chat.decode(ids[: start - 1]).count("</think>") < text.count("</think>")
        assert chat.decode(ids[:start]) == text
    assert chat.answer_start(chat.encode(thoughts)) == len(chat.encode(thoughts))
    assert chat.answer_start(chat.encode("<think> a lamp")) == 0
    assert chat.answer_start([]) == 0


def test_tokens_that_a_tokenizer_adds_by_itself_are_not_added_to_a_rendered_chat(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = copy_tokenizer(tiny_model_dir, tmp_path / "model")
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(path))
    assert tokenizer.encode("x").ids[0] == 0
    assert ChatFormat.from_directory(directory).prompt_ids([USER]) == ChatFormat.from_directory(tiny_model_dir).prompt_ids([USER])


def test_answer_of_tool_calls_has_ids_too(chat: ChatFormat) -> None:
    text = chat.decode(chat.answer_ids(Demonstration(1, [USER], CALLING, TOOLS)))
    assert text.startswith('<tool_call>{"name": "look"')


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'never in the history' if add_generation_prompt }}",
        "{{ messages | length }}",
        "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}",
    ],
    ids=["rewritten", "unrelated", "dropped"],
)
def test_answer_that_the_template_can_not_show_names_its_line(tiny_model_dir: Path, tmp_path: Path, template: str) -> None:
    chat = ChatFormat.from_directory(copy_tokenizer(tiny_model_dir, tmp_path / "model", template))
    with pytest.raises(ConfigurationError, match="line 7: "):
        chat.answer_ids(Demonstration(7, [USER], ANSWER))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only user and assistant turns') }}",
        "{{ messages[99].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ {1: 2} | tojson(indent='x', separators=3) }}",
    ],
)
def test_templates_that_refuse_or_break_out_are_an_error_of_the_conversation(tiny_model_dir: Path, tmp_path: Path, template: str) -> None:
    chat = ChatFormat.from_directory(copy_tokenizer(tiny_model_dir, tmp_path / "model", template))
    with pytest.raises(ConfigurationError, match="chat template refuses") as caught:
        chat.render([USER])
    assert caught.value.param == "messages"


def test_template_can_stand_in_the_tokenizer_config(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = copy_tokenizer(tiny_model_dir, tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for value in ("T{{ messages | length }}", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "T{{ messages | length }}"}]):
        path.write_text(json.dumps(config | {"chat_template": value}))
        assert ChatFormat.from_directory(directory).render([USER]) == "T1"
        assert template_source(directory) == "T{{ messages | length }}"
    (directory / "chat_template.jinja").write_text("a file of its own goes first")
    assert template_source(directory) == "a file of its own goes first"


def test_a_directory_may_have_no_chat_template(tmp_path: Path) -> None:
    assert template_source(tmp_path) is None
    for value in (None, "", [], [{"name": "tool_use", "template": "no"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert template_source(tmp_path) is None


def test_ids_that_end_an_answer_are_found_in_three_places(tmp_path: Path) -> None:
    known = {"<end>": 9}
    assert eos_token_ids(tmp_path, known.get) == []
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert eos_token_ids(tmp_path, known.get) == [9]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0, 5]}))
    assert eos_token_ids(tmp_path, known.get) == [7, 0, 5, 9], "the generation config's first, and each once"


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_missing_file_is_named(tiny_model_dir: Path, tmp_path: Path, missing: str) -> None:
    directory = copy_tokenizer(tiny_model_dir, tmp_path / "model")
    (directory / missing).unlink()
    with pytest.raises(BaseModelError, match="can't be read"):
        ChatFormat.from_directory(directory)


def edit(directory: Path, name: str, **changes: Any) -> None:
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def test_unusable_models_are_refused_with_the_reason(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = copy_tokenizer(tiny_model_dir, tmp_path / "no-template")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(BaseModelError, match="no chat template"):
        ChatFormat.from_directory(directory)
    directory = copy_tokenizer(tiny_model_dir, tmp_path / "broken-template", "{% for %}")
    with pytest.raises(BaseModelError, match="not valid jinja"):
        ChatFormat.from_directory(directory)
    directory = copy_tokenizer(tiny_model_dir, tmp_path / "no-context")
    edit(directory, "config.json", max_position_embeddings=None)
    with pytest.raises(BaseModelError, match="max_position_embeddings"):
        ChatFormat.from_directory(directory)
    directory = copy_tokenizer(tiny_model_dir, tmp_path / "no-eos")
    edit(directory, "config.json", eos_token_id=None)
    edit(directory, "generation_config.json", eos_token_id=None)
    edit(directory, "tokenizer_config.json", eos_token=None)
    with pytest.raises(BaseModelError, match="end-of-sequence"):
        ChatFormat.from_directory(directory)
