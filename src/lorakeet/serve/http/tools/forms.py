"""Forms of tool calls that chat templates state: of Hermes and Qwen, Mistral in two ways, and Llama 3.

Hermes   <tool_call>{"name": "f", "arguments": {…}}</tool_call>, any number of times, within text
Mistral  [TOOL_CALLS][{"name": "f", "arguments": {…}}, …], at the end
         [TOOL_CALLS]f[ARGS]{…}, any number of times at the end; some models write [CALL_ID]abcdefghi before [ARGS]
Llama 3  {"name": "f", "parameters": {…}}, as the whole answer; several are separated by semicolons
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

#: Signs of Mistral between the name of a function, the id of its call, and its arguments.
CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
#: Signs of forms that are not read, though their calls stand between Hermes's tags: tags for each argument.
_TAGGED = ("<function=", "<arg_key>")


@dataclass(frozen=True)
class ToolForm:
    """A form of tool calls.

    Attributes:
        opening: Text before a call, or before a list of them; empty: calls are the whole answer.
        closing: Text behind a call; empty: none.
        before: Text of a forced call between the opening and its JSON.
        after: Text of a forced call behind its JSON.
        arguments: Key of the arguments.
        separator: Text between two calls behind one opening; empty: each call has an opening of its own.
        signs: Signs between name and arguments, where these are no members of one JSON object.
        id_begin: Text that the id of a call begins with.
        id_length: Characters of an id behind that; templates of Mistral take ids of nine letters and digits alone.
    """

    opening: str
    closing: str
    before: str
    after: str
    arguments: str = "arguments"
    separator: str = ""
    signs: tuple[str, ...] = ()
    id_begin: str = "call_"
    id_length: int = 24

    def special_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        """Return the special tokens that belong to a call, by id; others are no part of a text."""
        specials = {self.opening, self.closing, *self.signs} & set(tokenizer.all_special_tokens)
        return {tokenizer.convert_tokens_to_ids(text): text for text in sorted(specials)}

    def new_id(self) -> str:
        """Return the id of a further call."""
        return self.id_begin + uuid.uuid4().hex[: self.id_length]


HERMES = ToolForm("<tool_call>", "</tool_call>", "\n", "\n")
MISTRAL = ToolForm("[TOOL_CALLS]", "", "[", "]", separator=",", id_begin="", id_length=9)
MISTRAL_ARGS = replace(MISTRAL, before="", after="", separator="", signs=(ARGS,))
MISTRAL_IDS = replace(MISTRAL_ARGS, signs=(CALL_ID, ARGS))
LLAMA = ToolForm("", "", "", "", "parameters", separator=";")


def tool_form(tokenizer: PreTrainedTokenizerBase) -> ToolForm | None:
    """Return the form of calls that the chat template states; None if it lists no tools, or states another form."""
    template = str(tokenizer.chat_template or "")
    if "tools" not in template:
        return None
    if HERMES.opening in template:
        return None if any(sign in template for sign in _TAGGED) else HERMES
    if MISTRAL.opening in template:
        if ARGS in template:
            return MISTRAL_IDS if CALL_ID in template else MISTRAL_ARGS
        return MISTRAL
    return LLAMA if '{"name":' in template and '"parameters":' in template else None
