"""The OpenAPI document: it says all that there is, and the gateway does what it says."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from msgspec.json import encode
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway import __version__, contract
from gateway.endpoints import ENDPOINTS
from gateway.openapi import openapi
from gateway.reference import page
from tests.proving import house
from tests.proving.backend import Backend, Peer, forever, ok

EXAMPLES = int(os.environ.get("CONTRACT_EXAMPLES", "6"))  # of each operation, sound ones and as many others
PASSING = [("/v1/moderations", ["POST"]), ("/v1/files/*", ["GET", "POST", "DELETE"])]
ROUTES = {path: {"pool": "plain", "methods": methods} for path, methods in PASSING}

Json = dict[str, Any]


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Path, method and what is told of it."""
    for path, item in document["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield path, method, item[method]


def bodies(document: Json) -> dict[str, Json]:
    """Path → the first content of its POST."""
    return {
        path: next(iter(told["requestBody"]["content"].values()))
        for path, method, told in operations(document)
        if method == "post"
    }


def complies(document: Json, schema: Json, value: object) -> bool:
    whole = {**schema, "components": document["components"]}
    return jsonschema_rs.Draft202012Validator(whole).is_valid(value)


# — what it says


@pytest.mark.parametrize("profile", contract.PROFILES)
def test_it_is_valid_openapi(profile: str) -> None:
    document = openapi(profile, PASSING)
    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    assert all(
        isinstance(operation, Ok) for operation in schema.get_all_operations()
    )  # every reference leads somewhere
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == f"{__version__}, profile {profile}"


def test_every_endpoint_and_every_route_is_in_it() -> None:
    there = {(path, method) for path, method, _ in operations(openapi("2026", PASSING))}
    assert there == {
        *((endpoint.path, "post") for endpoint in ENDPOINTS.values()),
        *(("/v1/models", "get"), ("/v1/models/{model}", "get"), ("/v1/limits", "get"), ("/v1/moderations", "post")),
        *(("/v1/files/{rest}", method) for method in ("get", "post", "delete")),
    }


def test_only_a_route_with_a_star_has_a_rest() -> None:
    paths = openapi("2026", PASSING)["paths"]
    told = {
        path: [parameter["name"] for parameter in item["parameters"]]
        for path, item in paths.items()
        if "parameters" in item
    }
    assert told == {"/v1/files/{rest}": ["rest"]}


def test_requests_are_told_by_the_schemas_that_check_them() -> None:
    document = openapi("4.21.6")
    schemas = {path: body["schema"] for path, body in bodies(document).items()}
    for endpoint in ENDPOINTS.values():
        if endpoint.body == "json":
            name = schemas[endpoint.path]["$ref"].rpartition("/")[2]
            assert document["components"]["schemas"][name] == contract.document(endpoint.name, "4.21.6")
        else:
            assert schemas[endpoint.path]["required"] == ["model"]


@pytest.mark.parametrize("profile", contract.PROFILES)
def test_every_example_is_accepted_by_the_checks(profile: str) -> None:
    examples = {path: body["example"] for path, body in bodies(openapi(profile)).items()}
    for endpoint in ENDPOINTS.values():
        example = examples[endpoint.path]
        assert isinstance(example["model"], str)
        if endpoint.body == "json":
            given = contract.take_apart(encode(example))
            assert contract.check(endpoint.name, given, profile=profile, strict=True)[1] == []


def test_every_operation_has_an_id_of_its_own_a_summary_in_a_line_and_refusals_that_are_defined() -> None:
    document = openapi("2026", [*PASSING, ("/v1/a-b", ["PUT"]), ("/v1/a_b", ["PUT"]), ("/v1/a/b", ["PUT"])])
    told = [told for _, _, told in operations(document)]
    assert max(Counter(each["operationId"] for each in told).values()) == 1
    for each in told:
        assert each["summary"]
        assert "\n" not in each["summary"]
        for status, response in each["responses"].items():
            if status != "200":
                assert response["$ref"].rpartition("/")[2] in document["components"]["responses"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/completions", "200 400 401 403 404 413 422 429 502 503 504"),
        ("/v1/audio/transcriptions", "200 400 401 403 404 413 422 429 502 503 504"),
        ("/v1/messages", "200 400 401 403 404 413 429 502 503 504"),  # Anthropic's clients know no 422
        ("/v1/moderations", "200 400 401 403 404 413 429 502 503 504"),  # nothing of it is looked into
    ],
)
def test_an_endpoint_tells_the_statuses_of_its_dialect(path: str, expected: str) -> None:
    assert sorted(openapi("2026", PASSING)["paths"][path]["post"]["responses"]) == expected.split()


