"""A memory that forgets."""

from __future__ import annotations

from gateway.recent import Recent


def test_what_is_remembered_is_bounded_and_what_is_in_use_stays() -> None:
    recent: Recent[str, int] = Recent(100)
    recent.put("in use", -1)
    for number in range(10_000):
        recent.put(str(number), number)
        assert recent.get("in use") == -1
        assert len(recent) <= 100
    assert [recent.get(str(number)) for number in range(9_960, 10_000)] == list(range(9_960, 10_000))
    assert recent.get("0") is None


def test_the_newest_value_counts_wherever_an_older_one_is_remembered() -> None:
    recent: Recent[str, int] = Recent(4)
    recent.put("a", 1)
    recent.put("b", 2)
    recent.put("a", 3)
    assert recent.get("a") == 3
    recent.put("c", 4)
    assert recent.get("a") == 3


def test_what_is_forgotten_is_gone_from_both_generations() -> None:
    recent: Recent[str, int] = Recent(4)
    for number, key in enumerate("abc"):
        recent.put(key, number)
    recent.put("a", 9)
    recent.forget("a")
    assert (recent.get("a"), recent.get("c"), bool(recent)) == (None, 2, True)
