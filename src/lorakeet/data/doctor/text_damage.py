"""Damage of the characters of a text by conversions: found, and fixed where that is certain.

| damage    | what it is                                                                  | mended by                      |
|-----------|-----------------------------------------------------------------------------|--------------------------------|
| mojibake  | UTF-8 that was read as Windows-1252 or Latin-1: ``cafÃ©``                    | the letters that the bytes say |
| control   | control characters but tab and line break, byte order marks inside          | leaving them out               |
| half      | half of a surrogate pair, which JSON can write and UTF-8 cannot             | U+FFFD                         |
| lost      | U+FFFD, the sign for a character that an earlier conversion could not read  | nothing: it is gone            |
"""

from __future__ import annotations

import re

LOST = "\ufffd"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_HALF = re.compile(r"[\ud800-\udfff]")


def _as_byte() -> dict[str, int]:
    """Map the characters that bytes from 0x80 on become when read as Latin-1 or Windows-1252 to the bytes."""
    table = {chr(byte): byte for byte in range(0x80, 0x100)}
    for byte in range(0x80, 0xA0):
        if sign := bytes([byte]).decode("cp1252", errors="ignore"):
            table[sign] = byte
    return table


_BYTE = _as_byte()


def _signs(first: int, last: int, without: str = "") -> str:
    """Build the character class of the bytes ``first`` to ``last``, read as Latin-1 or Windows-1252."""
    return "[" + "".join(re.escape(s) for s, b in _BYTE.items() if first <= b <= last and s not in without) + "]"


# UTF-8 is a lead byte and one to three more. Letters that end words in capitals (CAFÉ, SPAß) are often followed by a
# quotation mark or a French space. These count as damage only after Â, Ã and â, where they usually are.
_MARKS = "“”‘’‚„‹›«»…–—\xa0\x85\x91\x92\x93\x94\x96\x97"
_MORE, _SURE = _signs(0x80, 0xBF), _signs(0x80, 0xBF, without=_MARKS)
_MOJIBAKE = re.compile(
    f"[ÂÃ]{_MORE}|[Ä-Þ]{_SURE}|â{_MORE}{_MORE}|[àáãäåæçèéêëìíîï]{_SURE}{_MORE}|[ðñòóô]{_SURE}{_MORE}{_MORE}"
)
_RUN = re.compile(_signs(0x80, 0xFF) + "{2,}")


def damages(text: str) -> dict[str, str]:
    """Find damage in ``text``: code -> message. Empty for most texts."""
    if text.isascii() and text.isprintable():
        return {}
    found = {}
    if garbled := _garbled(text):
        found["mojibake"] = f"{garbled[0]!r} was {garbled[1]!r} once"
        text = mended_mojibake(text)
    if sign := _CONTROL.search(text):
        found["control"] = f"control character U+{ord(sign[0]):04X}"
    if sign := _HALF.search(text):
        found["half_character"] = f"half a character, \\u{ord(sign[0]):04x}"
    if count := text.count(LOST):
        found["lost_character"] = f"{count} of U+FFFD, near {_near(text, text.index(LOST))!r}"
    return found


def mended(text: str) -> str:
    """Return ``text`` with every certain fix of the table above."""
    if text.isascii() and text.isprintable():
        return text
    after = _HALF.sub(LOST, _CONTROL.sub("", mended_mojibake(text)))
    return after if after == text else mended(after)  # a control character may have parted what was garbled


def mended_mojibake(text: str) -> str:
    """Decode each garbled sequence of ``text`` to the letter that its bytes are in UTF-8, however often it was garbled."""
    while _garbled(text):
        text = _RUN.sub(lambda run: _letter(run[0]) or _MOJIBAKE.sub(_letter_or_same, run[0]), text)
    return text


def _letter_or_same(match: re.Match[str]) -> str:
    return _letter(match[0]) or match[0]


def _garbled(text: str) -> tuple[str, str] | None:
    pairs = ((match[0], _letter(match[0])) for match in _MOJIBAKE.finditer(text))
    return next(((sign, letter) for sign, letter in pairs if letter), None)


def _letter(garbled: str) -> str | None:
    """Decode the bytes as UTF-8; None where they are not UTF-8, so that every fix can be undone exactly."""
    try:
        return bytes(_BYTE[sign] for sign in garbled).decode()
    except UnicodeDecodeError:
        return None


def _near(text: str, at: int) -> str:
    return text[max(0, at - 12) : at + 12]
