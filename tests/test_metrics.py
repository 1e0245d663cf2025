"""Numbers of several processes are told as one, and no process that dies takes any with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway import metrics
from gateway.metrics import Counters, Gauges, Histograms, Metrics
from tests.proving.stores import full, small_disk

Samples: TypeAlias = dict[tuple[str, ...], float]


def told(folder: Path) -> Samples:
    """What is told now, after a way through Prometheus's text: each name with the values of its labels."""
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(metrics._text(metrics._gather(folder)).decode())
        for sample in family.samples
    }


class Process:
    """The numbers of one process, as far as files can tell."""

    def __init__(self, folder: Path) -> None:
        self.asked = Counters("asked_total", "what was asked", "who")
        self.times = Histograms("times_seconds", "how long it took", (0.1, 1, 2.5), "who")
        self.under_way = Gauges("under_way", "now", "livesum")
        self.up = Gauges("up", "whether it is", "livemin", "what")
        self.info = Gauges("kind_info", "which", "livemax", "kind")
        self.metrics = Metrics(folder, self.asked, self.times, self.under_way, self.up, self.info)

    def count(self, who: str = "ann", number: int = 1) -> None:
        for _ in range(number):
            self.asked[(who,)].add()
        self.metrics.flush()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    found = Process(tmp_path / "metrics")
    yield found
    found.metrics.close()


def sets(folder: Path) -> int:
    return len(list(folder.glob("counter_*.db")))


# — several processes


def test_what_several_processes_count_is_added_up(tmp_path: Path) -> None:
    both = [Process(tmp_path) for _ in range(2)]
    for place, one in enumerate(both):
        one.asked[("ann",)].add(2)
        one.asked[(f"only-{place}",)].add(0.5)
        for seconds in (0.1, 0.1000001, 7):
            one.times[("ann",)].observe(seconds)
        one.metrics.flush()
    assert sets(tmp_path) == 2
    found = told(tmp_path)
    assert found == {
        ("asked_total", "ann"): 4,
        ("asked_total", "only-0"): 0.5,
        ("asked_total", "only-1"): 0.5,
        ("times_seconds_bucket", "0.1", "ann"): 2,
        ("times_seconds_bucket", "1.0", "ann"): 4,
        ("times_seconds_bucket", "2.5", "ann"): 4,
        ("times_seconds_bucket", "+Inf", "ann"): 6,
        ("times_seconds_count", "ann"): 6,
        ("times_seconds_sum", "ann"): pytest.approx(14.4, abs=1e-5),
    }
    for one in both:
        one.metrics.close()


def test_gauges_are_added_or_the_least_or_the_most_of_all(tmp_path: Path) -> None:
    both = [Process(tmp_path) for _ in range(2)]
    for place, one in enumerate(both):
        one.under_way.set({(): 3 + place})
        one.up.set({("a",): place, ("b",): 1})
        one.info.set({("same",): 1, (f"own-{place}",): 1})
        one.metrics.flush()
    assert told(tmp_path) == {
        ("under_way",): 7,
        ("up", "a"): 0,
        ("up", "b"): 1,
        ("kind_info", "same"): 1,
        ("kind_info", "own-0"): 1,
        ("kind_info", "own-1"): 1,
    }
    for one in both:
        one.metrics.close()


def test_a_gauge_that_is_not_set_any_more_is_not_told_any_more(process: Process, tmp_path: Path) -> None:
    process.up.set({("gone",): 1, ("stays",): 1})
    process.metrics.flush()
    process.up.set({("stays",): 0})
    process.metrics.flush()
    assert told(tmp_path / "metrics") == {("up", "stays"): 0}


COUNTS = """
import sys, time
from pathlib import Path
from gateway.metrics import Counters, Gauges, Metrics
counters, gauges = Counters("asked_total", "", "who"), Gauges("under_way", "", "livesum")
metrics = Metrics(Path(sys.argv[1]), counters, gauges)
counters[("ann",)].add(5)
gauges.set({(): 3})
metrics.flush()
print("told", flush=True)
time.sleep(60)
"""


