"""Text of new tokens, piece by piece: whole characters only, and no text from a stop string on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from lorakeet.inference.generate import CONTEXT

#: Text that a tokenizer writes for bytes that are no whole character yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of an answer while its tokens arrive.

    Tokens are decoded together with a few before them, since a word's leading space may depend on these. A character whose
    bytes are not all here waits, and so does text that may be the beginning of a stop string.

    Attributes:
        stopped: Whether a stop string was found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: The tokenizer.
            prompt: Token ids of the prompt.
            stop: Texts that end the answer.
            shown: Special tokens that are part of the text, by id; others are left out.
        """
        self.tokenizer, self.shown = tokenizer, shown or {}
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self._tokens = list(prompt[-CONTEXT:])
        self._begin = 0  # first token that is decoded again with new ones
        self._read = len(self._tokens)  # tokens whose text has been taken
        self._before = self._decode(self._tokens)  # text of the tokens that are decoded again, without new ones
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Return the text that is certain after a further token; often that of the token."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before, text = self._before, self._decode(self._tokens[self._begin :])
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        rest = self._decode(self._tokens[self._read :])
        new = text[len(before) :] if text.startswith(before) else rest
        self._begin, self._read, self._before = self._read, len(self._tokens), rest
        return self._until_stop(new)

    def end(self) -> str:
        """Return the text that was held back, once no token follows."""
        if self.stopped:
            return ""
        rest = self._decode(self._tokens[self._begin :])[len(self._before) :]
        text = self._until_stop(rest) + self._held
        self._held = ""
        return text

    def _until_stop(self, new: str) -> str:
        """Return the text before a stop string, without an end that may begin one."""
        text = self._held + new
        found = [place for one in self.stop if (place := text.find(one)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, one) for one in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, ids: list[int]) -> str:
        at = next((at for at, token in enumerate(ids) if token in self.shown), None)
        if at is not None:
            return self._decode(ids[:at]) + self.shown[ids[at]] + self._decode(ids[at + 1 :])
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of ``text`` that ``stop`` begins with."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)
