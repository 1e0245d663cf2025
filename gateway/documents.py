"""YAML files → one tree of plain values, with the place of every value in it.

A file may hold any of the sections, and a section may be spread over files, so that teams can be kept by those who
know them; a name that stands twice is a mistake. Every mistake is told at once, with file, line and path.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
import yaml.constructor

Path_ = tuple[str | int, ...]


class PolicyError(Exception):
    """Documents that cannot be taken. `mistakes` is one line each: `file:line path: found, expected`."""

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(
            "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in m) for m in mistakes
        )
        super().__init__("\n".join(self.mistakes))


def show(found: object) -> str:
    """A value as the document has it, and not much of it; of an address never who is named in it with a password."""
    match found:
        case None:
            return "nothing"
        case bool():
            return str(found).lower()
        case str():
            found = re.sub(r"://\S*@", "://…@", found)
            return f'"{found if len(found) <= 80 else found[:79] + "…"}"'
        case int():
            return str(found) if abs(found) < 10**30 else "a number of more than 30 digits"
        case dict():
            return "a mapping"
    return str(found).removesuffix(".0") if isinstance(found, float) else f"a {type(found).__name__}"


def files_of(directory: Path) -> list[Path]:
    """The files that policies are read from, in their order; none in a directory that cannot be read."""
    try:
        names = os.listdir(directory)  # noqa: PTH208 - every worker asks once a second, and a glob takes ten times as long
    except OSError:
        return []
    return [directory / name for name in sorted(names) if name.endswith((".yaml", ".yml")) and not name.startswith(".")]


class Source:
    """The files of a directory as one tree of plain values, and the place of every path in it."""

    # An alias of YAML is written out at each place; beyond these it is no document that people keep.
    _DEEPEST, _MOST_VALUES = 20, 300_000

    def __init__(self, directory: Path, sections: Iterable[str]) -> None:
        self._sections = ", ".join(sections)
        self._places: dict[Path_, str] = {}
        self._mistakes: list[str] = []
        self._values = 0
        self._constructor = yaml.constructor.SafeConstructor()
        self.data: dict[str, Any] = {}
        files = files_of(directory)
        if not files:
            raise PolicyError([f"{directory}: holds no .yaml file, expected policy documents"])
        digest = hashlib.sha256()
        for file in files:
            try:
                text = file.read_bytes()
            except OSError as error:
                self._mistakes.append(f"{file.name}: cannot be read ({error.strerror}), expected a policy document")
                continue
            digest.update(text)
            self._read(file.name, text)
        self.revision = digest.hexdigest()[:12]
        if self._mistakes:
            raise PolicyError(self._mistakes)

    def mistake(self, path: Path_, text: str) -> str:
        """One line that names file, line and path; an absent member is shown where its parent stands."""
        known = path
        while known and known not in self._places:
            known = known[:-1]
        return f"{self._places.get(known, 'policies')} {_dotted(path)}: {text}"

    def _read(self, file: str, text: bytes) -> None:
        try:
            root = yaml.compose(text, Loader=yaml.CSafeLoader)
        except yaml.YAMLError as broken:
            mark = getattr(broken, "problem_mark", None)
            where = f"{file}:{mark.line + 1}" if mark else file
            told = [word for word in (getattr(broken, "context", None), getattr(broken, "problem", None)) if word]
            self._mistakes.append(f"{where}: is no YAML: {', '.join(told) or str(broken).partition(chr(10))[0]}")
            return
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            self._mistakes.append(f"{file}:1: has no sections, expected some of {self._sections}")
            return
        before = dict(self._places)
        for section, value in self._members(file, root, ()):
            held = self.data.setdefault(section, value)
            if held is value:
                continue
            if not (isinstance(held, dict) and isinstance(value, dict)) or section == "gateway":
                self._doubled((section,), before)
                continue
            for name in held.keys() & value.keys():
                self._doubled((section, name), before)
            held.update(value)

    def _doubled(self, path: Path_, before: Mapping[Path_, str]) -> None:
        self._mistakes.append(
            self.mistake(path, f"is already defined at {before.get(path, 'another place')}, expected once")
        )

    def _members(self, file: str, node: yaml.MappingNode, path: Path_) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key_node, value_node in node.value:
            place = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                self._mistakes.append(
                    f"{place} {_dotted(path)}: a list or a mapping stands for a name, expected a word"
                )
                continue
            key = str(key_node.value)
            own = (*path, key)
            if key in seen:
                self._mistakes.append(f"{place} {_dotted(own)}: stands twice, expected once")
            seen.add(key)
            self._places[own] = place
            yield key, self._value(file, value_node, own)

    def _value(self, file: str, node: yaml.Node, path: Path_) -> Any:
        place = f"{file}:{node.start_mark.line + 1}"
        self._places.setdefault(path, place)
        self._values += 1
        if len(path) > self._DEEPEST or self._values > self._MOST_VALUES:
            much = f"at most {self._DEEPEST} levels and {self._MOST_VALUES} values"
            raise PolicyError([f"{place}: the documents are too deep or too large, expected {much}"])
        match node:
            case yaml.MappingNode():
                return dict(self._members(file, node, path))
            case yaml.SequenceNode():
                return [self._value(file, item, (*path, i)) for i, item in enumerate(node.value)]
        try:
            return self._constructor.construct_object(node)
        except (ValueError, LookupError, AttributeError, yaml.YAMLError):  # all that it says of a wrong 0b_ or !!bool
            self._mistakes.append(f"{place} {_dotted(path)}: {show(node.value)} is no {node.tag.rpartition(':')[2]}")
            return None


def _dotted(path: Path_) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
