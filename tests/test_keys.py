"""The key ring on a real store: who is known, who learns of it, and what is kept."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import redis

from gateway.embedded import _server_binary
from gateway.errors import StoreUnavailable, Unauthenticated
from gateway.identity import REFUSED, Principal, hash_key, make_key
from gateway.keys import KeyRecord, KeyRing
from gateway.store import Store, StoreError
from tests.proving import house

PEPPER = b"of the tests"


@asynccontextmanager
async def ring(url: str, pepper: bytes = PEPPER, *, follows: bool = False) -> AsyncIterator[KeyRing]:
    """A key ring with a store of its own, as another worker has it."""
    store = Store(url, deadline=5)
    keys = KeyRing(store, pepper)
    try:
        await keys.load()
        follower = asyncio.ensure_future(keys.follow() if follows else asyncio.sleep(0))
        yield keys
        follower.cancel()
        with suppress(asyncio.CancelledError):
            await follower
    finally:
        await store.aclose()


async def create(keys: KeyRing, **members: Any) -> tuple[KeyRecord, str]:
    usual: dict[str, Any] = {"user": None, "name": None, "models": (), "expires": None}
    return await keys.create("red", **{**usual, **members})


def known(keys: KeyRing, key: str) -> Principal | None:
    try:
        return keys.identify([(b"authorization", b"Bearer " + key.encode())])
    except Unauthenticated:
        return None


async def within_a_second(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(1):
        while not holds():
            await asyncio.sleep(0.005)


async def test_a_new_key_is_known_at_once_for_what_it_is(store_url: str) -> None:
    async with ring(store_url) as keys:
        record, key = await create(keys, user="ann", name="laptop", models=("llama*",))
        assert known(keys, key) == Principal(record.id, "red", "ann", ("llama*",))
        assert (record.name, record.state(time.time())) == ("laptop", "active")


async def test_a_ring_that_is_loaded_later_knows_it(store_url: str) -> None:
    async with ring(store_url) as one:
        record, key = await create(one)
        await create(one)
    async with ring(store_url) as other:
        assert known(other, key) == Principal(record.id, "red", None, ())
        assert next(r.id for r in other.records()) == record.id
        assert repr(other) == "<KeyRing 2 usable of 2 keys>"


async def test_a_ring_that_follows_learns_of_new_and_revoked_keys_within_a_second(store_url: str) -> None:
    async with ring(store_url) as one, ring(store_url, follows=True) as other:
        record, key = await create(one)
        await within_a_second(lambda: known(other, key) is not None)
        revoked = await one.revoke(record.id)
        assert revoked is not None
        assert known(one, key) is None
        await within_a_second(lambda: known(other, key) is None)
        assert [r.state(time.time()) for r in other.records()] == ["revoked"]


async def test_to_revoke_twice_is_to_revoke_once(store_url: str) -> None:
    async with ring(store_url) as keys:
        record, _ = await create(keys)
        first = await keys.revoke(record.id)
        assert first is not None
        assert await keys.revoke(record.id) == first
        assert await keys.revoke("no such id") is None


async def test_revoked_is_for_ever_even_if_the_news_comes_first(store_url: str) -> None:
    """Another worker revokes a key before the call that created it has returned here."""
    async with ring(store_url) as keys:
        record, key = await create(keys)
        await keys.revoke(record.id)
        keys._take(record)
        assert known(keys, key) is None


async def test_a_key_ends_when_it_expires(store_url: str) -> None:
    async with ring(store_url) as keys:
        now = time.time()
        _, past = await create(keys, expires=now - 1)
        _, soon = await create(keys, expires=now + 0.5)
        _, later = await create(keys, expires=now + 60)
        assert [known(keys, key) is not None for key in (past, soon, later)] == [False, True, True]
        await asyncio.sleep(now + 0.55 - time.time())
        assert known(keys, soon) is None
        assert [r.state(time.time()) for r in keys.records()] == ["expired", "expired", "active"]


async def test_all_that_is_wrong_with_a_key_is_refused_in_the_same_words(store_url: str) -> None:
    async with ring(store_url) as keys:
        expired, revoked = await create(keys, expires=1.0), await create(keys)
        await keys.revoke(revoked[0].id)
        record, key = await create(keys)
        wrong = {
            "malformed": "gw_canary",
            "unknown": make_key("0" * 12, 5),
            "of another secret": make_key(record.id, 5),
            "the stored hash": hash_key(PEPPER, key.encode()),
            "its record's id": record.id,
            "expired": expired[1],
            "revoked": revoked[1],
        }
        answers = set()
        for presented in wrong.values():
            with pytest.raises(Unauthenticated) as refused:
                keys.identify([(b"x-api-key", presented.encode())])
            status, headers, body = refused.value.render()
            assert presented[3:].encode() not in b"".join([body, *(value for _, value in headers)])
            answers.add((status, tuple(headers), body))
        assert len(answers) == 1
        assert refused.value.message == REFUSED


async def test_the_store_never_holds_a_key(store_url: str) -> None:
    async with ring(store_url) as keys:
        _, key = await create(keys, user="ann")
    secret = key[16:59].encode()
    with redis.Redis.from_url(store_url) as client:
        names: Any = client.keys()
        held = [client.dump(name) for name in names]
        records: Any = client.hvals("{gateway}:keys")
    assert len(names) == 3
    assert all(isinstance(value, bytes) and secret not in value for value in held)
    assert secret not in b"".join(records)
    assert hash_key(PEPPER, key.encode()).encode() in records[0]


def test_the_public_side_of_a_record_has_no_hash() -> None:
    record = KeyRecord("k", "hash", "red", "ann", None, ("a", "b"), 0.0, 86400.0, None)
    public = record.public(now=1.0)
    assert "hash" not in {*public, *map(str, public.values())}
    assert (public["state"], public["models"], public["revoked"]) == ("active", ["a", "b"], None)
    assert set(public) == {"id", "team", "user", "name", "models", "state", "created", "expires", "revoked"}
    assert record.public(now=86400.0)["state"] == "expired"


async def test_another_pepper_is_refused_with_advice(store_url: str) -> None:
    async with ring(store_url):
        pass
    with pytest.raises(StoreError, match="made under another pepper: set GATEWAY_KEY_PEPPER"):
        async with ring(store_url, b"another"):
            raise AssertionError("not reached")


async def test_a_record_that_cannot_be_read_is_told(store_url: str) -> None:
    with redis.Redis.from_url(store_url) as client:
        client.hset("{gateway}:keys", "k", "no record")
    with pytest.raises(StoreError, match=r"a record of {gateway}:keys is no key record"):
        async with ring(store_url):
            raise AssertionError("not reached")


async def test_a_change_that_cannot_be_read_does_not_end_the_following(store_url: str) -> None:
    async with ring(store_url) as one, ring(store_url, follows=True) as other:
        _, before = await create(one)
        await within_a_second(lambda: known(other, before) is not None)
        with redis.Redis.from_url(store_url) as client:
            client.xadd("{gateway}:key-changes", {"record": "no record"})
        _, after = await create(one)
        await within_a_second(lambda: known(other, after) is not None)
        assert known(other, before) is not None


async def test_whoever_follows_can_be_stopped_at_any_moment(store_url: str) -> None:
    """redis-py may swallow a cancellation that comes together with news."""
    for _ in range(20):
        store = Store(store_url, deadline=5)
        keys = KeyRing(store, PEPPER)
        follower = asyncio.ensure_future(keys.follow())
        await create(keys)
        with redis.Redis.from_url(store_url) as client:
            client.xadd("{gateway}:key-changes", {"record": "no record"})
        await create(keys)
        await asyncio.sleep(0)
        follower.cancel()
        done, _ = await asyncio.wait({follower}, timeout=5)
        assert done
        await store.aclose()


async def test_who_was_known_stays_known_when_the_store_forgets_everything(store_url: str) -> None:
    async with ring(store_url) as one, ring(store_url, follows=True) as other:
        _, key = await create(one)
        await within_a_second(lambda: known(other, key) is not None)
        with redis.Redis.from_url(store_url) as client:
            client.flushall()
        assert known(other, key) is not None
        _, another = await create(one)
        await within_a_second(lambda: known(other, another) is not None)
        assert known(other, key) is not None


async def test_who_was_known_stays_known_while_the_store_is_away() -> None:
    with house.server(_server_binary()) as server:
        async with ring(server.url, follows=True) as keys:
            record, key = await create(keys)
            server.process.kill()
            server.process.wait()
            await within_a_second(lambda: not keys.loaded)
            assert known(keys, key) is not None
            with pytest.raises(StoreUnavailable):
                await create(keys)
            with pytest.raises(StoreUnavailable):
                await keys.revoke(record.id)
            assert known(keys, key) is not None, "a revocation that was not written does not hold in one worker only"


async def test_nobody_is_a_stranger_before_the_keys_were_read_once() -> None:
    """R1: 503 and not 401, for every key alike; what is no key is refused all the same."""
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        store = Store(f"unix://{folder}/s", deadline=5)
        keys = KeyRing(store, PEPPER)
        following = asyncio.ensure_future(keys.follow())
        strange = make_key("0" * 12, 5)
        try:
            for _ in range(2):
                with pytest.raises(StoreUnavailable, match="could not be read yet"):
                    keys.identify([(b"x-api-key", strange.encode())])
                with pytest.raises(Unauthenticated):
                    keys.identify([(b"x-api-key", b"gw_canary")])
                await asyncio.sleep(0.1)
            server = house.start(_server_binary(), folder)
            try:
                async with asyncio.timeout(3):
                    while not keys.loaded:
                        await asyncio.sleep(0.01)
                with pytest.raises(Unauthenticated):
                    keys.identify([(b"x-api-key", strange.encode())])
            finally:
                server.process.kill()
                server.process.wait()
            await within_a_second(lambda: not keys.loaded)
            with pytest.raises(Unauthenticated):
                keys.identify([(b"x-api-key", strange.encode())])
        finally:
            following.cancel()
            await asyncio.wait((following,))
            await store.aclose()


async def test_a_load_that_fails_forgets_nobody(store_url: str) -> None:
    async with ring(store_url) as keys:
        _, key = await create(keys)
        with redis.Redis.from_url(store_url) as client:
            client.hset("{gateway}:keys", "k", "no record")
        with pytest.raises(StoreError):
            await keys.load()
        assert known(keys, key) is not None


async def test_following_ends_when_it_is_cancelled(store_url: str) -> None:
    store = Store(store_url, deadline=5)
    following = asyncio.ensure_future(KeyRing(store, PEPPER).follow())
    await asyncio.sleep(0.05)
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
    await store.aclose()
