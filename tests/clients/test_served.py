"""What a client sees of a gateway that is told to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients import served
from tests.clients.conftest import policies
from tests.clients.sdks import Sdk, rest, take, text

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("sdk", ["openai"], indirect=True)
async def test_a_stream_ends_well_though_its_gateway_is_told_to_stop(
    sdk: Sdk, backend: served.Backend, tmp_path: Path
) -> None:
    with served.gateway(tmp_path, policies(backend.url)) as gateway:
        async with sdk.caller(gateway.url, gateway.key("roomy")) as caller:
            stream = await caller.ask("to be or not #pace=0.03", max_tokens=12, stream=True)
            begun = await take(stream, 2)
            gateway.terminate()
            chunks = [*begun, *await rest(stream)]
            (line,) = await gateway.log.wait(caller.called, 1)
    assert "".join(map(text, chunks)) == " ".join(["to be or not"] * 3)
    assert (line["outcome"], line["output_tokens"]) == ("complete", 12)
