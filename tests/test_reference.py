"""The reference page: all of the document is on it, it asks for nothing, and no text is markup."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import contract
from gateway.endpoints import ENDPOINTS
from gateway.openapi import openapi
from gateway.reference import page

PASSING = [("/v1/moderations", ["POST"]), ("/v1/files/*", ["GET", "POST", "DELETE"])]
VOID = {"meta", "wbr"}


@dataclass
class Section:
    """One operation on the page: the rows of its table, and its example."""

    rows: dict[str, list[str]] = field(default_factory=dict)  # member → what it may be, range, required
    example: str = ""

    @property
    def words(self) -> list[str]:
        """The example as a shell takes it apart."""
        return shlex.split(self.example.replace("\\\n", ""))


class Page(HTMLParser):
    """A page as a browser reads it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.sections: dict[str, Section] = {}
        self.open: list[str] = []
        self._section = Section()
        self._row: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = self.sections.setdefault(dict(attrs)["id"] or "", Section())
        if tag == "tr":
            self._row = []
        if tag == "td":
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr" and self._row:
            self._section.rows[self._row[0]] = self._row[1:]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open:
            self._row[-1] += data
        if data.startswith("curl "):
            self._section.example = data

    def of(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]


@cache
def read(profile: str = "2026") -> Page:
    return Page(page(openapi(profile, PASSING)))


def section(endpoint: str, profile: str = "2026") -> Section:
    return read(profile).sections["post_v1_" + endpoint.replace("/", "_")]


JSON = [endpoint.name for endpoint in ENDPOINTS.values() if endpoint.body == "json"]
FORMS = [endpoint.name for endpoint in ENDPOINTS.values() if endpoint.body == "form"]


# — all of it is there


@pytest.mark.parametrize("profile", contract.PROFILES)
@pytest.mark.parametrize("endpoint", JSON)
def test_every_member_of_every_profile_is_on_the_page(profile: str, endpoint: str) -> None:
    document = contract.document(endpoint, profile)
    rows = section(endpoint, profile).rows
    assert [name for name in rows if "." not in name] == list(document["properties"])
    for name, member in document["properties"].items():
        may_be, _, required = rows[name]
        assert may_be.startswith(member["description"])
        assert (required == "yes") == (name in document.get("required", ()))


@pytest.mark.parametrize("endpoint", FORMS)
def test_the_parts_of_a_form_are_on_the_page(endpoint: str) -> None:
    rows = section(endpoint).rows
    assert rows["model"] == ["a string", "", "yes"]
    assert len(rows) >= 2


@pytest.mark.parametrize(
    ("endpoint", "member", "expected"),
    [
        ("completions", "n", "1 to 128"),
        ("completions", "temperature", "0 to 2"),
        ("completions", "frequency_penalty", "−2 to 2"),
        ("completions", "max_tokens", "at least 0"),
        ("completions", "stop", "at most 4 items"),
        ("completions", "logit_bias", "each −100 to 100"),
        ("completions", "thinking.budget_tokens", "at least 1,024"),
        ("completions", "mirostat_lr", ""),
        ("messages", "temperature", "0 to 1"),
        ("messages", "messages", "not empty"),
        ("images/generations", "n", "1 to 10"),
    ],
)
def test_a_range_stands_in_its_column(endpoint: str, member: str, expected: str) -> None:
    assert section(endpoint).rows[member][1] == expected


def test_members_of_members_are_told_by_their_path() -> None:
    rows = section("completions").rows
    assert rows["response_format.type"] == ['"text" or "json_object" or "json_schema" or "grammar"', "", "yes"]
    assert rows["response_format.json_schema"][2] == "in some forms"
    assert rows["prediction.content[].text"] == ["a string", "", "yes"]


def test_members_that_exclude_each_other_say_so() -> None:
    rows = section("completions").rows
    assert rows["max_tokens"][0].endswith("; not together with max_completion_tokens")
    assert rows["max_completion_tokens"][0].endswith("; not together with max_tokens")


def test_whether_further_members_pass_is_told() -> None:
    texts = "".join(read().texts)
    assert texts.count("Members that are not named here are refused, unless the policies are lenient.") == 1
    assert texts.count("Members that are not named here pass as they are.") == len(ENDPOINTS) - 1
    assert texts.count("Whatever it holds passes.") == 2  # the routes' POST


