"""Keys: what is one, what is none, and that nothing of one is ever said."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Unauthenticated
from gateway.identity import MISSING, credential, hash_key, key_id_of, make_key, new_key, stored_user

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
IDS = st.text(st.sampled_from(ALPHABET), min_size=12, max_size=12)
SECRETS = st.integers(0, 2**256 - 1)
KEY = make_key("0123456789ab", 2**255 + 12345)


def refused(*headers: tuple[bytes, bytes]) -> Unauthenticated:
    with pytest.raises(Unauthenticated) as error:
        credential(headers)
    return error.value


@given(key_id=IDS, secret=SECRETS)
def test_a_key_says_its_id(key_id: str, secret: int) -> None:
    key = make_key(key_id, secret)
    assert re.fullmatch(r"gw_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}[0-9a-f]{8}", key)
    assert key_id_of(key.encode()) == key_id


@given(one=SECRETS, other=SECRETS)
def test_two_secrets_are_two_keys(one: int, other: int) -> None:
    assert (make_key("0" * 12, one) == make_key("0" * 12, other)) == (one == other)


def test_a_known_key_stays_what_it_is() -> None:
    """The format is for ever: keys of today are in use for years."""
    assert make_key("0123456789ab", 0) == "gw_0123456789ab_" + "0" * 43 + "aee10994"


def test_fresh_keys_differ_and_are_well_formed() -> None:
    keys = [new_key() for _ in range(100)]
    assert len({key for _, key in keys}) == 100
    assert all(key_id_of(key.encode()) == key_id for key_id, key in keys)


@pytest.mark.parametrize("at", range(len(KEY)))
def test_a_key_with_one_other_character_is_none(at: int) -> None:
    for other in {*ALPHABET, "_", "-", " ", "\x00", "é"} - {KEY[at]}:
        assert key_id_of((KEY[:at] + other + KEY[at + 1 :]).encode("latin-1")) is None


@given(st.binary(max_size=80) | st.text(max_size=70).map(str.encode) | st.binary(min_size=65, max_size=65))
def test_what_is_no_key_has_no_id(text: bytes) -> None:
    assert key_id_of(text) is None


@pytest.mark.parametrize("text", ["", KEY[:-1], KEY + "0", KEY.upper(), f" {KEY}"])
def test_a_key_that_is_cut_lengthened_or_shouted_is_none(text: str) -> None:
    assert key_id_of(text.encode()) is None


@given(one=st.binary(max_size=40), other=st.binary(max_size=40))
def test_the_hash_depends_on_the_pepper(one: bytes, other: bytes) -> None:
    digest = hash_key(one, KEY.encode())
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    # An HMAC key is padded with zeros to its block.
    assert (digest == hash_key(other, KEY.encode())) == (one.rstrip(b"\0") == other.rstrip(b"\0"))


def test_the_stored_hash_is_no_key() -> None:
    assert key_id_of(hash_key(b"pepper", KEY.encode()).encode()) is None


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer the-key")],
        [(b"authorization", b"bearer the-key")],
        [(b"authorization", b"BEARER   the-key ")],
        [(b"x-api-key", b"the-key")],
        [(b"host", b"a"), (b"x-api-key", b" the-key")],
        [(b"authorization", b"Bearer the-key"), (b"x-api-key", b"the-key")],
    ],
)
def test_a_key_comes_as_bearer_or_as_x_api_key(headers: list[tuple[bytes, bytes]]) -> None:
    assert credential(headers) == b"the-key"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"host", b"a")],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"x-api-key", b"")],
        [(b"authorization", b"Basic dXNlcjpjYW5hcnk=")],
        [(b"authorization", b"canary")],
        [(b"authorization", b"Basic canary"), (b"x-api-key", b"canary")],
    ],
)
def test_without_a_key_the_challenge_has_no_error(headers: list[tuple[bytes, bytes]]) -> None:
    error = refused(*headers)
    assert error.message == MISSING
    assert error.code is None
    assert (b"www-authenticate", b'Bearer realm="gateway"') in error.headers()
    assert b"canary" not in b"".join(map(repr_bytes, error.render()))


def repr_bytes(part: object) -> bytes:
    return repr(part).encode()


@pytest.mark.parametrize("names", [(b"authorization", b"x-api-key"), (b"authorization", b"authorization")])
def test_two_different_keys_are_refused(names: tuple[bytes, bytes]) -> None:
    prefixes = [b"Bearer " if name == b"authorization" else b"" for name in names]
    error = refused((names[0], prefixes[0] + b"one-canary"), (names[1], prefixes[1] + b"other-canary"))
    assert error.message == "two different API keys in one request, expected one"
    assert (b"www-authenticate", b'Bearer realm="gateway", error="invalid_token"') in error.headers()
    assert b"canary" not in repr_bytes(error.render())


SECRET = b"of the tests"
ORGANISATIONS = st.sampled_from(["acme", "other", "a"])


@given(st.tuples(ORGANISATIONS, st.text()), st.tuples(ORGANISATIONS, st.text()))
def test_users_of_each_organisation_are_told_apart_and_not_told(one: tuple[str, str], other: tuple[str, str]) -> None:
    stored = stored_user(SECRET, *one, plain=False)
    assert re.fullmatch(r"u_[0-9a-f]{20}", stored)
    assert (stored == stored_user(SECRET, *other, plain=False)) == (one == other)


def test_a_user_is_stored_under_a_key_of_its_own() -> None:
    """So that neither a hash of a key nor one of the pepper's own is ever a user's, whatever he is called; and the
    value is known here, for it is in ledgers that are kept for years."""
    assert stored_user(SECRET, "acme", "ann", plain=False) == "u_5017bb07d656485afe67"
    assert stored_user(b"another", "acme", "ann", plain=False) != "u_5017bb07d656485afe67"
    assert hash_key(SECRET, b"acme\0ann")[:20] != "5017bb07d656485afe67"


@given(st.text())
def test_a_plain_user_is_stored_as_it_is_where_a_line_can_show_it(user: str) -> None:
    shown = len(user) <= 64 and user.isprintable() and user != "erased"
    assert stored_user(SECRET, "acme", user, plain=True) == (
        user if shown else stored_user(SECRET, "acme", user, False)
    )


@pytest.mark.parametrize(
    ("user", "shown"),
    [("ann", True), ("Ann Müller|{x}", True), ("a" * 64, True), ("a" * 65, False), ("a\nb", False), ("\x1b[1m", False)],
)
def test_what_would_break_a_line_is_hashed_even_where_users_are_plain(user: str, shown: bool) -> None:
    assert (stored_user(SECRET, "acme", user, plain=True) == user) is shown


@pytest.mark.parametrize(
    ("user", "taken"),
    [
        ("erased", True),
        ("u_5017bb07d656485afe67", True),
        ("Erased", False),
        ("u_5017bb07d656485afe6", False),
        ("u_5017bb07d656485afe677", False),
        ("u_5017BB07D656485AFE67", False),
    ],
)
def test_nobody_is_called_as_the_ledger_calls_others(user: str, taken: bool) -> None:
    stored = stored_user(SECRET, "acme", user, plain=True)
    assert stored == (stored_user(SECRET, "acme", user, plain=False) if taken else user)
    assert (stored != user) is taken


def test_a_user_of_half_a_character_is_stored() -> None:
    assert len(stored_user(SECRET, "acme", "\ud800", plain=True)) == 22
