"""The key ring: every worker holds all key records in memory, and hears of changes through a stream of the store.

Identifying a caller costs a hash and a look-up in a dictionary. A revoked key is refused everywhere as soon as the
stream says so, and callers are still known while the store is away. Records hold hashes only.
"""

from __future__ import annotations

import asyncio
import hmac
import random
import re
import time
from collections.abc import Awaitable, Iterable
from datetime import datetime
from typing import Any

import msgspec

from gateway.errors import StoreUnavailable, Unauthenticated
from gateway.identity import REFUSED, Principal, credential, hash_key, key_id_of, new_key, stored_user
from gateway.store import Script, Store, StoreError, leaving
from gateway.topology import Failures

_RECORDS = "{gateway}:keys"
_CHANGES = "{gateway}:key-changes"
PEPPER = "{gateway}:pepper"  # by which gateways know whether their secrets are the same
# Changes that a worker may miss while it is cut off; it reads everything anew when it comes back.
_CHANGES_KEPT = 10_000
_NEWS_MS = 1_000  # and so the most that a stop may take whose cancellation is lost, see store.leaving
_RETRY_SECONDS = 0.2


class KeyRecord(msgspec.Struct, frozen=True):
    """What is known of a key. Times are seconds since 1970; `hash` is HMAC-SHA256 under the pepper, in hex."""

    id: str
    hash: str
    team: str
    user: str | None
    name: str | None
    models: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None = None

    def state(self, now: float) -> str:
        """active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"

    def public(self, now: float) -> dict[str, object]:
        """The record as programs read it: without the hash, times in RFC 3339."""
        times = {
            name: None if at is None else datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")
            for name, at in (("created", self.created), ("expires", self.expires), ("revoked", self.revoked))
        }
        return {
            "id": self.id,
            "team": self.team,
            "user": self.user,
            "name": self.name,
            "models": list(self.models),
            "state": self.state(now),
            **times,
        }


_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def expiry(text: str, now: float) -> float:
    """When a key expires that is to last so long (30d), or until then (2027-01-31): seconds since 1970. Raises
    ValueError."""
    lasting = re.fullmatch(r"([0-9]{1,5})([mhdw])", text)
    if lasting:
        return now + int(lasting[1]) * _UNITS[lasting[2]]
    try:
        at = datetime.fromisoformat(text).astimezone().timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(f'"{text}" is no time, expected for example 30d, 12h or 2027-01-31') from None
    if at <= now:
        raise ValueError(f'"{text}" is past, expected a time to come')
    return at


_decode = msgspec.json.Decoder(KeyRecord).decode


def _read(text: bytes) -> KeyRecord:
    try:
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as broken:
        raise StoreError(f"a record of {_RECORDS} is no key record: {broken}") from broken


class KeyRing:
    """All keys of a store. `pepper` is the secret that keys are hashed with."""

    def __init__(self, store: Store, pepper: bytes) -> None:
        self._store = store
        self._pepper = pepper
        self._records: dict[str, KeyRecord] = {}
        self._principals: dict[str, tuple[bytes, float, Principal]] = {}
        self._last = b"0-0"
        self.loaded = False
        self._read = False  # once it was, callers are known whatever happens to the store
        self._keep = Script("keep")

    def __repr__(self) -> str:
        return f"<KeyRing {len(self._principals)} usable of {len(self._records)} keys>"

    @property
    def known(self) -> bool:
        """Whether the keys were read at least once, so that callers are known."""
        return self._read

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        """Who sent these headers. Raises Unauthenticated, in the same words and after the same work for every key; and
        StoreUnavailable as long as no key could be read at all."""
        key = credential(headers)
        key_id = key_id_of(key)
        if key_id is None:
            raise Unauthenticated(REFUSED)
        if not self._read:
            raise StoreUnavailable("the keys could not be read yet: the store of keys is away", retry_after=1)
        digest = hash_key(self._pepper, key).encode()
        known, expires, principal = self._principals.get(key_id, _NOBODY)
        if not hmac.compare_digest(digest, known) or principal is None or expires <= time.time():
            raise Unauthenticated(REFUSED)
        return principal

    def stored_user(self, organisation: str, name: str, plain: bool) -> str:
        """What stands for a user in the store, see identity.stored_user."""
        return stored_user(self._pepper, organisation, name, plain)

    # — reading

    async def load(self) -> None:
        """Read all records. Raises StoreUnavailable, and StoreError where keys were made under another pepper."""
        await self._check_pepper()
        latest = await self._store.call(lambda: self._store.client.xrevrange(_CHANGES, count=1))
        self._last = latest[0][0] if latest else b"0-0"
        records = [_read(text) for text in await self._store.call(lambda: self._store.client.hvals(_RECORDS))]
        self._records, self._principals = {}, {}
        for record in records:
            self._take(record)
        self.loaded = self._read = True

    async def follow(self) -> None:
        """Take over every change as it is made, for ever; what was missed is read anew."""
        while not leaving():
            try:
                if not self.loaded:
                    await self.load()
                news = await self._store.wait(self._news)
                for entry, fields in news.get(_CHANGES.encode(), ()):
                    self._last = entry
                    self._take(_read(fields[b"record"]))
            except (*Failures, StoreUnavailable, StoreError):
                self.loaded = False
                await self._store.back()
                await asyncio.sleep(random.uniform(0.5, 1.0) * _RETRY_SECONDS)  # many workers, one store

    def _news(self) -> Awaitable[Any]:
        news: Awaitable[Any] = self._store.patient.xread({_CHANGES: self._last}, count=1000, block=_NEWS_MS)
        return news

    def principal(self, key_id: str) -> Principal | None:
        """Whom a key in force stands for, by its id."""
        _, expires, principal = self._principals.get(key_id, _NOBODY)
        return principal if principal is not None and expires > time.time() else None

    def records(self) -> list[KeyRecord]:
        """All records, oldest first."""
        return sorted(self._records.values(), key=lambda record: record.created)

    def _take(self, record: KeyRecord) -> None:
        held = self._records.get(record.id)
        if held is not None and held.revoked is not None:
            return  # for ever: news of it may come before the end of the call that made it
        self._records[record.id] = record
        if record.revoked is not None:
            self._principals.pop(record.id, None)
            return
        expires = float("inf") if record.expires is None else record.expires
        principal = Principal(record.id, record.team, record.user, record.models)
        self._principals[record.id] = (record.hash.encode(), expires, principal)

    async def _check_pepper(self) -> None:
        """Two gateways with different peppers would refuse each other's keys: say so at the start."""
        mine = hash_key(self._pepper, b"gateway pepper")[:16]
        client = self._store.client
        await self._store.call(lambda: client.set(PEPPER, mine, nx=True))
        found = await self._store.call(lambda: client.get(PEPPER))
        if found.decode() != mine:
            raise StoreError(
                "the keys in this store were made under another pepper: set GATEWAY_KEY_PEPPER to the one of the "
                "gateway that made them, or use its state folder"
            )

    # — writing

    async def create(
        self, team: str, *, user: str | None, name: str | None, models: tuple[str, ...], expires: float | None
    ) -> tuple[KeyRecord, str]:
        """A new key: its record, and the key itself, which is shown to its owner and forgotten."""
        key_id, key = new_key()
        record = KeyRecord(
            id=key_id,
            hash=hash_key(self._pepper, key.encode()),
            team=team,
            user=user,
            name=name,
            models=models,
            created=time.time(),
            expires=expires,
        )
        await self._write(record)
        return record, key

    async def revoke(self, key_id: str) -> KeyRecord | None:
        """The record of a key that opens nothing any more, or None where there is no such key."""
        record = self._records.get(key_id)
        if record is None or record.revoked is not None:
            return record
        record = msgspec.structs.replace(record, revoked=time.time())
        await self._write(record)
        return record

    async def _write(self, record: KeyRecord) -> None:
        text = msgspec.json.encode(record)
        await self._store.run(self._keep, (_RECORDS, _CHANGES), (record.id, text, _CHANGES_KEPT))
        self._take(record)


# Compared with when the id is unknown, so that a guess takes as long as a mistake.
_NOBODY: tuple[bytes, float, Principal | None] = (b"0" * 64, 0.0, None)
