"""The policies as they stand on the disk: documents, and the files that they name, read as one whole.

What is read has stood still meanwhile, so that nobody gets half of a change: an editor that is writing, a directory
that Kubernetes swaps. Reading never fails: what is wrong is what was found.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from gateway.credentials import Secrets, files_named, secrets_of, wrong_certificates
from gateway.documents import PolicyError, files_of
from gateway.marks import Marks, marks_of
from gateway.policy import load
from gateway.snapshot import Snapshot
from gateway.standings import rfc3339

_TRIES = 5
_log = structlog.get_logger("gateway.policies")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the documents say, or what is wrong with them. `files` are those that they name, `marks` of all of them."""

    directory: Path
    files: frozenset[str]
    marks: Marks
    snapshot: Snapshot | None = None
    secrets: Secrets = field(default_factory=dict, repr=False)
    mistakes: tuple[str, ...] = ()

    def found(self) -> Snapshot:
        """The policies. Raises PolicyError with every mistake."""
        if self.mistakes or self.snapshot is None:
            raise PolicyError(self.mistakes)
        return self.snapshot


def read(directory: Path, before: Reading | None = None) -> Reading:
    """The policies of a directory. Documents that are not understood name no files: those of `before` stay in view."""
    for _ in range(_TRIES):
        reading = _read(directory, frozenset() if before is None else before.files)
        if look(reading) == reading.marks:
            return reading
    mistake = f"{directory}: changed {_TRIES} times while it was read, expected it to stand still"
    return Reading(directory, reading.files, reading.marks, mistakes=(mistake,))


def look(reading: Reading) -> Marks:
    """The marks that its files have now: where they differ from its own, something has changed since."""
    return marks_of([*files_of(reading.directory), *reading.files])


def _read(directory: Path, files: frozenset[str]) -> Reading:
    documents = marks_of(files_of(directory))
    try:
        snapshot = load(directory)
    except PolicyError as found:
        mistakes = found.mistakes
    except OSError as unread:
        mistakes = (f"{directory}: {unread}",)
    except Exception as defect:  # ours: what cannot be read must not end whoever watches
        _log.exception("policies_unreadable")
        mistakes = (f"{directory}: {type(defect).__name__}; the log has more",)
    else:
        files = files_named(snapshot)
        marks = {**documents, **marks_of(files)}  # of before they are read
        secrets, wrong = secrets_of(snapshot, os.environ)
        return Reading(directory, files, marks, snapshot, secrets, (*wrong, *wrong_certificates(snapshot)))
    return Reading(directory, files, {**documents, **marks_of(files)}, mistakes=mistakes)


@dataclass(slots=True)
class Reloads:
    """What became of the documents, for who watches over them: which are in force, and what is wrong with later ones.

    Times are seconds since 1970. `taken` and `refused` count since the start, the first documents not.
    """

    reading: Reading  # the last one, whatever became of it
    revision: str  # in force
    since: float = field(default_factory=time.time)
    at: float = field(default_factory=time.time)  # of the last reading
    taken: int = 0
    refused: int = 0
    mistakes: tuple[str, ...] = ()  # of the last reading; none: it is in force

    @classmethod
    def begun(cls, reading: Reading) -> Reloads:
        """As documents are first taken. Raises PolicyError where they cannot be."""
        return cls(reading, reading.found().revision)

    @property
    def last(self) -> str:
        """taken or refused."""
        return "refused" if self.mistakes else "taken"

    def take(self, reading: Reading) -> None:
        self.reading, self.at, self.mistakes = reading, time.time(), ()
        self.revision, self.since = reading.found().revision, self.at
        self.taken += 1

    def refuse(self, reading: Reading, mistakes: tuple[str, ...]) -> None:
        self.reading, self.at, self.mistakes = reading, time.time(), mistakes
        self.refused += 1

    def public(self) -> dict[str, object]:
        """As programs read it."""
        return {
            "revision": self.revision,
            "since": rfc3339(int(self.since)),
            "last": self.last,
            "at": rfc3339(int(self.at)),
            "mistakes": list(self.mistakes),
        }
