"""What a chat or completion request may hold. The body for the inference server is rebuilt from these fields alone: nothing
else that a client writes (a chat template, media URLs, paths of adapters) ever gets there.
"""

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from api.strict_json import FIRST_ERROR_ENDS, ObjectId, at_most

NOT_FORWARDED = frozenset({"model", "user", "metadata", "store"})
"""Known fields that change no answer."""


def _refuse(value: Any) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported_parameter", "not supported by this server; leave it out")


def _refuse_all_but_text(value: Any) -> None:
    if value not in (None, ["text"]):
        raise PydanticCustomError("unsupported_parameter", "this server answers with text only")


def _joined_text(content: Any) -> Any:
    """Content parts as one text; parts that are not text would make the inference server fetch what they name."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("unsupported_content", "content parts must be {type: text, text: …}; this server reads text only")
        texts.append(part["text"])
    return "\n".join(texts)


MAX_STOP_STRINGS = 4
"""OpenAI's and vLLM's bound."""
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
MAX_ANSWERS = 1024
MAX_SCHEMA_BYTES = 65_536
RESPONSE_FORMATS = ("text", "json_object", "json_schema")


def _small_enough(value: Any) -> Any:
    """An inference server compiles schemas and tools before it answers anybody else's."""
    if value is not None and len(orjson.dumps(value)) > MAX_SCHEMA_BYTES:
        raise PydanticCustomError("too_long", "may have at most 65,536 bytes as JSON")
    return value


def _few_enough_stops(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_STOP_STRINGS:
        raise PydanticCustomError("too_long", "at most {most} strings, not {found}", {"most": MAX_STOP_STRINGS, "found": len(value)})
    return value


def _known_format(value: Any) -> Any:
    if value is not None and value.get("type") not in RESPONSE_FORMATS:
        raise PydanticCustomError("unsupported_parameter", "its type must be text, json_object or json_schema")
    return value


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Compiled = AfterValidator(_small_enough)
Refused = Annotated[Any, AfterValidator(_refuse)]
"""A field of OpenAI's that would change the answer and can't be honoured."""
Text = Annotated[str | None, BeforeValidator(_joined_text)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], FIRST_ERROR_ENDS]
Strict = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = Strict

    include_usage: bool | None = None


class Message(BaseModel):
    model_config = Strict

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], FIRST_ERROR_ENDS] | None = None
    tool_call_id: str | None = None


class SamplingRequest(BaseModel):
    model_config = Strict

    model: ObjectId
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[StopString | Annotated[list[StopString], FIRST_ERROR_ENDS] | None, AfterValidator(_few_enough_stops)] = None
    seed: int | None = None
    logit_bias: Annotated[dict[str, float], at_most(MAX_BIASES)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def answers(self) -> int:
        """How many are to be written."""
        return self.n or 1

    def forwarded(self, serving_name: str) -> dict[str, Any]:
        """The inference server's request."""
        return {"model": serving_name, **self.model_dump(exclude=set(NOT_FORWARDED), exclude_none=True)}


class ChatRequest(SamplingRequest):
    messages: Annotated[list[Message], FIRST_ERROR_ENDS, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[dict[str, Any] | None, Compiled, AfterValidator(_known_format)] = None
    tools: Annotated[Annotated[list[dict[str, Any]], FIRST_ERROR_ENDS] | None, Compiled] = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    reasoning_effort: str | None = None

    functions: Refused = None
    function_call: Refused = None
    web_search_options: Refused = None
    moderation: Refused = None
    audio: Refused = None
    prediction: Refused = None
    modalities: Annotated[Any, AfterValidator(_refuse_all_but_text)] = None


class CompletionRequest(SamplingRequest):
    prompt: str | Annotated[list[str], FIRST_ERROR_ENDS] | TokenIds | Annotated[list[TokenIds], FIRST_ERROR_ENDS]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    suffix: Refused = None
    best_of: Refused = None

    @model_validator(mode="after")
    def _few_enough_answers(self) -> "CompletionRequest":
        if self.answers > MAX_ANSWERS:
            raise PydanticCustomError("too_long", "prompt: prompts times n may be at most 1,024")
        return self

    @property
    def answers(self) -> int:
        prompts = len(self.prompt) if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int) else 1
        return prompts * (self.n or 1)
