"""The right to be forgotten: nothing in the store has the user any more, and every amount is where it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
import pytest
import redis

from gateway.buckets import bucket, hours
from gateway.embedded import _server_binary
from gateway.erase import Erased, erase
from gateway.errors import StoreUnavailable
from gateway.exports import ensure
from gateway.ledger import fold, reconcile, rows
from gateway.records import COUNTERS, ERASED, GRAINS, UsageRecord, dead_letters, group_of, sums_key
from gateway.rollups import running_hour
from gateway.store import Store, leaving
from gateway.sums import Query, report
from tests.proving import stores
from tests.proving.rows import record
from tests.test_ledger import HOUR, settle, settlement

ANN, BOB = "u_aaaaaaaaaaaaaaaaaaaa", "u_bbbbbbbbbbbbbbbbbbbb"


@pytest.fixture
async def store(either_store_url: str) -> AsyncIterator[Store]:
    store = Store(either_store_url, deadline=5)
    yield store
    await store.aclose()


def contents(client: Any) -> dict[bytes, str]:
    """Everything that the store holds, key by key."""
    readers: dict[bytes, Any] = {
        b"stream": client.xrange,
        b"hash": client.hgetall,
        b"set": client.smembers,
        b"string": client.get,
    }
    return {key: repr(readers[client.type(key)](key)) for key in sorted(client.keys())}


async def filled(url: str, store: Store, count: int = 250) -> int:
    """Rows of Ann, Bob, of who was forgotten before, and of nobody, over five weeks; the hour that is running."""
    now = await running_hour(store)
    users = [ANN, BOB, ANN, None, ERASED]
    settle(
        url,
        *(
            ((now - 840 + 840 * number // count) * HOUR, record(number, user=users[number % 5], team=f"t{number % 3}"))
            for number in range(count)
        ),
        *(((now * HOUR), record(number, user=users[number % 5])) for number in range(5)),
        (now * HOUR, record(0, organisation="zoo", user=ANN)),
    )
    return now


async def totals(store: Store, *by: Any) -> Any:
    return await report(store, Query(by))


async def test_nothing_has_the_user_any_more_and_the_amounts_stay(either_store_url: str, store: Store) -> None:
    await filled(either_store_url, store)
    whole, models, days = await totals(store), await totals(store, "model", "team"), await totals(store, "day")
    bobs = [entry async for entry in rows(store, "acme") if entry.record.user == BOB]
    told: list[tuple[int, int]] = []
    found = await erase(store, "acme", ANN, lambda done, of: told.append((done, of)))
    with redis.Redis.from_url(either_store_url) as client:
        having = [key for key, text in contents(client).items() if ANN in text]
    assert [key for key in having if not key.startswith(b"{zoo}")] == []
    assert len(having) == 4  # of the other organisation, whose user this is not
    assert found.rows == 102
    assert found.sums > 100
    assert (await totals(store), await totals(store, "model", "team"), await totals(store, "day")) == (
        whole,
        models,
        days,
    )
    assert [entry async for entry in rows(store, "acme") if entry.record.user == BOB] == bobs
    assert (await reconcile(store, "acme")).differences == []
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


async def test_a_row_stays_as_it_is_but_for_its_user(either_store_url: str, store: Store) -> None:
    now = await running_hour(store)
    kept = record(7, user=ANN)
    settle(either_store_url, (now * HOUR + 5, kept), (now * HOUR + 6, record(8)))
    with redis.Redis.from_url(either_store_url) as client:
        # What a newer gateway has written is kept, too.
        text = msgspec.json.encode({**msgspec.to_builtins(kept), "more": [1.50, {"a": None}]})
        client.xadd("{acme}:usage", {"row": text}, id=f"{now * HOUR + 7}-0")
    await erase(store, "acme", ANN)
    found = [entry async for entry in rows(store, "acme")]
    assert [(entry.written_ms - now * HOUR, entry.erased) for entry in found] == [(6, False), (5, True), (7, True)]
    assert [entry.record for entry in found] == [record(8), *[record(7, user=ERASED)] * 2]
    with redis.Redis.from_url(either_store_url) as client:
        assert b'"more":[1.5,{"a":null}]' in client.xrevrange("{acme}:usage", count=1)[0][1][b"row"]


@pytest.mark.parametrize("user", ['quo"te', "é", "back\\slash", "u_", "{acme}"])
async def test_a_user_of_any_name_is_found_and_no_other(either_store_url: str, store: Store, user: str) -> None:
    now = await running_hour(store)
    others = [None, f"{user} ", user + user, user[:-1] + "x"]
    settle(either_store_url, *((now * HOUR, record(n, user=one)) for n, one in enumerate([user, *others])))
    with redis.Redis.from_url(either_store_url) as client:
        client.xadd("{acme}:usage", {"row": msgspec.json.encode(record(5, model=user, team=user, user=None))})
    assert await erase(store, "acme", user) == Erased(1, 3)
    assert {entry.record.user async for entry in rows(store, "acme")} == {ERASED, *others}
    found = {one.group[0] for one in await totals(store, "user")}
    assert found == {ERASED, "", *others[1:]}


async def test_a_group_is_added_to_that_of_who_was_erased_before(either_store_url: str, store: Store) -> None:
    now = await running_hour(store)
    settle(either_store_url, (now * HOUR, record(1, user=ANN)), (now * HOUR, record(2, user=BOB)))
    assert await erase(store, "acme", ANN) == Erased(1, 3)
    assert await erase(store, "acme", BOB) == Erased(1, 3)
    (found,) = await totals(store, "user")
    assert (found.group, found.counters["input_tokens"], found.counters["requests"]) == ((ERASED,), 203, 2)
    with redis.Redis.from_url(either_store_url) as client:
        for grain in GRAINS:
            assert list(client.hgetall(sums_key("acme", grain, bucket(grain, now)))) == [
                group_of(record(user=ERASED)).encode()
            ]


async def test_to_erase_twice_is_to_erase_once(either_store_url: str, store: Store) -> None:
    await filled(either_store_url, store)
    await erase(store, "acme", ANN)
    with redis.Redis.from_url(either_store_url) as client:
        before = contents(client)
        assert await erase(store, "acme", ANN) == Erased(0, 0)
        assert contents(client) == before


@pytest.mark.parametrize("user", ["", ERASED])
async def test_nobody_cannot_be_erased(store: Store, user: str) -> None:
    with pytest.raises(ValueError, match="expected one as the rows have it"):
        await erase(store, "acme", user)


async def test_an_unknown_user_and_an_unknown_organisation_are_no_error(either_store_url: str, store: Store) -> None:
    await filled(either_store_url, store, 10)
    assert await erase(store, "acme", "u_nobody") == Erased(0, 0)
    assert await erase(store, "nobody", ANN) == Erased(0, 0)


class Killed(Exception):
    pass


@pytest.mark.parametrize("lives", [0, 1, 2, 5, 12, 19, 26, 33, 40])
async def test_an_erasure_that_is_killed_anywhere_is_finished_by_the_next(
    store_url: str, monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    store = Store(store_url, deadline=5)
    now = await filled(store_url, store, 60)
    whole = await totals(store, "team", "day")
    run, calls = store.run, 0

    async def dies(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > lives:
            raise Killed
        return await run(*given)

    monkeypatch.setattr(store, "run", dies)
    with pytest.raises(Killed):
        await erase(store, "acme", ANN)
    monkeypatch.undo()
    assert await totals(store, "team", "day") == whole
    with redis.Redis.from_url(store_url) as client:
        assert [key for key, text in contents(client).items() if ANN in text]
        if lives % 2:  # and somebody goes on in the meantime
            client.eval(*settlement(record(9, user=ANN), now * HOUR, "*"))
            whole = await totals(store, "team", "day")
        await erase(store, "acme", ANN)
        assert not [key for key, text in contents(client).items() if ANN in text and not key.startswith(b"{zoo}")]
    assert await totals(store, "team", "day") == whole
    assert (await reconcile(store, "acme")).differences == []
    await store.aclose()


async def test_a_step_that_is_sent_twice_changes_nothing_more(
    either_store_url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a deadline, or by two who erase at once: each row is there once, each amount too."""
    await filled(either_store_url, store, 60)
    whole, count = await totals(store, "team", "day"), len([entry async for entry in rows(store, "acme")])
    run, again = store.run, []

    async def twice(*given: Any) -> Any:
        answer = await run(*given)
        again.append(await run(*given))
        return answer

    monkeypatch.setattr(store, "run", twice)
    assert (await erase(store, "acme", ANN)).rows == 26
    assert set(again) == {0}
    assert len([entry async for entry in rows(store, "acme")]) == count
    assert await totals(store, "team", "day") == whole
    assert (await reconcile(store, "acme")).differences == []


