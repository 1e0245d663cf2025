"""What documents say of the code is written by the code: tables between markers, and the schema of the policies.

    python -m tests.docs            exits with 1 and names each file that is not as generated
    python -m tests.docs --write    writes them

In a Markdown file a generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer.main
import yaml
from typer.core import TyperGroup

import gateway
from gateway.cli import app
from gateway.endpoints import ENDPOINTS
from gateway.language import Documents
from gateway.settings import Settings

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm"
MARKED = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def generated() -> dict[Path, str]:
    """Each file that holds something generated, as it should be."""
    tables = {
        "settings": settings(),
        "commands": commands(),
        "endpoints": endpoints(),
        "floors": floors(),
        "policies": policies(),
        "values": values(),
        "alerts": alerts(),
    }
    documents = (ROOT / "README.md", ROOT / "policies" / "README.md", CHART / "README.md")
    texts = {path: filled(path.read_text("utf-8"), tables) for path in documents}
    return {**texts, ROOT / "policies" / "schema.json": json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"}


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A text with its tables. Raises KeyError for a marker that nothing is generated for."""
    return MARKED.sub(lambda found: f"{found[1]}{tables[found['name']]}\n{found[3]}", text)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# — settings


def settings() -> str:
    rows = []
    for setting in fields(Settings):
        default = f"`{str(setting.default).removesuffix('.0')}`" if str(setting.default) else ""
        known = setting.metadata
        rows.append((f"`GATEWAY_{setting.name.upper()}`", default, known["unit"], known["description"]))
    return table(("variable", "default", "unit", "meaning"), rows)


# — commands


def commands() -> str:
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return table(("command", "does"), _commands(command, "gateway"))


def _commands(group: TyperGroup, prefix: str) -> Iterator[tuple[str, str]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if not isinstance(command, TyperGroup) or command.invoke_without_command:
            words = [prefix, name, *filter(None, map(_argument, command.params))]
            yield f"`{' '.join(words)}`", (command.help or "").partition("\n\n")[0]
        if isinstance(command, TyperGroup):
            yield from _commands(command, f"{prefix} {name}")


def _argument(parameter: Any) -> str:
    """What has to be written, or may be without its name; other options are told by --help."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar if parameter.required else f"[{parameter.metavar}]")
    return f"{parameter.opts[0]} {parameter.name.upper()}" if parameter.required else ""


# — endpoints


def endpoints() -> str:
    rows = [
        (
            f"`{endpoint.path}`",
            {"json": "checked by its schema", "form": "form, streamed through"}[endpoint.body],
            "yes" if endpoint.rewrites else "",
            endpoint.dialect,
        )
        for endpoint in ENDPOINTS.values()
    ]
    return table(("endpoint", "body", "aliases", "errors and limits as"), rows)


# — floors


def floors() -> str:
    listed = re.sub(r",\n +", ", ", gateway.__doc__ or "")
    found = re.findall(r"^floor (\d), (\w+): +(.*)$", listed, re.MULTILINE)
    rows = [(number, name, ", ".join(f"`{file}`" for file in files.split(", "))) for number, name, files in found]
    return table(("floor", "of", "files"), rows)


# — policies


def schema() -> dict[str, Any]:
    """The language of the policies as JSON Schema, for editors."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Documents.model_json_schema()}
    for node in _objects(found):
        if "patternProperties" in node:
            node["additionalProperties"] = False
        if "default" in node and node.get("type") == "string":
            node["default"] = measured(node["default"], node.get("pattern", ""))
        elif isinstance(node.get("default"), dict) or node.get("default", ...) is None:
            del node["default"]  # what is left out says its own defaults, and null is not to be written
    return found


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _objects(inner)


def measured(value: object, pattern: str) -> object:
    """A number of seconds or bytes, or a share, as people write it, in the largest unit that it is whole in."""
    if pattern.endswith("%$") and isinstance(value, float):
        return f"{value:.0%}"
    for unit, steps in {"KiB": _SIZES, "ms": _TIMES}.items():
        if f"{unit}|" in pattern and not isinstance(value, str):
            assert isinstance(value, int | float)
            smallest = round(value * (1000 if unit == "ms" else 1))
            return next(f"{smallest // size}{name}" for size, name in steps if smallest % size == 0)
    return value


_SIZES = ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"), (1, "B"))
_TIMES = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s"), (1, "ms"))


def policies() -> str:
    """A table for each document model, in the order in which one leads to the other."""
    whole = schema()
    definitions = whole["$defs"]
    places: dict[str, list[str]] = {}

    def visit(node: Any, path: str) -> None:
        for name, member in node.get("properties", {}).items():
            several = ".NAME" if "patternProperties" in member else "[…]" if "items" in member else ""
            for inner in _references(member):
                kind = definitions[inner]["properties"].get("to", {}).get("const")
                place = f"{path}{name}{several}" + (f" {{to: {kind}}}" if kind else "")
                places.setdefault(inner, []).append(place)
                visit(definitions[inner], place + ".")

    visit(whole, "")
    parts = []
    for name, where in places.items():
        definition = definitions[name]
        required = definition.get("required", ())
        rows = [
            (f"`{member}`", _form(found), _default(found, member in required), found.get("description", ""))
            for member, found in definition["properties"].items()
        ]
        title = ", ".join(f"`{place}`" for place in where)
        members = table(("member", "form", "default", "meaning"), rows)
        parts.append(f"### {title}\n\n{definition['description']}\n\n{members}")
    return "\n\n".join(parts)


def _references(node: Any) -> list[str]:
    """The definitions that a member leads to."""
    found = (inner["$ref"].rpartition("/")[2] for inner in _objects(node) if "$ref" in inner)
    return list(dict.fromkeys(found))


def _form(node: Any) -> str:
    """What may be written."""
    if forms := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(_form(inner) for inner in forms if inner.get("type") != "null")
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{word}`" for word in dict.fromkeys(map(str, node["enum"])))
    if "examples" in node:
        return "such as " + ", ".join(f"`{example}`" for example in node["examples"])
    if node.get("type") == "array":
        return f"list of {'members' if _references(node) else _form(node['items'])}"
    if "$ref" in node:
        return "members"
    kinds = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`"}
    kind = kinds.get(node["type"]) or ("name" if "pattern" in node else "text")
    low, high = node.get("minimum"), node.get("maximum")
    bounds = [f"from {low}" if low is not None else "", f"to {high}" if high is not None and high < 10**12 else ""]
    return " ".join([kind, *filter(None, bounds)])


def _default(node: Any, required: bool) -> str:
    if required:
        return "required"
    default = node.get("default")
    if default in (None, []):
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default).removesuffix('.0')}`"


# — the chart


def values() -> str:
    """A row for each value that has a comment `# -- meaning` above it."""
    text = (CHART / "values.yaml").read_text("utf-8")
    rows = [(f"`{'.'.join(path)}`", _inline(_at(yaml.safe_load(text), path)), told) for path, told in explained(text)]
    return table(("value", "default", "meaning"), rows)