@pytest.mark.parametrize(
    ("path", "status", "there", "not_there"),
    [
        ("/v1/completions", "200", "x-ratelimit-remaining-tokens ratelimit x-gateway-request-id", "retry-after"),
        ("/v1/completions", "429", "x-ratelimit-remaining-tokens ratelimit retry-after", "www-authenticate"),
        ("/v1/completions", "401", "www-authenticate", "ratelimit retry-after"),
        ("/v1/completions", "503", "retry-after", "ratelimit"),
        ("/v1/messages", "200", "anthropic-ratelimit-input-tokens-reset ratelimit", "x-ratelimit-remaining-tokens"),
        ("/v1/messages", "429", "anthropic-ratelimit-requests-limit retry-after", "x-ratelimit-remaining-requests"),
    ],
)
def test_the_headers_of_limits_are_told_where_they_are_sent(path: str, status: str, there: str, not_there: str) -> None:
    document = openapi("2026")
    response = document["paths"][path]["post"]["responses"][status]
    if "$ref" in response:
        response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
    headers = response["headers"].keys()
    assert headers >= set(there.split())
    assert not headers & set(not_there.split())


def test_what_an_error_looks_like_is_what_its_schema_says() -> None:
    document = openapi("2026")
    shown = 0
    for response in document["components"]["responses"].values():
        for media in response["content"].values():
            for example in media["examples"].values():
                assert complies(document, media["schema"], example["value"])
                assert not complies(document, media["schema"], {})
                shown += 1
    assert shown >= 2 * 2 * 9


def test_a_problem_document_and_the_words_of_the_endpoint_are_told_of_every_error() -> None:
    for response in openapi("2026")["components"]["responses"].values():
        assert list(response["content"]) == ["application/json", "application/problem+json"]


# — what the gateway does

Operation: TypeAlias = APIOperation[Any, Any, Any, Any]

NAMED = b"x-request-id"
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CONFORMS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@dataclass
class Walk:
    """Requests that schemathesis makes up, all of them sound or none, and what came of each, by its id."""

    document: Json
    mode: GenerationMode
    url: str
    key: str
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)  # id → status, and the exchange in words
    wrong: list[str] = field(default_factory=list)  # answers that are not as the document says

    def through(self, which: Callable[[Operation], bool]) -> None:
        for result in schemathesis.openapi.from_dict(self.document).get_all_operations():
            assert isinstance(result, Ok)
            operation = result.ok()
            if which(operation):
                self.over(operation)

    def over(self, operation: Operation) -> None:
        @SETTINGS
        @given(operation.as_strategy(generation_mode=self.mode))
        def ask(case: Case[Any]) -> None:
            if self.mode is GenerationMode.POSITIVE:
                case.body = whole(case.body)
            self.ask(case)

        ask()

    def ask(self, case: Case[Any]) -> None:
        called = uuid.uuid4().hex
        accept = ("*/*", "application/problem+json")[len(self.answers) % 2]
        headers = {"authorization": f"Bearer {self.key}", NAMED.decode(): called, "accept": accept}
        headers["x-echo"] = "tokens=2"  # whatever number is asked for
        response = case.call(base_url=self.url, headers=headers)
        told = f"{case.operation.label} {case.path_parameters} {case.body!r:.500} → {response.text:.300}"
        self.answers[called] = response.status_code, told
        try:
            case.validate_response(response, checks=CONFORMS)
        except (AssertionError, BaseExceptionGroup) as wrong:
            self.wrong.append(f"{told}: {wrong!r}")