@pytest.mark.parametrize("endpoint", [*JSON, *FORMS])
def test_an_example_for_the_shell_is_the_example_of_the_document(endpoint: str) -> None:
    content = openapi("2026")["paths"][f"/v1/{endpoint}"]["post"]["requestBody"]["content"]
    ((media_type, media),) = content.items()
    curl, url, *options = section(endpoint).words
    assert (curl, url) == ("curl", f"$GATEWAY/v1/{endpoint}")
    given = list(zip(options[::2], options[1::2], strict=True))
    assert given[0] == ("-H", "authorization: Bearer $KEY")
    if endpoint in JSON:
        assert given[1] == ("-H", f"content-type: {media_type}")
        assert given[2][0] == "-d"
        assert msgspec.json.decode(given[2][1]) == media["example"]
    else:
        parts = {name: value for _, (name, _, value) in ((o, v.partition("=")) for o, v in given[1:])}
        assert {name: value.lstrip("@") for name, value in parts.items()} == media["example"]
        assert {name for name, value in parts.items() if value[0] == "@"} == parts.keys() & {"file", "image"}


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("get_v1_models", "curl $GATEWAY/v1/models -H"),
        ("get_v1_models_model", "curl $GATEWAY/v1/models/kimi-k2 -H"),
        ("get_v1_files_rest", "curl $GATEWAY/v1/files/one -H"),
        ("delete_v1_files_rest", "curl -X DELETE $GATEWAY/v1/files/one -H"),
        ("post_v1_moderations", "curl $GATEWAY/v1/moderations -H"),
    ],
)
def test_other_operations_have_an_example_too(operation: str, expected: str) -> None:
    assert " ".join(read().sections[operation].words).startswith(expected)


def test_every_error_and_every_header_is_told() -> None:
    components = openapi("2026")["components"]
    assert components["responses"].keys() <= read().sections.keys()
    texts = "".join(read().texts)
    for name, header in components["headers"].items():
        assert name in texts
        assert header["description"] in texts
    for response in components["responses"].values():
        assert response["description"] in texts


# — it is a page of its own


def test_it_asks_for_nothing_and_runs_nothing() -> None:
    document = read()
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(document.tags)
    names = {name for name, _ in document.attributes}
    assert names == {"lang", "charset", "name", "content", "id", "class", "href", "data-of", "aria-label"}
    style = next(text for text in document.texts if "prefers-color-scheme: dark" in text)
    assert not re.search(r"url\(|@import|@font-face|expression", style)
    assert document.open == []


def test_every_link_leads_to_a_place_on_it_and_every_place_is_one() -> None:
    places, links = read().of("id"), read().of("href")
    assert max(Counter(places).values()) == 1
    assert {link.removeprefix("#") for link in links} <= set(places)
    assert all(link.startswith("#") for link in links)
    operations = {told["operationId"] for item in openapi("2026", PASSING)["paths"].values() for told in item.values()
                  if isinstance(told, dict)}  # fmt: skip
    assert operations <= {link.removeprefix("#") for link in links}


def said(text: str) -> dict[str, Any]:
    """A document in which this text stands wherever a text may."""
    member = {"description": text, "type": "string", "maxLength": 4}
    schema = {"type": "object", "properties": {text: member}, "required": [text]}
    operation = {
        "operationId": text,
        "summary": text,
        "tags": [text],
        "parameters": [{"name": "rest", "description": text, "example": text}],
        "requestBody": {"content": {text: {"schema": schema, "example": {text: text}}}},
        "responses": {"200": {"description": text, "content": {text: {}}}},
    }
    response = {"description": text, "headers": {text: {}}, "content": {text: {"examples": {"x": {"value": text}}}}}
    return {
        "info": {"title": text, "version": text, "description": text},
        "paths": {f"/v1/{text}": {"post": operation}},
        "components": {"schemas": {}, "headers": {text: {"description": text}}, "responses": {"openai_400": response}},
    }


def shape(text: str) -> list[str]:
    return [tag for tag in Page(page(said(text))).tags if tag != "wbr"]


HOSTILE = ["<script>alert(1)</script>", "\"'><b>", "</style><b>", "</pre></td>", "&lt;b&gt;", "<!--", "]]>", "' onx='"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_only_text(text: str) -> None:
    read = Page(page(said(text)))
    assert [tag for tag in read.tags if tag != "wbr"] == shape("x")
    assert {name for name, _ in read.attributes} == {name for name, _ in Page(page(said("x"))).attributes}
    assert text in "".join(read.texts)


@given(st.text(st.sampled_from("<>&\"'/=-!abst;\n _."), min_size=1) | st.text(min_size=1))
def test_no_text_of_a_document_is_ever_markup(text: str) -> None:
    assert shape(text) == shape("x")
