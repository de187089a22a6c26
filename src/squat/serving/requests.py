"""What a request may ask for: OpenAI's fields, as far as they can be honoured.

A field that would change the answer and is not supported is refused unless it says what happens anyway; so is
every name that is not known. Fields about accounting are ignored. `null` is what a field is without a value.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from squat.chat_template import Message
from squat.forms import Form, json_schema, tool_calls
from squat.serving.answers import RequestError

_IGNORED = {
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
_NEUTRAL: dict[str, list[Any]] = {
    "audio": [],
    "best_of": [1],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "n": [1],
    "prediction": [],
    "presence_penalty": [0],
    "reasoning_effort": [],
    "suffix": [""],
    "verbosity": [],
    "web_search_options": [],
}
"""Fields that are not supported, and the values that ask for nothing."""


def is_tokens(value: Any) -> bool:
    """Whether it may be a list of token ids."""
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _prompt(value: Any) -> str | list[int]:
    match value:
        case str(text) | [str(text)]:
            return text
        case [*ids] if is_tokens(ids):
            return ids
    raise ValueError("give one text, or the token ids of one")


def _strings(value: Any) -> Any:
    """One string is a list of one."""
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """A text is a list of one part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Part(BaseModel):
    """An object of a request: nothing in it is unknown, and `null` is nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: given for name, given in value.items() if given is not None}


class StreamOptions(Part):
    """What a stream has beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # it would be padding, and there is none


class Named(Part):
    """What all requests have."""

    model: str | None = None


class Body(Named):
    """What both kinds of requests for a text have."""

    usual_tokens: ClassVar[int | None] = None
    """The most tokens of an answer if nobody says; None: as many as there is room for."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(default_factory=lambda: secrets.randbits(63), ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_strings)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    token_widths: bool = False  # which tokens had 8 bits; not OpenAI's

    @property
    def new_tokens(self) -> int | None:
        """The most tokens of the answer, if the request says."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Of how many tokens beside the chosen one the log-probabilities are wanted; None: of none."""
        return None

    @property
    def form(self) -> Form | None:
        """What the answer has to be, if that is said."""
        return None

    @property
    def shown_first(self) -> str | list[int]:
        """What stands in front of the answer, as text or as token ids."""
        return ""

    @property
    def most_calls(self) -> int | None:
        """How many tools the answer may call; None: as many as it likes."""
        return 0

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of `Engine.generate`."""
        return {
            "form": self.form,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed % 2**64,
            "stop": self.stop,
            "logprobs": self.top,
        }


class CompletionBody(Body):
    """Of /v1/completions."""

    usual_tokens = 16

    prompt: Annotated[str | list[int], PlainValidator(_prompt)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False

    @model_validator(mode="after")
    def _an_echo_has_no_logprobs(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: those of the prompt are not told; leave out echo or logprobs")
        return self

    @property
    def top(self) -> int | None:
        """Like `Body.top`."""
        return self.logprobs

    @property
    def shown_first(self) -> str | list[int]:
        """Like `Body.shown_first`."""
        return self.prompt if self.echo else ""


class TextPart(Part):
    """A part of a message's content; others than text are not supported."""

    type: Literal["text"]
    text: str


def _arguments(value: Any) -> Any:
    """JSON in text, as the API has it, as an object, as templates have it."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("are no JSON") from None


class CalledFunction(Part):
    """What an assistant called."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class Call(Part):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Part):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart] | None, BeforeValidator(_parts)] = None
    tool_calls: list[Call] = []
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_is_nothing(cls, value: Any) -> Any:
        """Clients give back what they were given, with lists of tool calls and annotations."""
        if not isinstance(value, dict):
            return value
        return {n: v for n, v in value.items() if n == "content" or v not in ([], "")}

    @model_validator(mode="after")
    def _fields_fit(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: only the assistant has them, and not the {self.role}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id goes with the role tool, and with no other")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: is missing")
        return self

    @property
    def message(self) -> Message:
        """As a chat template wants it; a developer is what was called the system before."""
        text = "".join(part.text for part in self.content or [])
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(Part):
    """What a model may call; `strict` or not, its parameters are kept to."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = True


class FunctionTool(Part):
    """A tool; others than functions are not supported."""

    type: Literal["function"]
    function: Function


class FunctionName(Part):
    """The name of a function."""

    name: str


class NamedTool(Part):
    """The tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class Schema(Part):
    """A JSON schema with a name; `strict` or not, it is kept."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool = True


class ResponseFormat(Part):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _schema_where_it_is_named(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type "json_schema", and nothing else does')
        return self


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat()
    tools: list[FunctionTool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _fields_fit(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two have the same name; give each its own")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice: {self.tool_choice.function.name!r:.60} is none of the tools"
            )
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice: one is required, and there are no tools; give some")
        if self.callable_tools and self.response_format.type != "text":
            raise ValueError(
                "response_format: an answer with a format cannot call tools; leave out one of them"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError(
                "max_tokens is the old name of max_completion_tokens; give one of them"
            )
        return self

    @property
    def new_tokens(self) -> int | None:
        """Like `Body.new_tokens`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """Like `Body.top`."""
        return self.top_logprobs if self.logprobs else None

    @property
    def form(self) -> Form | None:
        """Like `Body.form`."""
        wanted = self.response_format
        if tools := self.callable_tools:
            return tool_calls(tools, required=self.tool_choice not in ("none", "auto"))
        if wanted.json_schema is not None:
            return json_schema(wanted.json_schema.schema_)
        return None if wanted.type == "text" else json_schema({"type": "object"})

    @property
    def most_calls(self) -> int | None:
        """Like `Body.most_calls`."""
        if not self.callable_tools:
            return 0
        return None if self.parallel_tool_calls and self.tool_choice == "auto" else 1

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the answer may call, as a chat template wants them."""
        if self.tool_choice == "none":
            return []
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return [
            tool.model_dump(exclude_unset=True)
            for tool in self.tools
            if named in (None, tool.function.name)
        ]

    @property
    def conversation(self) -> list[Message]:
        """The messages as a chat template wants them."""
        return [message.message for message in self.messages]


AnyBody = TypeVar("AnyBody", bound=Named)


def read(kind: type[AnyBody], content: Any) -> AnyBody:
    """A request from its JSON.

    Raises:
        RequestError: it is no object, or the first field that is wrong.
    """
    if not isinstance(content, dict):
        raise RequestError(400, 'the body is no JSON object; send one, as in {"model": ...}')
    for name, value in content.items():
        unwanted = name in _NEUTRAL and value is not None
        if unwanted and not any(value == v for v in _NEUTRAL[name]):
            raise RequestError(
                400, f"{name}: {value!r:.60} is not supported here; leave it out", param=name
            )
    known = {n: v for n, v in content.items() if n not in _NEUTRAL and n not in _IGNORED}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _refusal(error.errors()[0]) from None


def _refusal(error: ErrorDetails) -> RequestError:
    """One of pydantic's errors as an answer."""
    where = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "is unknown here; leave it out"
    elif where and error["type"] != "missing":
        message = f"{error['input']!r:.60}: {message}"
    return RequestError(400, f"{where}: {message}" if where else message, param=where)
