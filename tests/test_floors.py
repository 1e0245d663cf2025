"""The floors: a file imports only what stands before it, and a foreign library is at home in one file."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import gateway

PACKAGE = Path(gateway.__file__).parent

# Where a library may be imported; one that is not named here is part of the language, or everybody's (msgspec).
HOMES: dict[str, tuple[str, ...]] = {
    "hiredis": ("topology",),
    "h2": ("bridge",),
    "httptools": ("wire", "server"),
    "google": ("traces",),
    "httpx": ("alerts", "sinks", "wire", "bridge", "upstream", "traces", "tracecheck"),
    "opentelemetry": ("traces",),
    "pydantic": ("language", "policy"),
    "prometheus_client": ("metrics", "figures", "admin"),
    "psycopg": ("postgres",),
    # The last four: for the name of one exception.
    "redis": ("topology", "store", "embedded", "settlements", "admission", "exports", "housekeeping"),
    "rich": ("console",),
    "starlette": ("app", "echo", "forms", "operations", "admin"),
    "structlog": (
        *(
            "telemetry",
            "app",
            "store",
            "alerts",
            "spool",
            "ends",
            "settlements",
            "admission",
            "ledger",
            "sinks",
            "exports",
        ),
        *("retention", "housekeeping", "upstream", "reading", "reload", "serving", "worker", "supervisor", "console"),
        *("tallies", "meters", "operations", "admin", "cli", "traces"),
    ),
    "typer": ("console", "reports", "exporting", "cli"),
    "uvicorn": ("server", "serving", "admin", "cli"),
    "uvloop": ("cli",),
    "yaml": ("documents",),
}
# What any file may use: this, and what comes with Python.
EVERYBODYS = {"msgspec"}


class Import(NamedTuple):
    """One module that a file imports, and where."""

    module: str
    place: str


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(alias.name, f"{file}:{node.lineno}")
            case ast.ImportFrom(module=str(module), level=0) if module == "gateway":
                for alias in node.names:
                    yield Import(f"gateway.{alias.name}", f"{file}:{node.lineno}")
            case ast.ImportFrom(module=str(module), level=0):
                yield Import(module, f"{file}:{node.lineno}")
            case ast.ImportFrom():
                yield Import("." * node.level + (node.module or ""), f"{file}:{node.lineno}")


def order(docstring: str) -> list[str]:
    """The files of the floors, from the ground up."""
    floors = re.findall(r"^floor (\d), \w+: +(.*)$", re.sub(r",\n +", ", ", docstring), re.MULTILINE)
    assert [int(number) for number, _ in floors] == list(range(len(floors)))
    return [file.strip() for _, files in floors for file in files.split(",")]


def broken(file: str, source: str, files: list[str], homes: dict[str, tuple[str, ...]]) -> list[str]:
    """What is wrong with the imports of a file, each with its line."""
    before = set(files[: files.index(file)])
    found = []
    for module, place in imports(source, f"gateway/{file}.py"):
        top, _, rest = module.partition(".")
        if not top:
            found.append(f"{place} imports {module}, expected an absolute name")
        elif top == "gateway":
            if rest.partition(".")[0] not in before | {"__version__"}:
                found.append(f"{place} imports {module}, which does not stand before it")
        elif top in homes:
            if file not in homes[top]:
                found.append(f"{place} imports {module}, expected only in {', '.join(homes[top]) or 'no file'}")
        elif top not in EVERYBODYS | STANDARD:
            found.append(f"{place} imports {module}, which is at home nowhere")
    return found


STANDARD = set(sys.stdlib_module_names)
FILES = order(gateway.__doc__ or "")


def test_every_file_stands_on_a_floor_once() -> None:
    there = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(FILES) == sorted(there)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_wherever_it_is_at_home(library: str) -> None:
    """What is not used any more leaves the table."""
    users = [
        file
        for file in FILES
        for module, _ in imports((PACKAGE / f"{file}.py").read_text(), file)
        if module.partition(".")[0] == library
    ]
    assert set(users) == set(HOMES[library])


def test_folders_of_the_package_hold_no_python() -> None:
    assert [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE] == []


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_what_stands_before_it_and_libraries_that_are_at_home_in_it(file: str) -> None:
    assert broken(file, (PACKAGE / f"{file}.py").read_text(), FILES, HOMES) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import gateway.a\nfrom gateway import a\nfrom gateway.a import x", []),
        ("\nfrom gateway.c import x", ["gateway/b.py:2 imports gateway.c, which does not stand before it"]),
        ("from gateway import c", ["gateway/b.py:1 imports gateway.c, which does not stand before it"]),
        ("import gateway.b", ["gateway/b.py:1 imports gateway.b, which does not stand before it"]),
        ("import gateway", ["gateway/b.py:1 imports gateway, which does not stand before it"]),
        ("def f():\n  import gateway.c", ["gateway/b.py:2 imports gateway.c, which does not stand before it"]),
        (
            "if TYPE_CHECKING:\n  from gateway.c import x",
            ["gateway/b.py:2 imports gateway.c, which does not stand before it"],
        ),
        ("from . import c", ["gateway/b.py:1 imports ., expected an absolute name"]),
        ("import redis.asyncio", ["gateway/b.py:1 imports redis.asyncio, expected only in c"]),
        ("from redis import x", ["gateway/b.py:1 imports redis, expected only in c"]),
        ("import hiredis", ["gateway/b.py:1 imports hiredis, expected only in no file"]),
        ("import os.path\nimport msgspec\nimport yaml", []),
        ("import requests", ["gateway/b.py:1 imports requests, which is at home nowhere"]),
    ],
)
def test_a_wrong_import_is_told_with_its_line(source: str, expected: list[str]) -> None:
    homes: dict[str, tuple[str, ...]] = {"redis": ("c",), "hiredis": (), "yaml": ("b",)}
    assert broken("b", source, ["a", "b", "c"], homes) == expected
