"""Prompts as token ids: the base model's own chat template, and what the teacher is shown.

Everything that turns messages into token ids goes through `ChatFormat`: student and teacher prompts in the trainer,
token counts in the worker, chat requests in the inference server. There is no second code path that could disagree.

The teacher's prompt is the student's prompt in which the last user turn is replaced according to a template:

- `example`: the question, the demonstration as an example of a response, and the request for a response of one's own
  (the paper's form, arXiv 2601.19897 section 3, in our words);
- `history`: the question and the demonstration as an earlier exchange of the conversation, then the question again;
- `history_twice`: that exchange stands twice; small models copy the demonstration far more reliably from it;
- any text with `{demonstration}`, `{context}` or `{feedback}`, and `{question}` and `{attempt}` as further fields.

Torch-free: jinja2 in its sandbox and the `tokenizers` library.
"""

import bisect
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from sdft_engine.contract.dataset import Demonstration
from sdft_engine.contract.errors import BaseModelError, ConfigurationError, ContextExceeded
from sdft_engine.contract.strict_json import MAX_JSON_DEPTH, has_lone_surrogate, is_deeper, strictly_parsed
from sdft_engine.contract.teacher_prompts import TeacherView, answer_text, require_hint, teacher_messages

MOST_CHARACTERS_COMPOSED = 4
"""No character of Unicode decomposes canonically into more than four, so normalization shortens no text by more than that."""

THINK_END = "</think>"


