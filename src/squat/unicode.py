"""Strings that are no text: Python lets them hold halves of characters, which no encoding can write.

They come from bytes on the command line that are no UTF-8, and from escapes in JSON such as "\\ud83d".
"""

import re


def broken_character(text: str) -> str | None:
    """What is wrong with the first character of a string that is none; None for a text."""
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return None
    code, place = ord(found[0]), f"character {found.start() + 1}"
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that it could not decode
        return f"{place} is the byte 0x{code - 0xDC00:02x}, which is no UTF-8; give text in UTF-8"
    return f"{place} is U+{code:04X}, half of a character (a lone surrogate); give whole ones"