def test_of_a_process_that_is_killed_the_counters_stay_and_the_gauges_go(process: Process, tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    process.under_way.set({(): 1})
    process.count(number=2)
    environment = {**os.environ, "PYTHONPATH": str(Path(metrics.__file__).parents[1])}
    command = [sys.executable, "-c", COUNTS, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"told\n"
        assert told(folder) == {("asked_total", "ann"): 7, ("under_way",): 4}
        other.send_signal(signal.SIGKILL)
    assert told(folder) == {("asked_total", "ann"): 7, ("under_way",): 1}
    heir = Process(folder)
    heir.count(number=1)
    assert told(folder) == {("asked_total", "ann"): 8, ("under_way",): 1}
    assert sets(folder) == 2
    heir.metrics.close()


def test_restarts_lose_no_count_and_leave_no_files(tmp_path: Path) -> None:
    for number in range(20):
        one = Process(tmp_path)
        one.times[("ann",)].observe(number)
        one.under_way.set({(): 1})
        one.count()
        one.count(f"{number % 3}")
        one.metrics.close()
    found = told(tmp_path)
    assert found[("asked_total", "ann")] == 20
    assert [found[("asked_total", f"{who}")] for who in range(3)] == [7, 7, 6]
    assert (found[("times_seconds_count", "ann")], found[("times_seconds_sum", "ann")]) == (20, sum(range(20)))
    assert ("under_way",) not in found
    assert sets(tmp_path) == 1


def test_who_lives_keeps_what_is_his(tmp_path: Path) -> None:
    first, second, third = (Process(tmp_path) for _ in range(3))
    for one in (first, second, third):
        one.count()
    second.metrics.close()
    fourth, fifth = Process(tmp_path), Process(tmp_path)
    for one in (fourth, fifth, first, third):
        one.count()
    assert told(tmp_path)[("asked_total", "ann")] == 7
    assert sets(tmp_path) == 4
    for one in (first, third, fourth, fifth):
        one.metrics.close()


# — files


def test_what_is_counted_while_it_is_written_is_written_the_next_time(process: Process, tmp_path: Path) -> None:
    asked = process.asked[("ann",)]
    ended = threading.Event()

    def flush() -> None:
        while not ended.is_set():
            process.metrics.flush()

    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(flush)
        seen = [0.0]
        try:
            for number in range(300):
                asked.add()
                process.times[(f"{number}",)].observe(1)  # the files grow
                if number % 20 == 0:
                    seen.append(told(tmp_path / "metrics").get(("asked_total", "ann"), 0))
                    assert seen[-1] <= number + 1
        finally:
            ended.set()
        writing.result()
    assert seen == sorted(seen)
    process.metrics.flush()
    samples = told(tmp_path / "metrics")
    assert samples[("asked_total", "ann")] == 300
    assert sum(value for name, value in samples.items() if name[0] == "times_seconds_count") == 300


def test_a_folder_that_cannot_be_written_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.write_text("no folder")
    one = Process(folder)
    for _ in range(2):
        with pytest.raises(OSError, match="exists"):
            one.count()
    folder.unlink()
    one.count()
    assert told(folder) == {("asked_total", "ann"): 3}
    one.metrics.close()


def test_a_write_that_fails_is_made_up_for(process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process.count()
    write = os.pwrite
    failures: list[int | OSError] = [3, OSError(28, "no space left"), 0, OSError(5, "an input or output error")]

    def fails(descriptor: int, data: bytes, place: int) -> int:
        """Takes some bytes, and then none."""
        failure = failures.pop(0)
        if not isinstance(failure, int):
            raise failure
        return write(descriptor, data[:failure], place)

    monkeypatch.setattr(os, "pwrite", fails)
    for who in ("ann", "bob"):
        with pytest.raises(OSError, match=r"space|error"):
            process.count(who)
    monkeypatch.undo()
    assert told(tmp_path / "metrics").get(("asked_total", "ann")) in (1, 2)
    process.metrics.flush()
    assert told(tmp_path / "metrics") == {("asked_total", "ann"): 2, ("asked_total", "bob"): 1}


def test_what_a_full_disk_does_is_told_on_a_full_disk() -> None:
    """Gauges that are told already are told on; a new name, which takes room, is told when there is some."""
    with small_disk() as disk:
        one = Process(disk / "metrics")
        one.up.set({("the spool",): 1})
        one.count()
        with full(disk):
            one.up.set({("the spool",): 0})
            for number in range(100):
                one.asked[(f"somebody, {number} of many",)].add()
            with pytest.raises(OSError, match="No space left"):
                one.count("ann")
            assert told(disk / "metrics")["up", "the spool"] == 0
            one.up.set({("the spool",): 0, ("another",): 1})
            with pytest.raises(OSError, match="No space left"):
                one.metrics.flush()
            assert [name for name in told(disk / "metrics") if name[0] == "up"] == [("up", "the spool")]
        one.metrics.flush()
        samples = told(disk / "metrics")
        assert (samples["up", "another"], samples["asked_total", "ann"], len(samples)) == (1, 2, 103)
        one.metrics.close()


@pytest.mark.parametrize("damage", [b"\0" * 64, b"\xff" * 64, b""], ids=["zeros", "ones", "cut"])
def test_a_damaged_file_is_left_out_and_begun_anew(tmp_path: Path, damage: bytes) -> None:
    damaged, sound = Process(tmp_path), Process(tmp_path)
    for one in (damaged, sound):
        one.count()
    damaged.metrics.close()
    file = tmp_path / "counter_0.db"
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + (damage * len(whole))[: len(whole) - 8])
    assert told(tmp_path) == {("asked_total", "ann"): 1}
    heir = Process(tmp_path)
    heir.count()
    assert told(tmp_path) == {("asked_total", "ann"): 2}
    for one in (heir, sound):
        one.metrics.close()


# — bounds


def test_one_label_too_many_is_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MOST", 3)
    family = Counters("asked_total", "", "who", "what")
    for number in range(100):
        family[(f"{number}", "x")].add()
    family[("0", "x")].add()
    assert {labels: child.value for labels, child in family.items()} == {
        ("0", "x"): 2,
        ("1", "x"): 1,
        ("2", "x"): 1,
        ("other", "other"): 97,
    }


def test_nothing_is_told_where_nobody_has_counted(tmp_path: Path) -> None:
    assert metrics.gathered(tmp_path / "none") == b""
    assert not (tmp_path / "none").exists()


def test_g17_of_a_hundred_who_ask_at_once_one_reads(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.count(number=7)
    state, gather, reads = tmp_path, metrics._gather, []

    def read(folder: Path) -> list[Metric]:
        reads.append(folder)
        return gather(folder)

    monkeypatch.setattr(metrics, "_gather", read)
    monkeypatch.setattr(metrics, "_HOLDS", 60)
    with ThreadPoolExecutor(100) as threads:
        found = list(threads.map(metrics.gathered, [state] * 100))
    assert reads == [state / "metrics"]
    assert len(found) == 100
    assert set(found) == {
        b'# HELP asked_total what was asked\n# TYPE asked_total counter\nasked_total{who="ann"} 7.0\n'
    }
    process.count()
    assert metrics.gathered(state) == found[0]
    monkeypatch.setattr(metrics, "_HOLDS", 0)
    assert b" 8.0\n" in metrics.gathered(state)
