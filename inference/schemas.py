"""What a request may hold: OpenAI's fields, and the few of vLLM's that this server can honour.

Unknown fields are ignored, as vLLM does. Known fields that would change the answer and can't be honoured are refused by
`refuse_unsupported`, never ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from inference.errors import Unsupported

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_BIASES = 1024

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "top_k": (0, -1),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that this server can't honour, and the values beside null that ask for nothing."""

Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1)]
FirstErrorEnds = Field(fail_fast=True)
"""Of a list: pydantic would describe each of a million wrong items, while nobody else is answered."""
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], FirstErrorEnds]


def _few_enough_biases(value: Any) -> Any:
    """Before they are read, because each may be wrong."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"may have at most {MAX_BIASES:,} entries, not {len(value):,}")
    return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class SamplingRequest(BaseModel):
    """What chat and plain completions share. `ignore_eos` and `stop_token_ids` are vLLM's."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopString | Annotated[list[StopString], FirstErrorEnds, Field(max_length=MAX_STOP_STRINGS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_few_enough_biases)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Message(BaseModel):
    """One turn. Keys beside `role` and `content` (`name`, `tool_calls`, …) reach the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[dict[str, JsonValue]], FirstErrorEnds] | None = None


class ChatCompletionRequest(SamplingRequest):
    messages: Annotated[list[Message], FirstErrorEnds, Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[dict[str, JsonValue]], FirstErrorEnds] | None = None


class CompletionRequest(SamplingRequest):
    prompt: str | Annotated[list[str], FirstErrorEnds] | TokenIds | Annotated[list[TokenIds], FirstErrorEnds]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)


class LoadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: str
    lora_path: str
    load_inplace: Literal[False] | None = None


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: str


def refuse_unsupported(request: SamplingRequest) -> None:
    """Raise Unsupported for the first field that asks for what this server can't do."""
    for name, value in (request.model_extra or {}).items():
        if name in UNSUPPORTED and value is not None and not any(_same(value, harmless) for harmless in UNSUPPORTED[name]):
            raise Unsupported(f"{name} is not supported by this inference server; leave it out", param=name)


def _same(value: Any, harmless: Any) -> bool:
    """Equal as JSON: Python's True is 1, JSON's is not."""
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)
