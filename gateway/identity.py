"""Who calls: the key's form, its checksum and its hash. Nothing here is kept, logged or echoed.

A key is `gw_<id>_<secret><checksum>`: 12 letters and digits of id, 43 of secret (256 random bits), 8 hex digits of
CRC-32 over all that stands before. The prefix and the checksum let secret scanners and typing errors be recognised
without a look-up (as GitHub's tokens do since 2021); the id is public and names the key in logs, reports and commands.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable
from functools import cache
from zlib import crc32

import msgspec

from gateway.errors import Unauthenticated
from gateway.records import ERASED

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID, _SECRET, _CHECKSUM = 12, 43, 8
_LENGTH = len("gw_") + _ID + 1 + _SECRET + _CHECKSUM

# One text for all that is wrong with a presented key: which it was is nobody's business.
REFUSED = "the API key is not valid: it is unknown, malformed, expired or revoked"
MISSING = "no API key: send one as 'Authorization: Bearer gw_…' or 'x-api-key: gw_…'"


class Principal(msgspec.Struct, frozen=True):
    """Who calls. Holding one means: authenticated. `models` are patterns, () stands for all that the team may use."""

    key_id: str
    team: str
    user: str | None
    models: tuple[str, ...]


def make_key(key_id: str, secret: int) -> str:
    """The key of an id and a 256-bit secret."""
    text = f"gw_{key_id}_{_base62(secret, _SECRET)}"
    return f"{text}{crc32(text.encode()):08x}"


def new_key() -> tuple[str, str]:
    """A fresh id and its key, from the operating system's randomness."""
    key_id = "".join(secrets.choice(_ALPHABET) for _ in range(_ID))
    return key_id, make_key(key_id, secrets.randbits(256))


def key_id_of(key: bytes) -> str | None:
    """The id in a well-formed key, or None: 0 look-ups and less than 2 µs for whatever was sent instead."""
    if len(key) != _LENGTH or not key.startswith(b"gw_") or key[3 + _ID] != 0x5F or not key.isascii():
        return None
    if key[-_CHECKSUM:] != b"%08x" % crc32(key[:-_CHECKSUM]):
        return None
    return key[3 : 3 + _ID].decode()


def written_id(text: str) -> str:
    """The id of a key as people write it: by itself, or with what stands around it in the key, gw_ID_…"""
    return text.removeprefix("gw_").partition("_")[0]


def hash_key(pepper: bytes, key: bytes) -> str:
    """What is stored of a key: HMAC-SHA256 under the pepper, 64 hex digits. It opens nothing by itself."""
    return hmac.digest(pepper, key, "sha256").hex()


def credential(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key that a request carries. Raises Unauthenticated for none, for two, and for another scheme."""
    found: list[bytes] = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() != b"bearer":
                raise Unauthenticated(MISSING, presented=False)
            found.append(key.strip(b" "))
        elif name == b"x-api-key":
            found.append(value.strip(b" "))
    if not found or not any(found):
        raise Unauthenticated(MISSING, presented=False)
    if any(key != found[0] for key in found):
        raise Unauthenticated("two different API keys in one request, expected one")
    return found[0]


_LONGEST_NAME = 64  # a user is called as callers call him, but nobody writes a book into the ledger
_STORED = re.compile(r"u_[0-9a-f]{20}")


def stored_user(secret: bytes, organisation: str, name: str, plain: bool) -> str:
    """What stands for a user of an organisation in counts, rows and sums: `u_` and 20 hex digits, or, if it is to be
    plain, the name, where that can be shown in a line: of printable characters, and not too long. A name that says what
    the ledger itself says of somebody else, of one who is hashed or erased, is never plain.

    The digits are HMAC-SHA256, under a key that is derived for users alone (RFC 5869's idea: one secret, one purpose):
    from a name nobody gets to them without the secret, and a user of two organisations is not known for the same."""
    if plain and len(name) <= _LONGEST_NAME and name.isprintable() and name != ERASED and not is_stored_user(name):
        return name
    text = f"{organisation}\0{name}".encode("utf-8", "surrogatepass")  # an organisation's name has no NUL
    return f"u_{hmac.digest(_for_users(secret), text, 'sha256').hex()[:20]}"


def is_stored_user(name: str) -> bool:
    """Whether a name looks like what stands for a user who is hashed."""
    return _STORED.fullmatch(name) is not None


@cache
def _for_users(secret: bytes) -> bytes:
    return hmac.digest(secret, b"gateway users", "sha256")


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, rest = divmod(number, 62)
        digits.append(_ALPHABET[rest])
    return "".join(reversed(digits))
