"""Numbers that a process counts, and that all processes of a state folder together tell Prometheus.

To count is an addition to a plain number of this process. Once a second what has changed is written to files, in the
format of prometheus_client's multiprocess mode, which adds them up when somebody asks: so who serves has no work with a
scrape, and who is killed has lost a second of counting at most.

Who starts counts on in the files of one that is gone (tallies.py): a counter never falls, whoever dies. Gauges count
while their process lives.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from gateway.tallies import Values, claim, files_in, key_of, sound, whole

if TYPE_CHECKING:
    from prometheus_client import Metric

FOLDER = "metrics"  # in a state folder
OTHER = "other"  # what a label says where it would be one value too many
_MOST = 10_000  # children of a family: policies that change for ever must not fill the memory
_HOLDS = 0.5  # seconds that what was gathered is told again

Labels = tuple[str, ...]
Mode = Literal["livesum", "livemin", "livemax"]  # how the gauges of several processes are one


# — what is counted


class Counter:
    """A number that only grows."""

    __slots__ = ("changed", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.changed = True

    def add(self, amount: float = 1.0) -> None:
        self.value += amount
        self.changed = True

    def raise_to(self, value: float) -> None:
        """Follow a count that somebody else keeps."""
        if value != self.value:
            self.value, self.changed = value, True


class Histogram:
    """How often values were how large: `bounds` are the inclusive upper ends of all buckets but the last."""

    __slots__ = ("bounds", "changed", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.changed = True

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        self.changed = True


T = TypeVar("T", Counter, Histogram)


class Family(dict[Labels, T], Generic[T]):
    """Numbers of one name by the values of their labels: `family[("a", "b")]` is there when it is asked for."""

    kind: str

    def __init__(self, name: str, meaning: str, *labels: str) -> None:
        super().__init__()
        self.name = name
        self.meaning = meaning
        self.labels = labels

    def __missing__(self, values: Labels) -> T:
        if len(self) >= _MOST:
            values = (OTHER,) * len(self.labels)
        return self.setdefault(values, self._new())

    def _new(self) -> T:
        raise NotImplementedError

    def samples(self, child: T) -> Iterator[tuple[str, Mapping[str, str], float]]:
        """The samples of a number: name, labels of its own, value. As many and in the same order every time."""
        raise NotImplementedError

    def keys_of(self, values: Labels, child: T) -> list[str]:
        """What its samples are called in a file."""
        labels = dict(zip(self.labels, values, strict=True))
        named = self.name.removesuffix("_total")
        return [key_of(named, name, {**labels, **own}, self.meaning) for name, own, _ in self.samples(child)]


class Counters(Family[Counter]):
    kind = "counter"

    def _new(self) -> Counter:
        return Counter()

    def samples(self, child: Counter) -> Iterator[tuple[str, Mapping[str, str], float]]:
        yield self.name, {}, child.value


class Histograms(Family[Histogram]):
    kind = "histogram"

    def __init__(self, name: str, meaning: str, bounds: Sequence[float], *labels: str) -> None:
        super().__init__(name, meaning, *labels)
        self.bounds = tuple(bounds)

    def _new(self) -> Histogram:
        return Histogram(self.bounds)

    def samples(self, child: Histogram) -> Iterator[tuple[str, Mapping[str, str], float]]:
        yield f"{self.name}_sum", {}, child.sum
        for bound, number in zip((*map(float, self.bounds), "+Inf"), list(child.counts), strict=True):
            yield f"{self.name}_bucket", {"le": str(bound)}, number  # each for itself, the library adds them up


class Gauges(dict[Labels, float]):
    """Numbers as they are now. They are set all together: who is not named any more is not told any more."""

    def __init__(self, name: str, meaning: str, mode: Mode, *labels: str) -> None:
        super().__init__()
        self.name = name
        self.meaning = meaning
        self.mode: Mode = mode
        self.labels = labels

    def set(self, values: Mapping[Labels, float]) -> None:
        self.clear()
        self.update(values)


# — what one process counts


class Metrics:
    """The families of this process, and the files in which they are told."""

    def __init__(self, folder: Path, *families: Counters | Histograms | Gauges) -> None:
        self._folder = folder
        self._families: list[Family[Any]] = [family for family in families if isinstance(family, Family)]
        self._gauges = [family for family in families if isinstance(family, Gauges)]
        self._one_at_a_time = threading.Lock()
        self._set: _Set | None = None

    def __repr__(self) -> str:
        return f"<Metrics {self._set.number if self._set else 'none'} of {self._folder}>"

    def flush(self) -> None:
        """Write what has changed; may be called in a thread. Raises OSError; what was not written is the next time."""
        with self._one_at_a_time:
            if self._set is None:
                self._set = _Set(self._folder)
            for family in self._families:
                self._set.note(family)
            try:
                self._set.write()
            finally:  # that the disk is full is told by a gauge
                for mode in sorted({gauges.mode for gauges in self._gauges}):
                    self._set.replace(mode, [gauges for gauges in self._gauges if gauges.mode == mode])

    def close(self) -> None:
        """Leave the files to whoever starts next; what was not flushed is lost."""
        with self._one_at_a_time:
            if self._set is not None:
                self._set.close()
                self._set = None


class _Set:
    """The files of one process. Raises OSError where the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.number, self._lock = claim(folder)
        self._files: dict[str, Values] = {}
        self._places: dict[tuple[str, Labels], list[int]] = {}
        self._told: dict[Mode, bytes] = {}
        try:
            for old in folder.glob(f"gauge_*_{self.number}.db"):
                old.unlink()
            for kind in ("counter", "histogram"):
                self._files[kind] = Values(folder / f"{kind}_{self.number}.db")
        except OSError:
            self.close()
            raise

    def note(self, family: Family[Any]) -> None:
        """Take what has changed of a family."""
        file = self._files[family.kind]
        for values, child in list(family.items()):
            if not child.changed:
                continue
            child.changed = False  # first: what is counted meanwhile is written once more
            places = self._places.get((family.name, values))
            if places is None:
                places = [file.place(key) for key in family.keys_of(values, child)]
                self._places[family.name, values] = places
            for place, (_, _, value) in zip(places, family.samples(child), strict=True):
                file.put(place, value)

    def write(self) -> None:
        for file in self._files.values():
            file.write()

    def replace(self, mode: Mode, all_gauges: Iterable[Gauges]) -> None:
        """Gauges come and go with what they are of: their file is written anew, or over the old one on a full disk."""
        values = {
            key_of(gauges.name, gauges.name, dict(zip(gauges.labels, labels, strict=True)), gauges.meaning): value
            for gauges in all_gauges
            for labels, value in list(gauges.items())
        }
        told = whole(values)
        if told != self._told.get(mode):
            file = self._folder / f"gauge_{mode}_{self.number}.db"
            draft = file.with_suffix(".new")
            try:
                draft.write_bytes(told)
                draft.replace(file)
            except OSError:
                draft.unlink(missing_ok=True)
                if file.stat().st_size < len(told):
                    raise
                with file.open("r+b") as there:
                    there.write(told)
            self._told[mode] = told

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        os.close(self._lock)


# — what all processes of a folder count


def gathered(state: Path) -> bytes:
    """What all processes of a state folder have counted, added up, in Prometheus's text format. May be called in
    threads: of many who ask at one time one reads, and what was read holds for half a second."""
    with _reading:
        at, text = _gathered.get(state, (-_HOLDS, b""))
        if time.monotonic() - at >= _HOLDS:
            text = _text(_gather(state / FOLDER))
            _gathered[state] = time.monotonic(), text
        return text


_reading = threading.Lock()
_gathered: dict[Path, tuple[float, bytes]] = {}


def _text(families: list[Metric]) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Known(Collector):
        def collect(self) -> list[Metric]:
            return families

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Known())
    return generate_latest(registry)


def _gather(folder: Path) -> list[Metric]:
    from prometheus_client.multiprocess import MultiProcessCollector  # who only counts does without it

    files = files_in(folder)
    merge: Callable[[Iterable[str]], Iterable[Metric]] = MultiProcessCollector.merge
    try:
        return list(merge(files))
    except (struct.error, RuntimeError, ValueError):
        return list(merge(sound(files)))
