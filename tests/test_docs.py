"""What documents say of the code is as the code is."""

from __future__ import annotations

import re
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from gateway.health import Turn
from gateway.language import Documents
from gateway.settings import Settings
from tests import docs

GENERATED = docs.generated()


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: str(path.relative_to(docs.ROOT)))
def test_a_document_is_as_generated(path: Path) -> None:
    """`make docs` writes it anew."""
    assert path.read_text("utf-8") == GENERATED[path]


def test_every_table_stands_somewhere() -> None:
    found = [name for path in GENERATED if path.suffix == ".md" for _, name, _ in docs.MARKED.findall(path.read_text())]
    assert sorted(found) == ["alerts", "commands", "endpoints", "floors", "policies", "settings", "values"]


def test_tables_stand_between_their_markers_and_nothing_else_changes() -> None:
    text = "before\n<!-- generated: one -->\nold\n<!-- end -->\nafter\n<!-- generated: two -->\n<!-- end -->\n"
    once = docs.filled(text, {"one": "1\n1", "two": "2"})
    assert once == (
        "before\n<!-- generated: one -->\n1\n1\n<!-- end -->\nafter\n<!-- generated: two -->\n2\n<!-- end -->\n"
    )
    assert docs.filled(once, {"one": "1\n1", "two": "2"}) == once


def test_a_marker_for_nothing_is_a_defect() -> None:
    with pytest.raises(KeyError, match="three"):
        docs.filled("<!-- generated: three -->\n<!-- end -->", {})


def test_without_write_the_files_that_differ_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = docs.ROOT / "README.md"
    monkeypatch.setattr(docs, "generated", lambda: {path: "another text"})
    monkeypatch.setattr("sys.argv", ["docs"])
    assert docs.main() == 1
    assert capsys.readouterr().err == "README.md is not as generated, expected what `make docs` writes\n"


def test_with_write_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "generated", lambda: {path: "another text"})
    monkeypatch.setattr("sys.argv", ["docs", "--write"])
    assert docs.main() == 0
    assert path.read_text() == "another text"


# — what an operator is sent to


def headings(file: Path) -> set[str]:
    """Where links into a document may end, as its readers make them of headings."""
    lines = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w-]", "", line.lower().replace(" ", "-")) for line in lines}


@pytest.mark.parametrize("name", ["README.md", "helm/README.md"])
def test_links_lead_to_files_and_headings_that_there_are(name: str) -> None:
    file = docs.ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", file.read_text("utf-8"))
    assert len(links) > 1
    for path, heading in links:
        target = (file.parent / path) if path else file
        assert target.exists(), path
        assert not heading or heading in headings(target), (path, heading)


def test_figures_events_and_findings_that_the_readme_names_are_in_the_code() -> None:
    """Whoever is on call looks for them by these names."""
    text = (docs.ROOT / "README.md").read_text("utf-8")
    code = "".join(file.read_text("utf-8") for file in sorted((docs.ROOT / "gateway").glob("*.py")))
    turns = {f"upstream_{turn}" for turn in get_args(Turn)}
    figures = {re.sub(r"_(bucket|count|sum|total)$", "", figure) for figure in re.findall(r"\bgateway_[a-z_]+", text)}
    events = set(re.findall(r'"event":"([a-z_]+)"', text)) - turns
    findings = set(re.findall(r"`((?:host|store|upstream)\.[a-z]+)`", text))
    assert [one for one in sorted(figures | events | findings) if f'"{one}' not in code] == []


@pytest.mark.parametrize(
    ("value", "pattern", "expected"),
    [
        (33554432, "(B|KiB|MiB|GiB)", "32MiB"),
        (1000, "(B|KiB|MiB|GiB)", "1000B"),
        (3600.0, "(ms|s|m|h|d)", "1h"),
        (120.0, "(ms|s|m|h|d)", "2m"),
        (2.5, "(ms|s|m|h|d)", "2500ms"),
        ("UTC", "", "UTC"),
    ],
)
def test_defaults_are_written_as_in_a_document(value: object, pattern: str, expected: object) -> None:
    assert docs.measured(value, pattern) == expected


def test_the_settings_table_has_every_variable_and_no_secret_default() -> None:
    assert re.findall(r"`GATEWAY_(\w+)`", docs.settings()) == [setting.name.upper() for setting in fields(Settings)]


def defaults(node: Any) -> Any:
    """Each member of the language that has a default, as a document with that default."""
    for found in docs._objects(node):
        for name, member in found.get("properties", {}).items():
            if "default" in member:
                yield name, member["default"]


def test_the_defaults_that_are_told_are_what_holds() -> None:
    """A document that writes all defaults of gateway: is the same as one that writes none."""
    told = dict(defaults(docs.schema()["$defs"]["GatewayPolicy"] | {"title": ""}))
    assert set(told) == {
        *("schema", "profile", "max_body", "reserve", "when_store_fails", "time_zone", "users", "perf_headers")
    }
    assert Documents.model_validate({"gateway": told}) == Documents.model_validate({"gateway": {}})
    times = dict(defaults(docs.schema()["$defs"]["Timeouts"]))
    assert times == {"connect": "2s", "first_byte": "2m", "idle": "1m", "total": "1h"}


@pytest.mark.parametrize("path", sorted((docs.ROOT / "policies").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_policies_tell_editors_where_the_schema_is_and_hold_to_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    holds(yaml.safe_load(text), docs.schema(), docs.schema()["$defs"], path.name)


def form_of(value: Any, options: list[Any]) -> Any:
    """The one of several forms that a value has: a list, or members with this `to`."""
    if isinstance(value, list):
        return next(option for option in options if option["type"] == "array")
    kinds = (option for option in options if option["type"] == "object")
    return next(o for o in kinds if o["properties"].get("to", {}).get("const") == value.get("to"))


def holds(value: Any, node: Any, definitions: Any, at: str) -> None:
    """So much of JSON Schema as the language uses: what an editor would not underline."""
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]]
    if "anyOf" in node:
        node = next(option for option in node["anyOf"] if option.get("type") != "null")
    if "oneOf" in node:
        node = form_of(value, [definitions.get(o.get("$ref", "").rpartition("/")[2], o) for o in node["oneOf"]])
    match node.get("type", ""):
        case "object":
            patterns = node.get("patternProperties", {})
            assert node["additionalProperties"] is False, at
            for name, inner in value.items():
                named = [part for pattern, part in patterns.items() if re.search(pattern, name)]
                holds(inner, node.get("properties", {}).get(name) or named[0], definitions, f"{at}.{name}")
            assert set(node.get("required", ())) <= set(value), at
        case "array":
            assert len(value) >= node.get("minItems", 0), at
            for i, inner in enumerate(value):
                holds(inner, node["items"], definitions, f"{at}[{i}]")
        case "string":
            assert isinstance(value, str | date), at  # a day is a text to editors
            assert re.search(node.get("pattern", ""), str(value)), at
            assert value in node.get("enum", [node.get("const", value)]), at
        case "":
            assert value in node["enum"], at
        case kind:
            assert isinstance(value, {"integer": int, "number": int | float, "boolean": bool}[kind]), at
            assert node.get("minimum", value) <= value <= node.get("maximum", value), at
