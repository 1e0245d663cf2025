"""What looks like a key is masked, wherever it came from, before it goes to anybody who reads along: logs, traces."""

from __future__ import annotations

import re

# Before a key may stand the end of an escape: JSON's \n, or the m of a colour.
_SECRETS = re.compile(
    rb"gw_[0-9A-Za-z]{4,}(?:_[0-9A-Za-z]+)?"
    rb"|(?:(?<![0-9A-Za-z])|(?<=\\[bfnrt])|(?<=[0-9]m))(?:sk|fw|pk)[-_][0-9A-Za-z_-]{8,}"
    rb"|(?:[Bb]earer|[Bb]EARER)\s+[^\s\"'\\,]+"
    rb"|(?<=://)[^\s\"'\\/?#@]+(?=@)"  # of an address the name and the password
)
_MASK = b"[masked]"
# No line with a key is without one of these, and looking for them costs a tenth of the pattern.
_HINTS = (b"gw_", b"sk-", b"sk_", b"fw-", b"fw_", b"pk-", b"pk_", b"earer", b"EARER", b"://")


def masked(line: bytes) -> bytes:
    """The line, with a mask in the place of everything in it that looks like a key."""
    for hint in _HINTS:
        if hint in line:
            return _SECRETS.sub(_MASK, line)
    return line


def masked_text(text: str) -> str:
    """The same of a text; of what is no text (half a character) a question mark is left."""
    return masked(text.encode("utf-8", "replace")).decode()
