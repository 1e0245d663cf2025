"""What is learned of models and teams: bytes a token, and the length that 95 of 100 answers have at most."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway import learned
from gateway.learned import Learned

MODEL, TEAM = "accounts/acme/models/llama", "red"


def read(texts: list[tuple[int, int]]) -> Learned:
    """What is learned from inputs of so many bytes and tokens."""
    found = Learned()
    for size, tokens in texts:
        found.learn(TEAM, MODEL, input_bytes=size, input_tokens=tokens, output_tokens=0, answers=0)
    return found


def answered(lengths: list[int]) -> Learned:
    """What is learned from answers of so many tokens."""
    found = Learned()
    for length in lengths:
        found.learn(TEAM, MODEL, input_bytes=0, input_tokens=0, output_tokens=length, answers=1)
    return found


# — bytes per token


def test_nothing_is_known_at_first() -> None:
    assert Learned().bytes_per_token(MODEL) == 4.0
    assert Learned().expected_output(TEAM, MODEL) is None
    assert repr(Learned()) == "<Learned of 0 models, 0 pairs of team and model>"


@pytest.mark.parametrize("bytes_per_token", [0.7, 1.5, 3.2, 5.0, 12.0])
@pytest.mark.parametrize("size", [60, 2_000, 400_000])
def test_what_a_model_reports_is_learned_within_some_hundred_requests(size: int, bytes_per_token: float) -> None:
    found = read([(size, round(size / bytes_per_token))] * 500)
    assert found.bytes_per_token(MODEL) == pytest.approx(bytes_per_token, rel=0.05)


def test_a_change_is_followed_within_some_hundred_requests() -> None:
    before, after = [(4_000, 1_000)] * 3_000, [(4_000, 2_000)]
    assert read(before + after * 100).bytes_per_token(MODEL) < 3.1
    assert read(before + after * 500).bytes_per_token(MODEL) == pytest.approx(2.0, rel=0.05)


def test_long_texts_tell_more_than_short_ones() -> None:
    """A greeting is all template: eight short ones for each long one move the figure by little."""
    found = read([*[(30, 40)] * 8, (3_000, 750)] * 100)
    assert 3.0 < found.bytes_per_token(MODEL) < 4.0


@pytest.mark.parametrize("absurd", [(400, 10**9), (10**9, 1), (10**9, 10**9), (1, 10**9)])
@pytest.mark.parametrize(("size", "least", "most"), [(4_000, 3.55, 4.5), (40, 2.0, 8.0)])
def test_no_absurd_report_moves_the_figure_by_much(
    absurd: tuple[int, int], size: int, least: float, most: float
) -> None:
    """By an eighth among texts of thousands of bytes, by half where it is longer than all others together."""
    usual = [(size, size // 4)] * 1_000
    assert least < read([*usual, absurd]).bytes_per_token(MODEL) < most
    assert read([*usual, absurd, *usual]).bytes_per_token(MODEL) == pytest.approx(4.0, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 10**9))))
def test_whatever_is_reported_a_token_has_half_a_byte_to_sixteen(texts: list[tuple[int, int]]) -> None:
    assert 0.5 <= read(texts).bytes_per_token(MODEL) <= 16.0


@pytest.mark.parametrize(("text", "expected"), [((1_000, 10_000), 0.5), ((10_000, 10), 16.0)])
def test_even_if_it_is_said_again_and_again(text: tuple[int, int], expected: float) -> None:
    assert read([text] * 2_000).bytes_per_token(MODEL) == pytest.approx(expected)


def test_what_tells_nothing_of_the_input_teaches_nothing() -> None:
    """Prompts that came as tokens have no bytes, and some backends report zeros."""
    assert read([(0, 100), (100, 0)] * 100).bytes_per_token(MODEL) == 4.0


# — the length of answers


def test_an_answer_in_twenty_cannot_be_known_from_nineteen() -> None:
    assert answered([100] * 19).expected_output(TEAM, MODEL) is None
    assert answered([100] * 20).expected_output(TEAM, MODEL) == 108


def test_the_length_is_of_one_answer_of_all_that_were_asked_for() -> None:
    found = Learned()
    for _ in range(20):
        found.learn(TEAM, MODEL, input_bytes=0, input_tokens=0, output_tokens=8 * 91 + 1, answers=8)
    assert found.expected_output(TEAM, MODEL) == 108  # of 91.1, rounded up, and up to the end of its class


def test_the_class_of_a_length_ends_less_than_a_fifth_above_where_it_begins() -> None:
    edges = learned._EDGES
    assert edges[:10] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)
    assert edges[-1] > 10**9  # usage.py believes no more
    assert all(after <= max(before + 2, 1.2 * (before + 1)) for before, after in pairwise(edges))


DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "all alike": lambda r: 500,
    "uniform": lambda r: r.uniform(0, 1000),
    "exponential": lambda r: r.expovariate(1 / 300),
    "log-normal": lambda r: r.lognormvariate(5, 1.5),
    "heavy-tailed": lambda r: 20 * r.paretovariate(1.1),
    "short, and 1 in 10 long": lambda r: 2_000 if r.random() < 0.1 else 10,
    "short, and 1 in 25 long": lambda r: 2_000 if r.random() < 0.04 else 10,
    "mostly nothing": lambda r: r.choice([0, 0, 0, 1]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_of_stationary_answers_no_more_than_five_in_a_hundred_are_longer(name: str) -> None:
    draw, r = DISTRIBUTIONS[name], random.Random(name)
    longer = asked = 0
    for _ in range(20):  # as many teams: most of what is asked of a young one is asked when little is known
        found = Learned()
        for _ in range(1_000):
            length = int(draw(r))
            if (expected := found.expected_output(TEAM, MODEL)) is not None:
                asked += 1
                longer += length > expected
            found.learn(TEAM, MODEL, input_bytes=0, input_tokens=0, output_tokens=length, answers=1)
    assert asked == 20 * 980
    assert longer / asked <= 0.052  # what the draw leaves to chance


@pytest.mark.parametrize("name", ["uniform", "exponential", "log-normal"])
def test_what_is_expected_is_not_much_more_than_it_has_to_be(name: str) -> None:
    draw, r = DISTRIBUTIONS[name], random.Random(name)
    lengths = [int(draw(r)) for _ in range(20_000)]
    found, expected = Learned(), []
    for length in lengths:
        found.learn(TEAM, MODEL, input_bytes=0, input_tokens=0, output_tokens=length, answers=1)
        expected.append(found.expected_output(TEAM, MODEL) or 0)
    p95 = sorted(lengths)[19_000]
    assert p95 <= mean(expected[1_000:]) < 1.35 * p95


def test_answers_that_become_longer_are_followed_at_once_and_shorter_ones_within_some_hundred() -> None:
    assert answered([10] * 2_000 + [1_000] * 20).expected_output(TEAM, MODEL) == 1024
    assert answered([1_000] * 2_000 + [10] * 900).expected_output(TEAM, MODEL) == 10


@given(st.lists(st.integers(0, 3_000) | st.integers(0, 10**12), min_size=20, max_size=400), st.integers(0, 30))
@example([100] * 60, 25)
def test_the_class_that_is_found_step_by_step_is_the_first_that_at_most_five_in_a_hundred_exceed(
    lengths: list[int], light: int
) -> None:
    """Also where weights have become so heavy that all are made light again."""
    found = answered([])
    kept = learned._Lengths()
    kept._weight = learned._HEAVY * learned._KEPT**light
    found._lengths[TEAM, MODEL] = kept
    for length in lengths:
        found.learn(TEAM, MODEL, input_bytes=0, input_tokens=0, output_tokens=length, answers=1)
    weights = [learned._KEPT ** (len(lengths) - i) for i in range(len(lengths))]

    def above(edge: int) -> float:
        return 1 + sum(weight for length, weight in zip(lengths, weights, strict=True) if length > edge)

    allowed = 0.05 * (1 + sum(weights))
    expected = found.expected_output(TEAM, MODEL)
    assert expected is not None
    place = learned._EDGES.index(expected)
    assert above(expected) <= allowed + 1e-6 or place == len(learned._EDGES) - 1
    assert place == 0 or above(learned._EDGES[place - 1]) > allowed - 1e-6


# — how much is kept


def test_teams_and_models_are_learned_apart() -> None:
    found = answered([10] * 20)
    assert found.expected_output("blue", MODEL) is None
    assert found.expected_output(TEAM, "other") is None
    found = read([(100, 100)] * 500)
    assert found.bytes_per_token("other") == 4.0


def test_the_pair_that_was_not_heard_of_longest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "_MOST", 3)
    found = Learned()

    def learn(model: str) -> None:
        for _ in range(20):
            found.learn(TEAM, model, input_bytes=100, input_tokens=100, output_tokens=10, answers=1)

    for model in ("a", "b", "c", "a", "d"):
        learn(model)
    assert [found.expected_output(TEAM, model) for model in "abcd"] == [10, None, 10, 10]
    assert [found.bytes_per_token(model) < 4 for model in "abcd"] == [True, False, True, True]


def test_ten_thousand_pairs_are_kept() -> None:
    found = Learned()
    for i in range(10_050):
        found.learn(f"team {i}", f"model {i}", input_bytes=1, input_tokens=1, output_tokens=1, answers=1)
    assert repr(found) == "<Learned of 10000 models, 10000 pairs of team and model>"