def whole(value: Any) -> Any:
    """The same value with 1 in the place of 1.0, which is an integer to JSON Schema, and to no server of models."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [whole(item) for item in value]
        case dict():
            return {name: whole(item) for name, item in value.items()}
    return value


def narrowed(document: Json, mode: GenerationMode) -> Json:
    """The document with the models that there are, without keys that are made up. Sound bodies ask for what a backend
    is able to give, and unsound forms are so by their model, as all else in them passes."""
    document = {**deepcopy(document), "security": []}
    sound = mode is GenerationMode.POSITIVE
    for path, body in bodies(document).items():
        schema = body.get("schema", {})
        is_form = "$ref" not in schema
        if not is_form:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        members = schema.get("properties", {})
        if "model" in members:
            members["model"] = {"const": "plain" if path in PLAIN else "llama"}
        if "dimensions" in members and sound:
            members["dimensions"] = {"type": "integer", "minimum": 1, "maximum": 64}
        if "model" in members and is_form:
            schema["properties"] = members if sound else {"model": members["model"]}
            schema["additionalProperties"] = not sound  # not every text can be the name of a part
    return document


# What the scripted backend does not speak is answered by one that says the same to everybody.
PLAIN = ("/v1/images/variations", "/v1/audio/translations")


@asynccontextmanager
async def walked(
    store_url: str, profile: str, mode: GenerationMode, which: Callable[[Operation], bool]
) -> AsyncIterator[tuple[Walk, set[str]]]:
    """A walk that is over, and the ids of the requests that reached a backend."""
    async with house.echo() as echo, Backend(forever(Peer.request, ok(b"{}"))) as plain:
        policies = house.documents([echo], routes=ROUTES)
        policies["gateway"]["profile"] = profile
        policies["pools"]["plain"] = {"upstreams": [{"url": plain.url}]}
        policies["models"]["plain"] = {"pool": "plain", "price": {"input": 1.0, "output": 2.0}}
        async with house.gateway(store_url, policies) as served:
            walk = Walk(narrowed(openapi(profile, PASSING), mode), mode, served.url, await served.key())
            await asyncio.to_thread(walk.through, which)
            async with httpx.AsyncClient(trust_env=False) as client:
                rows = (await client.get(f"{echo}/echo/ledger")).json()
            reached = {value for row in rows for name, value in row["headers"] if name == NAMED.decode()}
            reached |= {value.decode() for asked in plain.requests for name, value in asked.headers if name == NAMED}
            yield walk, reached


LIMITS = [
    {"name": "requests", "count": "requests", "rate": "2/minute", "per": ["key"], "soft": "90%"},
    *(
        {"name": count, "count": count, "rate": "1000000/minute", "per": ["key"]}
        for count in ("input_tokens", "uncached_input_tokens", "output_tokens", "total_tokens")
    ),
]


@pytest.mark.parametrize("endpoint", ["chat/completions", "messages"])
async def test_the_headers_that_a_caller_is_sent_are_those_of_the_document(store_url: str, endpoint: str) -> None:
    document = openapi("2026")
    path, components = f"/v1/{endpoint}", document["components"]
    responses = document["paths"][path]["post"]["responses"]
    refused = components["responses"][responses["429"]["$ref"].rpartition("/")[2]]
    told = [responses["200"]["headers"].keys(), refused["headers"].keys() - {"x-should-retry"}]
    body = {"model": "llama", "max_tokens": 2, "messages": [{"role": "user", "content": "to be or not"}]}
    async with house.echo() as echo:
        policies = house.documents([echo], plans={"free": {"limits": LIMITS}}, gateway={"perf_headers": True})
        async with house.gateway(store_url, policies) as served, served.client(await served.key()) as client:
            answers = [await client.post(path, json=body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    beside = {"content-length", "content-type", "date", "server", "connection"}
    for answer, names in zip(answers[1:], told, strict=True):
        sent = {name for name in answer.headers.keys() - beside if not name.startswith("fireworks-")}
        assert sent == names - {"x-gateway-limits"} - ({"request-id"} if endpoint != "messages" else set())


async def test_whoever_asks_is_told_with_the_routes_of_the_policies_and_needs_no_key(store_url: str) -> None:
    policies = house.documents(
        ["http://127.0.0.1:9"],
        gateway={"profile": "4.21.6"},
        routes={"/v1/files/*": {"pool": "demo"}},
    )
    async with house.gateway(store_url, policies) as served, served.client() as client:
        document, shown = await client.get("/openapi.json"), await client.get("/docs")
    assert document.headers["content-type"] == "application/json"
    assert document.json() == openapi("4.21.6", [("/v1/files/*", ["POST"])])
    assert shown.headers["content-type"] == "text/html; charset=utf-8"
    assert shown.text == page(document.json())


async def test_every_example_is_answered(store_url: str) -> None:
    content = {path: body for path, body in bodies(openapi("2026")).items() if path not in PLAIN}
    async with house.echo() as echo:
        models = {"kimi-k2": {"pool": "demo", "price": {"input": 1.0, "output": 2.0}}}
        policies = house.documents([echo], models=models)
        async with house.gateway(store_url, policies) as served, served.client(await served.key()) as client:
            for path, body in content.items():
                if "$ref" in body["schema"]:
                    answer = await client.post(path, json=body["example"])
                else:
                    files = {name for name, part in body["schema"]["properties"].items() if "contentMediaType" in part}
                    parts = {n: (v if n in files else None, v.encode()) for n, v in body["example"].items()}
                    answer = await client.post(path, files=parts)
                assert (path, answer.status_code) == (path, 200)
            assert (await client.get("/v1/models/kimi-k2")).status_code == 200
    assert len(content) == len(ENDPOINTS) - len(PLAIN)


@pytest.mark.parametrize("profile", contract.PROFILES)
async def test_what_the_document_allows_reaches_a_backend_and_is_answered_as_it_says(
    store_url: str, profile: str
) -> None:
    every = profile == contract.DEFAULT_PROFILE
    which = lambda operation: every or operation.path == "/v1/completions"  # noqa: E731 - the others have one table
    async with walked(store_url, profile, GenerationMode.POSITIVE, which) as (walk, reached):
        assert walk.wrong == []
        own = {
            called
            for called, (_, told) in walk.answers.items()
            if told.startswith(("GET /v1/models", "GET /v1/limits"))
        }
        assert [told for called, (_, told) in walk.answers.items() if called not in reached | own] == []
        assert 200 in {status for status, _ in walk.answers.values()}


@pytest.mark.parametrize("profile", contract.PROFILES)
async def test_what_the_document_does_not_allow_is_refused_and_reaches_no_backend(store_url: str, profile: str) -> None:
    paths = {endpoint.path for endpoint in ENDPOINTS.values()}
    every = profile == contract.DEFAULT_PROFILE
    which = lambda operation: operation.path in (paths if every else {"/v1/completions"})  # noqa: E731
    async with walked(store_url, profile, GenerationMode.NEGATIVE, which) as (walk, reached):
        assert walk.wrong == []
        assert [told for called, (_, told) in walk.answers.items() if called in reached] == []
        assert [told for status, told in walk.answers.values() if not 400 <= status < 500] == []
        assert walk.answers