def explained(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The paths of a file of values, each with what its comment says. Raises ValueError for a leaf without one."""
    path: list[str] = []
    told: dict[int, str] = {}  # by depth, of the key that was read last there
    comment = ""
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.fullmatch(r" *# -- (.+)", line):
            comment = found[1]
        elif found := re.fullmatch(r"( *)([\w-]+):(.*)", line):
            depth = len(found[1]) // 2
            path[depth:] = [found[2]]
            told = {above: meaning for above, meaning in told.items() if above < depth}
            if comment:
                told[depth] = comment
                yield tuple(path), comment
            elif found[3] and not told:
                raise ValueError(
                    f"values.yaml:{number} {'.'.join(path)} has no comment, expected `# -- meaning` above it"
                )
            comment = ""


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return _at(tree[path[0]], path[1:]) if path else tree


def _inline(value: Any) -> str:
    return f"`{json.dumps(value)}`" if value != "" else ""


def alerts() -> str:
    found = yaml.safe_load((CHART / "alerts.yaml").read_text("utf-8"))
    rows = [(f"[{a['alert']}](#{a['alert'].lower()})", a["severity"], a["for"], a["summary"]) for a in found]
    return table(("alert", "severity", "after", "says"), rows)


def main() -> int:
    differing = [
        (path, text) for path, text in generated().items() if not path.exists() or path.read_text("utf-8") != text
    ]
    for path, text in differing:
        if "--write" in sys.argv[1:]:
            path.write_text(text, "utf-8")
            print(f"{path.relative_to(ROOT)}: written")
        else:
            print(f"{path.relative_to(ROOT)} is not as generated, expected what `make docs` writes", file=sys.stderr)
    return 1 if differing and "--write" not in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
