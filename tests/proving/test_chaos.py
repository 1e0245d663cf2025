"""The chaos proxy does what its words say."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.proving.chaos import Chaos

DATA = bytes(range(256)) * 4


@asynccontextmanager
async def mirror() -> AsyncIterator[str]:
    """The address of a party that sends back what it gets."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def connected(chaos: Chaos) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", chaos.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@pytest.fixture
async def chaos() -> AsyncIterator[Chaos]:
    async with mirror() as target, Chaos(target) as chaos:
        yield chaos


async def sent(chaos: Chaos, data: bytes = DATA) -> bytes:
    """What comes back of it, to the end of the line."""
    async with connected(chaos) as (reader, writer):
        writer.write(data)
        writer.write_eof()
        return await reader.read()


async def test_without_a_fault_it_is_a_wire(chaos: Chaos) -> None:
    assert await sent(chaos) == DATA
    await chaos.idle.wait()
    assert (chaos.connections, chaos.live) == (1, 0)
    assert (chaos.up.carried, chaos.down.carried) == (len(DATA), len(DATA))


async def test_a_cut_is_a_clean_end_after_exactly_so_many_bytes(chaos: Chaos) -> None:
    chaos.down.cut_after = 300
    assert await sent(chaos) == DATA[:300]


async def test_a_reset_is_no_end(chaos: Chaos) -> None:
    chaos.down.reset_after = 300
    async with connected(chaos) as (reader, writer):
        writer.write(DATA)
        assert await reader.readexactly(300) == DATA[:300]
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_a_way_is_split_into_pieces_that_arrive_one_by_one(chaos: Chaos) -> None:
    """With a delay between them: a reader that reads what is there gets one piece at a time."""
    chaos.down.split, chaos.down.delay = 100, 0.02
    sizes: list[int] = []
    async with connected(chaos) as (reader, writer):
        writer.write(DATA)
        while sum(sizes) < len(DATA):
            sizes.append(len(await reader.read(65536)))
    assert max(sizes) < len(DATA)
    assert len(sizes) > 2


async def test_a_throttle_and_a_delay_take_their_time(chaos: Chaos) -> None:
    """A lower bound only: a late machine is later."""
    loop = asyncio.get_running_loop()
    chaos.up.throttle, chaos.down.delay = len(DATA) / 0.1, 0.1
    began = loop.time()
    assert await sent(chaos) == DATA
    assert loop.time() - began >= 0.19


async def test_garbage_is_put_in_where_it_is_told(chaos: Chaos) -> None:
    chaos.up.garbage = (10, b"noise")
    assert await sent(chaos) == DATA[:10] + b"noise" + DATA[10:]


async def test_a_byte_is_flipped_where_it_is_told(chaos: Chaos) -> None:
    chaos.up.flip = (10, 0xFF)
    assert await sent(chaos) == DATA[:10] + bytes([DATA[10] ^ 0xFF]) + DATA[11:]


async def test_a_black_hole_carries_nothing_and_a_connection_that_lost_something_stays_lost(chaos: Chaos) -> None:
    chaos.down.black_hole = True
    async with connected(chaos) as (reader, writer):
        writer.write(DATA)
        while not chaos.up.carried:
            await asyncio.sleep(0.001)
        done, waits = await asyncio.wait((asyncio.ensure_future(reader.read(1)),), timeout=0.1)
        assert not done
        chaos.down.black_hole = False
        writer.write(DATA)
        done, waits = await asyncio.wait(waits, timeout=0.1)
        assert not done
        assert await sent(chaos) == DATA
        for read in waits:
            read.cancel()


async def test_who_is_refused_is_accepted_again_on_the_same_port(chaos: Chaos) -> None:
    """Connections that were open are not touched."""
    port = chaos.port
    async with connected(chaos) as (reader, writer):
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        await chaos.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"2")
        assert await reader.readexactly(1) == b"2"
        await chaos.accept()
        assert (chaos.port, await sent(chaos)) == (port, DATA)


async def test_who_is_turned_away_is_counted_and_reset_and_open_connections_are_not_touched(chaos: Chaos) -> None:
    async with connected(chaos) as (reader, writer):
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        chaos.turn_away = True
        with pytest.raises(ConnectionResetError):
            await sent(chaos)
        writer.write(b"2")
        assert await reader.readexactly(1) == b"2"
        chaos.turn_away = False
        assert await sent(chaos) == DATA
        assert (chaos.connections, chaos.live) == (3, 1)
        assert chaos.arrivals == sorted(chaos.arrivals)


async def test_every_open_connection_is_hung_up_on_and_the_next_one_is_not(chaos: Chaos) -> None:
    async with connected(chaos) as (one, first), connected(chaos) as (other, second):
        for reader, writer in ((one, first), (other, second)):
            writer.write(b"1")
            assert await reader.readexactly(1) == b"1"
        chaos.hang_up()
        for reader in (one, other):
            with pytest.raises(ConnectionResetError):
                await reader.read()
        await chaos.idle.wait()
        assert await sent(chaos) == DATA


async def test_who_is_led_elsewhere_meets_another_party_by_a_new_connection_only(chaos: Chaos) -> None:
    async def deny(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"another")
        writer.close()

    server = await asyncio.start_server(deny, "127.0.0.1", 0)
    async with connected(chaos) as (reader, writer):
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        chaos.lead_to(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with connected(chaos) as (new, _):
            assert await new.read() == b"another"
        writer.write(b"2")
        assert await reader.readexactly(1) == b"2"
    server.close()


async def test_the_other_party_may_be_a_unix_socket() -> None:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        path = str(Path(folder) / "s")

        async def pong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(4))
            writer.close()

        server = await asyncio.start_unix_server(pong, path)
        async with Chaos(f"unix://{path}") as chaos:
            assert chaos.url == f"redis://127.0.0.1:{chaos.port}"
            assert await sent(chaos, b"PING") == b"PING"
        server.close()


async def test_a_target_that_refuses_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with Chaos(closed) as chaos, connected(chaos) as (reader, _):
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        await chaos.idle.wait()