async def test_what_is_settled_meanwhile_is_not_lost_and_erased_by_the_next(
    either_store_url: str, store: Store
) -> None:
    writer = Store(either_store_url, deadline=5)
    await filled(either_store_url, store)
    written = 0

    async def write() -> None:
        nonlocal written
        while not leaving():
            at = await running_hour(writer) * HOUR
            await writer.client.eval(*settlement(record(written % 7, user=ANN), at, "*"))
            written += 1

    writing = [asyncio.ensure_future(write()) for _ in range(3)]
    for _ in range(4):
        await erase(store, "acme", ANN)
    for one in writing:
        one.cancel()
    await asyncio.wait(writing)
    await writer.aclose()
    assert written > 20
    await erase(store, "acme", ANN)
    (whole,) = await totals(store)
    assert 256 + written <= whole.counters["requests"] <= 256 + written + 3  # three may have been under way
    with redis.Redis.from_url(either_store_url) as client:
        assert not [key for key, text in contents(client).items() if ANN in text and not key.startswith(b"{zoo}")]
    assert (await reconcile(store, "acme")).differences == []


async def test_who_reads_as_a_group_sees_the_row_that_was_replaced_once_it_is_there(
    either_store_url: str, store: Store
) -> None:
    now = await running_hour(store)
    settle(either_store_url, *((now * HOUR, record(number, user=ANN)) for number in range(3)))
    with redis.Redis.from_url(either_store_url, decode_responses=True) as client:
        client.xgroup_create("{acme}:usage", "archive", "0")
        client.xreadgroup("archive", "c", {"{acme}:usage": ">"}, count=1)
        await erase(store, "acme", ANN)
        found: Any = client.xreadgroup("archive", "c", {"{acme}:usage": ">"})
    (entries,) = found.values() if isinstance(found, dict) else [found[0][1]]
    read = [msgspec.json.decode(fields["row"], type=UsageRecord) for _, fields in entries]
    assert read == [record(number, user=ERASED) for number in range(3)]


