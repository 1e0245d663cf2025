"""The fault matrix is covered: what goes wrong with the store (R), upstreams (U), callers (C) and the gateway (G)."""

from __future__ import annotations

import re

from tests.proving.commands import ROOT

ROWS = {"r": 18, "u": 20, "c": 9, "g": 19}


def test_every_row_of_the_fault_matrix_has_a_test_by_its_number() -> None:
    named = set[str]()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for numbers in re.findall(r"^(?:async )?def test_((?:[a-z]\d\d_)+)", file.read_text("utf-8"), re.MULTILINE):
            named |= {*numbers.rstrip("_").split("_")}
    expected = {f"{letter}{number:02}" for letter, count in ROWS.items() for number in range(1, count + 1)}
    assert expected - named == set()
