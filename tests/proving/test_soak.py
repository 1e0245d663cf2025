"""A small run of the soak: after half a minute of load all is as it was before."""

from __future__ import annotations

import pytest

from tests.proving.soak import soak


@pytest.mark.timeout(300)
async def test_under_load_nothing_grows_and_nothing_is_left_over(store_url: str) -> None:
    assert await soak(store_url, 0.5) == []