async def test_sums_are_kept_as_long_as_before(either_store_url: str, store: Store) -> None:
    now = await running_hour(store)
    settle(either_store_url, (now * HOUR, record(1, user=ANN)))
    key = sums_key("acme", "month", bucket("month", now))
    with redis.Redis.from_url(either_store_url) as client:
        client.expire(key, 1000)
        await erase(store, "acme", ANN)
        assert 900 < client.ttl(key) <= 1000


async def test_rows_of_the_last_moment_of_a_month_stay_in_it(either_store_url: str, store: Store) -> None:
    begin = hours("month", bucket("month", await running_hour(store))).start * HOUR
    settle(either_store_url, (begin - 1, record(1, user=ANN)), (begin, record(2, user=ANN)))
    before = await totals(store, "month")
    await erase(store, "acme", ANN)
    assert await totals(store, "month") == before
    kept = fold([entry async for entry in rows(store, "acme")])
    numbers = sorted(number for grain, number in kept if grain == "month")
    assert numbers == [bucket("month", begin // HOUR) - 1, bucket("month", begin // HOUR)]
    assert (await reconcile(store, "acme")).differences == []


async def test_amounts_beyond_32_bits_stay_exact(either_store_url: str, store: Store) -> None:
    now = await running_hour(store)
    large = record(user=ANN, **dict.fromkeys(COUNTERS, 2**52 - 1))
    settle(either_store_url, (now * HOUR, large), (now * HOUR, record(user=ERASED, **dict.fromkeys(COUNTERS, -1))))
    await erase(store, "acme", ANN)
    (found,) = await totals(store, "user")
    assert found.counters == dict.fromkeys(COUNTERS, 2**52 - 2)


async def test_a_dead_letter_keeps_all_but_its_user(either_store_url: str, store: Store) -> None:
    await filled(either_store_url, store, 20)
    with redis.Redis.from_url(either_store_url) as client:
        await ensure(store, ["acme"], ["archive"])
        rows = [record(number, user=user) for number, user in enumerate((ANN, BOB, ANN))]
        for row in rows:
            letter = {"row": msgspec.json.encode(row), "error": "no", "entry": "1700000000000-7"}
            client.xadd(dead_letters("acme", "archive"), letter)
        await erase(store, "acme", ANN)
        assert not any(ANN in held for key, held in contents(client).items() if key.startswith(b"{acme}"))
        letters: Any = client.xrange(dead_letters("acme", "archive"))
    found = [msgspec.json.decode(fields[b"row"], type=UsageRecord) for _, fields in letters]
    assert sorted((row.id, row.user) for row in found) == sorted(
        (row.id, ERASED if row.user == ANN else row.user) for row in rows
    )
    assert all((fields[b"error"], fields[b"entry"]) == (b"no", b"1700000000000-7") for _, fields in letters)
    assert {fields.get(b"at") for _, fields in letters} == {None, b"1700000000000"}


async def test_without_a_store_nothing_is_erased() -> None:
    away = Store("unix:///nowhere/at/all", deadline=0.5)
    with pytest.raises(StoreUnavailable):
        await erase(away, "acme", ANN)
    await away.aclose()


async def test_in_a_cluster_a_user_is_erased_where_the_organisation_is() -> None:
    with stores.cluster(_server_binary()) as cluster:
        store = Store(cluster.url, deadline=5)
        now = await running_hour(store)
        for name in ("acme", "zoo", "org3"):
            row = record(1, organisation=name, user=ANN)
            await store.call(partial(store.client.eval, *settlement(row, now * HOUR, "*")))
            assert await erase(store, name, ANN) == Erased(1, 3)
            assert [entry.record.user async for entry in rows(store, name)] == [ERASED]
            assert (await reconcile(store, name)).differences == []
        await store.aclose()


async def test_a_ledger_is_not_taken_for_trimmed_because_somebody_was_erased(
    either_store_url: str, store: Store
) -> None:
    """Rows that were replaced are gone, too; the first hour is compared all the same."""
    now = await running_hour(store)
    settle(either_store_url, *((now * HOUR, record(number, user=user)) for number, user in enumerate([ANN, BOB])))
    await erase(store, "acme", ANN)
    with redis.Redis.from_url(either_store_url) as client:
        client.hset(sums_key("acme", "hour", now), "[]", msgspec.msgpack.encode([1] * 6))
    assert [one[:3] for one in (await reconcile(store, "acme")).differences] == [("hour", now, "[]")]
