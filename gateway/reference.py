"""An OpenAPI document of ours as a page to read: contents, members, examples, errors.

One HTML file that asks for no other and runs no script. All text is escaped where it is put into an element, so that
nothing a document says is ever markup.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any, NamedTuple

from msgspec.json import encode, format

Json = dict[str, Any]


class _Markup(str):
    """Text that is markup already; all other text is escaped where it is put into an element."""

    __slots__ = ()


def _put(content: Iterable[str]) -> _Markup:
    return _Markup("".join(part if isinstance(part, _Markup) else escape(part) for part in content))


def _tag(name: str, *content: str, **attributes: str) -> _Markup:
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return _Markup(f"<{name}{given}>{_put(content)}</{name}>")


def page(document: Json) -> str:
    """The reference page of a document that gateway/openapi.py has made."""
    info, components = document["info"], document["components"]
    operations = list(_operations(document))
    title = f"{info['title']} {info['version']}"
    main = _tag(
        "main",
        _tag("h1", info["title"], " ", _tag("small", info["version"])),
        _tag("p", info["description"]),
        _tag("p", "The examples below take the gateway's address and a key from the shell:"),
        _tag("pre", "GATEWAY=http://localhost:8080\nKEY=gw_…"),
        *(_section(operation, components) for operation in operations),
        _tag("h2", "Errors", id="errors"),
        *(_told_error(key, response) for key, response in components["responses"].items()),
        _tag("h2", "Headers", id="headers"),
        _tag("p", "Limits are told with every answer of a backend; a header is left out where it has nothing to tell."),
        _table(("Header", "What it tells"), ((_code(n), h["description"]) for n, h in components["headers"].items())),
    )
    head = _tag("title", title) + _META + _tag("style", _Markup(_STYLE))
    body = _contents(operations) + main
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


class _Operation(NamedTuple):
    method: str
    path: str
    told: Json

    @property
    def anchor(self) -> str:
        return str(self.told["operationId"])

    @property
    def media(self) -> tuple[str, Json]:
        """The first type of body that it takes, and what is told of it; of no body: nothing."""
        content: Json = self.told.get("requestBody", {"content": {}})["content"]
        return next(iter(content.items()), ("", {}))

    @property
    def named(self) -> tuple[_Markup, _Markup]:
        return _tag("span", self.method, class_=f"method {self.method.lower()}"), _code(self.path)


def _operations(document: Json) -> Iterator[_Operation]:
    for path, item in document["paths"].items():
        shared = {"parameters": item.get("parameters", [])}
        for method, told in item.items():
            if method != "parameters":
                yield _Operation(method.upper(), path, shared | told)


def _contents(operations: list[_Operation]) -> _Markup:
    groups: dict[str, list[_Markup]] = {}
    for operation in operations:
        link = _tag("a", *operation.named, href=f"#{operation.anchor}")
        groups.setdefault(operation.told["tags"][0], []).append(_tag("li", link))
    last = [_tag("li", _tag("a", name, href=f"#{name.lower()}")) for name in ("Errors", "Headers")]
    lists = (_put((_tag("h2", name), _tag("ul", *links))) for name, links in {**groups, "Beside": last}.items())
    return _tag("nav", *lists, aria_label="Contents")


def _section(operation: _Operation, components: Json) -> _Markup:
    media_type, media = operation.media
    schema = _resolved(media.get("schema", {}), components)
    rows = [*_parameter_rows(operation.told.get("parameters", [])), *_member_rows(schema)]
    parts = [_tag("h2", *operation.named), _tag("p", operation.told["summary"], ".")]
    if media_type:
        parts.append(_tag("p", "Body: ", _code(media_type), ". ", _beyond(schema)))
    if rows:
        parts.append(_table(("Member", "What it may be", "Range", "Required"), rows))
    parts += [_tag("h3", "Example"), _tag("pre", _curl(operation, media_type, media))]
    parts += [_tag("h3", "Answers"), _tag("ul", *map(_answered, operation.told["responses"].items()), class_="answers")]
    return _tag("section", *parts, id=operation.anchor)


def _beyond(schema: Json) -> str:
    """What becomes of members that are not in the table."""
    if "properties" not in schema:
        return "Whatever it holds passes."
    if schema.get("additionalProperties") is False:
        return "Members that are not named here are refused, unless the policies are lenient."
    return "Members that are not named here pass as they are."


def _answered(answer: tuple[str, Json]) -> _Markup:
    status, response = answer
    if "$ref" in response:
        return _tag("li", _tag("a", status, href="#" + _last(response["$ref"])))
    types = (part for media_type in response["content"] for part in (" ", _code(media_type)))
    return _tag("li", _tag("b", status), " ", response["description"], ":", *types)


def _told_error(key: str, response: Json) -> _Markup:
    dialect, _, status = key.rpartition("_")
    examples = (
        _tag(
            "details",
            _tag("summary", media_type),
            *(_tag("pre", _pretty(e["value"])) for e in media["examples"].values()),
        )
        for media_type, media in response["content"].items()
    )
    headers = (part for name in response["headers"] for part in (" ", _code(name)))
    name = _tag("h3", status, " ", _tag("small", dialect))
    return _tag("section", name, _tag("p", response["description"]), _tag("p", "Headers:", *headers), *examples, id=key)


def _curl(operation: _Operation, media_type: str, media: Json) -> str:
    """An example for the shell."""
    path = operation.path
    for parameter in operation.told.get("parameters", []):
        path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
    implied = "POST" if media_type else "GET"
    method = "" if operation.method == implied else f"-X {operation.method} "
    words = [f'curl {method}"$GATEWAY{path}"', '-H "authorization: Bearer $KEY"']
    if media_type == "multipart/form-data":
        parts = media["schema"]["properties"]
        for name, value in media["example"].items():
            words.append("-F " + shlex.quote(f"{name}={'@' * ('contentMediaType' in parts[name])}{value}"))
    elif "example" in media:
        words += [f"-H 'content-type: {media_type}'", "-d " + shlex.quote(_pretty(media["example"]))]
    elif media_type:
        words += ["-H 'content-type: application/octet-stream'", "--data-binary @body"]
    return " \\\n  ".join(words)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> _Markup:
    """A table; each cell is told what its column is called, for windows too narrow for columns."""
    cells = (
        _tag("tr", *(_tag("td", cell, data_of=head) for head, cell in zip(heads, row, strict=True))) for row in rows
    )
    return _tag("table", _tag("thead", _tag("tr", *(_tag("th", head) for head in heads))), _tag("tbody", *cells))


def _code(text: str) -> _Markup:
    """A name; where it has to be broken, after a sign."""
    return _tag("code", _Markup(re.sub(r"(?<=[_./])(?=\w)", "<wbr>", escape(text))))


def _pretty(value: Any) -> str:
    return format(encode(value), indent=2).decode()


def _last(reference: str) -> str:
    return reference.rpartition("/")[2]


def _resolved(schema: Json, components: Json) -> Json:
    found: Json = components["schemas"][_last(schema["$ref"])] if "$ref" in schema else schema
    return found


# — the members of a body as rows of a table: name, what it may be, range, required

_Row = tuple[str, str, str, str]


def _parameter_rows(parameters: Iterable[Json]) -> Iterator[_Row]:
    for told in parameters:
        yield _code(f"{{{told['name']}}}"), told["description"], "", "yes"


def _member_rows(schema: Json) -> Iterator[_Row]:
    apart = _apart(schema)
    for path, (forms, required) in _members(schema).items():
        told = _may_be(forms) + "".join(f"; not together with {other}" for other in apart.get(path, ()))
        ranges = dict.fromkeys(span for form in forms for span in _ranges(form))
        need = "yes" if all(required) else "in some forms" if any(required) else ""
        yield _code(path), told, ", ".join(ranges), need


def _members(schema: Json, path: str = "") -> dict[str, tuple[list[Json], list[bool]]]:
    """The members of an object, and of objects in them, by their path: what each may be, and whether it must be there;
    several of both where the object has several forms."""
    found: dict[str, tuple[list[Json], list[bool]]] = {}
    for form in _forms(schema):
        for name, member in form.get("properties", {}).items():
            forms, required = found.setdefault(path + name, ([], []))
            forms.append(member)
            required.append(name in form.get("required", ()))
            for inner, (its_forms, its_required) in _members(member, f"{path}{name}.").items():
                forms, required = found.setdefault(inner, ([], []))
                forms += its_forms
                required += its_required
        if "items" in form and path:
            found |= _members(form["items"], f"{path[:-1]}[].")
    return found


def _forms(schema: Json) -> Iterator[Json]:
    """What a value may be, one by one."""
    choices = schema.get("anyOf", schema.get("oneOf"))
    if choices is None:
        yield schema
    else:
        for choice in choices:
            yield from _forms(choice)


def _apart(schema: Json) -> dict[str, list[str]]:
    """Members → those that they exclude."""
    found: dict[str, list[str]] = {}
    for rule in schema.get("allOf", ()):
        one, other = rule["not"]["required"]
        found.setdefault(one, []).append(other)
        found.setdefault(other, []).append(one)
    return found


def _may_be(forms: list[Json]) -> str:
    """In the words of the checks; a tag is whichever of its words."""
    told = dict.fromkeys(form.get("description") or str(form.get("type", "anything")) for form in forms)
    return " or ".join(told) if all("enum" in form for form in forms) else next(iter(told))


def _ranges(schema: Json) -> Iterator[str]:
    for form in _forms(schema):
        yield from filter(None, (_span(form, "minimum", "maximum"), _size(form)))
        values = form.get("additionalProperties")
        for inner in (form.get("items"), values if isinstance(values, dict) else None):
            if inner is not None:
                yield from filter(None, (_span(inner, "minimum", "maximum", of="each {}"),))


def _size(form: Json) -> str:
    return _span(form, "minItems", "maxItems", of="{} items") or _span(form, "minLength", "maxLength", of="{} signs")


def _span(form: Json, lowest: str, highest: str, of: str = "{}") -> str:
    """`0 to 2`, `at least 0`, `at most 4 items`; nothing where neither end is given."""
    low, high = form.get(lowest), form.get(highest)
    if high is None:
        return "" if low is None else "not empty" if "items" in of and low == 1 else of.format(f"at least {low:,}")
    return of.format(f"at most {high:,}" if low is None else f"{low:,} to {high:,}".replace("-", "−"))


_META = _Markup(
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #60646c; --page: #fff; --raised: #f6f7f9; --line: #e0e3e8;
  --link: #0a58ca; --post: #17713a; --get: #0a58ca; --other: #9a4b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9ba1a9; --page: #14171a; --raised: #1d2125;
  --line: #30363d; --link: #7ab4ff; --post: #6bd48f; --get: #7ab4ff; --other: #ffb067; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 78rem; display: grid; grid-template-columns: 19rem minmax(0, 1fr); gap: 2.5rem;
  font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto; padding: 2rem 0 2rem 1.5rem;
  font-size: .85rem; }
nav h2 { margin: 1.2rem 0 .3rem; font-size: .75rem; letter-spacing: .06em; text-transform: uppercase;
  color: var(--dim); border: 0; padding: 0; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav a { display: block; padding: .2rem 0; color: inherit; text-decoration: none; overflow-wrap: anywhere; }
nav a:hover { color: var(--link); }
main { padding: 2rem 1.5rem 6rem 0; min-width: 0; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 3.5rem 0 .75rem; padding-top: 1.5rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
small { font-weight: 400; font-size: .8em; color: var(--dim); }
a { color: var(--link); }
code, pre { font: .87em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--raised); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem;
  margin: .5rem 0; overflow-x: auto; }
.method { display: inline-block; min-width: 3.4em; margin-right: .5em; font-size: .75em; font-weight: 700;
  letter-spacing: .03em; color: var(--other); }
.method.post { color: var(--post); }
.method.get { color: var(--get); }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th { text-align: left; font-weight: 600; color: var(--dim); }
th, td { padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { overflow-wrap: anywhere; }
th:first-child { width: 14rem; }
th:nth-child(3) { width: 9rem; }
th:nth-child(4) { width: 6rem; }
.answers { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .4rem; }
.answers li:first-child { flex-basis: 100%; }
.answers a { display: inline-block; padding: .1rem .6rem; border: 1px solid var(--line); border-radius: 99px;
  font-size: .85rem; text-decoration: none; }
summary { cursor: pointer; color: var(--link); padding: .2rem 0; font-size: .9rem; }
@media (max-width: 52rem) {
  body { display: block; }
  nav { position: static; max-height: none; padding: 1rem 1rem 0; }
  main { padding: 1.5rem 1rem 4rem; }
  thead { display: none; }
  tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line); }
  td { display: block; border: 0; padding: .05rem 0; }
  td:empty { display: none; }
  td + td::before { content: attr(data-of) ": "; color: var(--dim); }
}
"""
