"""Body of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lorakeet.serve.http.schema.fields import MOST_LOGPROBS, Body, Refused, SamplingBody, TokenCount, wrong

#: Messages of a conversation, tools of a request, and calls of one message.
MOST_MESSAGES, MOST_TOOLS, MOST_CALLS = 4096, 128, 64
#: Name of a function or schema.
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
FunctionName = Annotated[str, Field(pattern=_NAME)]


def _joined(value: Any) -> Any:
    """Return a content as one text: parts of the type ``text`` are joined, other parts refused."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("expected a text, or a list of parts of the type text")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong("expected parts of the type text: pictures, sounds and files are not taken")
        if part.keys() - {"type", "text"}:
            raise wrong(f"a part has the field {min(part.keys() - {'type', 'text'})!r}, which is not known here")
    return "\n".join(part["text"] for part in value)


class CalledFunction(Body):
    """Function of a call, and its arguments as JSON."""

    name: FunctionName
    arguments: str


class Call(Body):
    """A call of a tool that an assistant's turn has."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    tool_calls: Annotated[list[Call], Field(max_length=MOST_CALLS)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise wrong("a message has no content, expected text")
        if self.tool_calls and self.role != "assistant":
            raise wrong(f"tool_calls are in a message of the role {self.role}, expected assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise wrong("tool_call_id belongs to a message of the role tool, and each of these has one")
        return self

    def plain(self, with_call_id: bool = False) -> dict[str, Any]:
        """Return the message as templates read it, with its role in their words.

        Args:
            with_call_id: Whether the template reads which call a result belongs to.
        """
        role = "system" if self.role == "developer" else self.role
        left_out = {"role", "content", *(() if with_call_id else ("tool_call_id",))}
        members = self.model_dump(exclude_none=True, exclude=left_out)
        return {"role": role, "content": self.content, **members}


class Function(Body):
    """Function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """Name of a function."""

    name: FunctionName


class NamedTool(Body):
    """Tool that the answer calls."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """Schema that an answer keeps to."""

    name: FunctionName
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    description: Refused = None


class ResponseFormat(Body):
    """Form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("json_schema belongs to the type json_schema, which needs one")
        return self

    def schema_of_answer(self) -> dict[str, Any] | None:
        """Return the schema that an answer keeps to; None: it is free text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class ChatBody(SamplingBody):
    """Body of a chat."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    metadata: Refused = None
    moderation: Refused = None
    prediction: Refused = None
    prompt_cache_key: Refused = None
    prompt_cache_options: Refused = None
    prompt_cache_retention: Refused = None
    reasoning_effort: Refused = None
    safety_identifier: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs is set, but logprobs is not true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("max_tokens and max_completion_tokens differ, expected one of them")
        if self.tool_choice is not None and not self.tools:
            raise wrong("tool_choice is set, but there are no tools")
        if self.forced_tools == {}:
            raise wrong("tool_choice names a function that is not among the tools")
        if self.offered_tools and self.answer_schema is not None:
            raise wrong("tools and a response_format of JSON exclude each other: use one of them, or tool_choice none")
        self._check_ids()
        return self

    def _check_ids(self) -> None:
        """Refuse the result of a tool that no message before it has called."""
        called: set[str] = set()
        for message in self.messages:
            called |= {call.id for call in message.tool_calls or ()}
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise wrong("messages have a tool_call_id that no call before it has")

    @property
    def longest_answer(self) -> int | None:
        """Tokens of the answer at most; None: not set."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def listed_logprobs(self) -> int | None:
        """Likely tokens listed beside each chosen one; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """JSON schema that the answer keeps to; None: free text."""
        return None if self.response_format is None else self.response_format.schema_of_answer()

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """Tools that the template lists; None: none."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]

    @property
    def forced_tools(self) -> dict[int, dict[str, Any]] | None:
        """Tools of which the answer calls one, by their number; None: it may also be text."""
        if self.tool_choice in (None, "auto", "none"):
            return None
        tools, name = self.offered_tools or [], None
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
        return {number: tool for number, tool in enumerate(tools) if name in (None, tool["function"]["name"])}

    @property
    def ruled_tools(self) -> tuple[dict[int, dict[str, Any]], bool] | None:
        """Tools whose calls keep to a grammar, by their number, and whether the answer is one call; None: no grammar.

        Beside strict tools that the model may call, others have arguments of any form: they come without parameters.
        """
        if self.forced_tools is not None:
            return self.forced_tools, True
        strict = [bool(tool.function.strict) for tool in self.tools or ()]
        if not any(strict) or (offered := self.offered_tools) is None:
            return None
        for tool, is_strict in zip(offered, strict, strict=True):
            if not is_strict:
                tool["function"].pop("parameters", None)
        return dict(enumerate(offered)), False