@dataclass(frozen=True)
class ChatFormat:
    """A base model's tokenizer and chat template.

    `eos_token_ids` holds every id that ends an answer: those of the generation config and the tokenizer's own. `date` is what
    templates that write the date take for today; None: today.
    """

    tokenizer: Tokenizer
    template: jinja2.Template
    eos_token_ids: frozenset[int]
    context_length: int
    special_tokens: dict[str, str]
    date: datetime | None = None

    @classmethod
    def from_directory(cls, model_dir: Path) -> "ChatFormat":
        """Load from a transformers model directory. Raises BaseModelError naming the file that is missing or unusable."""
        try:
            tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
            config = json.loads((model_dir / "config.json").read_text())
            tokenizer_config = json.loads((model_dir / "tokenizer_config.json").read_text())
        except Exception as error:  # the tokenizers library raises bare Exception
            raise BaseModelError(f"the tokenizer in {model_dir} can't be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ends = eos_token_ids(model_dir, tokenizer.token_to_id)
        if not ends:
            raise BaseModelError(f"{model_dir} names no end-of-sequence token")
        context_length = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
        if not context_length:
            raise BaseModelError(f"{model_dir / 'config.json'} has no max_position_embeddings")
        template = template_source(model_dir)
        if template is None:
            raise BaseModelError(f"{model_dir} has no chat template; only instruct models can be served and trained")
        return cls(tokenizer, _compile_template(template), frozenset(ends), context_length, _special_tokens(tokenizer_config))

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, generate: bool = True) -> str:
        """The conversation as text, ending where the assistant's answer starts if `generate`."""
        shown = [_for_template(message) for message in messages]
        try:
            return self.template.render(messages=shown, tools=tools, add_generation_prompt=generate, strftime_now=self._today, **self.special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigurationError(f"the base model's chat template refuses this conversation: {error}", param="messages") from error

    def _today(self, pattern: str) -> str:
        """Some templates write the date into every prompt."""
        return (self.date or datetime.now()).strftime(pattern)

    def require_shown(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> None:
        """Raise ConfigurationError where the template silently leaves out the tools or the tool calls of this conversation."""
        if tools and self._looks_alike(messages, tools, messages, None):
            raise ConfigurationError("this base model's chat template has no place for tools; describe them in a message instead", param="tools")
        if any(message.get("tool_calls") for message in messages):
            bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
            if self._looks_alike(messages, tools, bare, tools):
                raise ConfigurationError("this base model's chat template has no place for tool calls; write them into the content instead", param="messages")

    def _looks_alike(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, fewer_messages: list[dict[str, Any]], fewer_tools: list[dict[str, Any]] | None
    ) -> bool:
        whole = self.render(messages, tools, generate=False)
        try:
            return whole == self.render(fewer_messages, fewer_tools, generate=False)
        except ConfigurationError:  # a template that can't do without them has a place for them
            return False

    @cached_property
    def _most_characters(self) -> int:
        """What a context full of the longest token stands for. A longer text can't fit: a token stands for no more characters
        than it is written with (byte-level vocabularies write one for each byte)."""
        longest = max(len(token) for token in self.tokenizer.get_vocab(with_added_tokens=True))
        return self.context_length * longest * (1 if self.tokenizer.normalizer is None else MOST_CHARACTERS_COMPOSED)

    def encode(self, text: str) -> list[int]:
        """Token ids. Raises ContextExceeded for a text that is certainly too long, before the tokenizer takes memory for it."""
        if len(text) > self._most_characters:
            raise ContextExceeded(f"a text of {len(text):,} characters needs more tokens than the {self.context_length:,} that the context holds")
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def answer_start(self, completion_ids: list[int]) -> int:
        """The first token after the model's thoughts: after the last closing think tag; 0 where there is none."""

        def closed(count: int) -> bool:
            return str(self.tokenizer.decode(completion_ids[:count], skip_special_tokens=False)).count(THINK_END) == tags

        tags = str(self.tokenizer.decode(completion_ids, skip_special_tokens=False)).count(THINK_END)
        return bisect.bisect_left(range(len(completion_ids) + 1), True, key=closed) if tags else 0

    def prompt_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        return self.encode(self.render(messages, tools))

    def question_length(self, question: str) -> int:
        """Tokens of the prompt that asks it alone."""
        return len(self.prompt_ids([{"role": "user", "content": question}]))

    def answer_ids(self, demonstration: Demonstration) -> list[int]:
        """Token ids of the demonstrated answer, up to and including its end-of-sequence token. None where the line has no answer.

        Raises ConfigurationError where the template rewrites the conversation so that the answer is not a suffix.
        """
        if demonstration.answer is None:
            return []
        within = self.eos_token_ids.intersection(self.encode(answer_text(demonstration.answer)))
        if within:
            token = self.tokenizer.id_to_token(min(within))
            raise ConfigurationError(f"line {demonstration.line}: the answer holds {token}, which ends this model's answers: nothing after it would be learned")
        before = self.render(demonstration.prompt, demonstration.tools)
        whole = self.render([*demonstration.prompt, demonstration.answer], demonstration.tools, generate=False)
        if not whole.startswith(before) or not whole[len(before) :].strip():
            raise ConfigurationError(f"line {demonstration.line}: the base model's chat template can't show this answer after its prompt")
        ids = self.encode(whole[len(before) :])
        end = next((position for position, token_id in enumerate(ids) if token_id in self.eos_token_ids), len(ids))
        return ids[: end + 1]

    def student_prompt_ids(self, demonstration: Demonstration) -> list[int]:
        return self.prompt_ids(demonstration.prompt, demonstration.tools)

    def teacher_prompt_ids(self, demonstration: Demonstration, view: TeacherView) -> list[int]:
        """Raises ConfigurationError where the template shows nothing of this line that the student does not see."""
        require_hint(demonstration, view.template)
        return self.prompt_ids(teacher_messages(demonstration, view), demonstration.tools)


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """As chat templates expect: string content, tool-call arguments as objects, no training weights."""
    shown = {key: value for key, value in message.items() if key != "weight"}
    if shown.get("content") is None:
        shown["content"] = ""
    if isinstance(shown.get("tool_calls"), list):
        shown["tool_calls"] = [_parsed_arguments(call) for call in shown["tool_calls"]]
    return shown


def _parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = strictly_parsed(function["arguments"])
        too_deep = is_deeper(arguments, MAX_JSON_DEPTH)
    except ValueError:  # a template may show them as the text that they are
        return call
    except RecursionError:
        too_deep = True
    if not too_deep and has_lone_surrogate(arguments):
        raise ConfigurationError("the arguments of a tool call hold half of a surrogate pair", param="messages")
    if too_deep:
        raise ConfigurationError(f"the arguments of a tool call are JSON nested deeper than {MAX_JSON_DEPTH} levels", param="messages")
    return {**call, "function": {**function, "arguments": arguments}}


def template_source(model_dir: Path) -> str | None:
    """The chat template of a transformers model directory, as text: a file of its own, else what stands in the tokenizer's config;
    where several stand there, the one named "default". None where it has none."""
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    source = _read_if_there(model_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        source = next((item["template"] for item in source if item.get("name") == "default"), None)
    return str(source) if source else None


def eos_token_ids(model_dir: Path, token_to_id: Callable[[str], int | None]) -> list[int]:
    """Every id that ends an answer of the model in this directory: those of its generation config first, then its config's, then the
    tokenizer's own."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_if_there(model_dir / name).get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    own = token_to_id(_special_tokens(_read_if_there(model_dir / "tokenizer_config.json")).get("eos_token", ""))
    return list(dict.fromkeys(found if own is None else [*found, own]))


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    return {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in tokenizer_config.items()
        if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value
    }


def _read_if_there(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for libraries that mask losses by it; here it only groups."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _compile_template(source: str) -> jinja2.Template:
    """The environment that transformers renders chat templates in, from its documented behaviour."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise BaseModelError(f"the chat template is not valid jinja: {error}") from error


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
