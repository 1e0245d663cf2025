"""Every endpoint, route and model's name through the whole gateway: what reaches the backend, what comes back, what is
written down."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from gateway.endpoints import ENDPOINTS
from tests.flows.test_ten_sentences import rows
from tests.proving.backend import Backend, Peer, chunked, forever, ok, play
from tests.proving.house import MODEL, House, documents, gateway

pytestmark = pytest.mark.anyio

PNG = "data:image/png;base64," + "A" * 400_000


def answer(usage: dict[str, Any] | None = None, **members: Any) -> bytes:
    return ok(json.dumps({**members, **({} if usage is None else {"usage": usage})}).encode())


async def ask(house: House, path: str, key: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    async with house.client(key) as client:
        return await client.post(path, json=body, headers=headers)


def sent(backend: Backend) -> list[Any]:
    return [json.loads(request.body) for request in backend.requests]


TEXT = [{"role": "user", "content": "hello there"}]
INPUT_OUTPUT = {"input_tokens": 7, "output_tokens": 5}

# endpoint → a request, the usage of its answer, and what is written down: input, cached and output tokens
JSON_ENDPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, int, int]]] = {
    "completions": ({"prompt": "hello"}, {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}, (7, 0, 5)),
    "chat/completions": (
        {"messages": TEXT},
        {
            "prompt_tokens": 7,
            "completion_tokens": 5,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
        (7, 3, 5),
    ),
    "responses": ({"input": "hello"}, {**INPUT_OUTPUT, "input_tokens_details": {"cached_tokens": 2}}, (7, 2, 5)),
    "messages": (
        {"messages": TEXT, "max_tokens": 9},
        {**INPUT_OUTPUT, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 10},
        (117, 100, 5),
    ),
    "embeddings": ({"input": ["a", "b"]}, {"prompt_tokens": 7, "total_tokens": 7}, (7, 0, 0)),
    "rerank": ({"query": "q", "documents": ["a"]}, {"total_tokens": 7}, (7, 0, 0)),
    "images/generations": ({"prompt": "a cat"}, INPUT_OUTPUT, (7, 0, 5)),
}


@pytest.mark.parametrize("prefix", ["/v1", "/inference/v1"])
@pytest.mark.parametrize("endpoint", JSON_ENDPOINTS)
async def test_an_endpoint_passes_its_bytes_both_ways_and_writes_its_usage_down(
    store_url: str, prefix: str, endpoint: str
) -> None:
    request, usage, expected = JSON_ENDPOINTS[endpoint]
    reply = answer(usage, odd=[1e-7, 12345678901234567890], model="whatever")
    async with Backend(forever(Peer.request, reply)) as backend, gateway(store_url, documents([backend.url])) as house:
        body = json.dumps({"model": MODEL, **request, "unheard_of": {"a": [1.50]}} | {}).encode()
        if endpoint == "completions":  # whose document is closed
            body = body.replace(b', "unheard_of": {"a": [1.5]}', b"")
        async with house.client(await house.key()) as client:
            got = await client.post(f"{prefix}/{endpoint}?beta=true", content=body)
        await house.settled()
        (asked,) = backend.requests
    assert (got.status_code, got.content) == (200, reply.partition(b"\r\n\r\n")[2])
    assert (asked.line, asked.body) == (f"POST /v1/{endpoint}?beta=true HTTP/1.1".encode(), body)
    (row,) = rows(store_url)
    assert (row["endpoint"], row["output_source"]) == (endpoint, "upstream")
    assert (row["input_tokens"], row["cached_tokens"], row["output_tokens"]) == expected


def event(name: str, **members: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **members})}\n\n".encode()


MESSAGES = (
    event("message_start", message={"id": "m", "usage": {"input_tokens": 7, "cache_read_input_tokens": 3}}),
    *(event("content_block_delta", index=0, delta={"type": "text_delta", "text": "x" * 900}) for _ in range(30)),
    event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 30}),
    event("message_stop"),
)
RESPONSES = (
    event("response.created", sequence_number=0),
    event("response.output_text.delta", delta="x", sequence_number=1),
    event("response.completed", sequence_number=2, response={"output": "x" * 30_000, "usage": INPUT_OUTPUT}),
)


@pytest.mark.parametrize(
    ("endpoint", "events", "expected"),
    [("messages", MESSAGES, (10, 3, 30)), ("responses", RESPONSES, (7, 0, 5))],
)
async def test_a_stream_of_named_events_passes_untouched_and_its_usage_is_found_at_either_end(
    store_url: str, endpoint: str, events: tuple[bytes, ...], expected: tuple[int, int, int]
) -> None:
    async with (
        Backend(forever(Peer.request, chunked(*events))) as backend,
        gateway(store_url, documents([backend.url])) as house,
    ):
        request = {"model": MODEL, **JSON_ENDPOINTS[endpoint][0], "stream": True}
        got = await ask(house, f"/v1/{endpoint}", await house.key(), request)
        await house.settled()
    assert got.content == b"".join(events)
    (row,) = rows(store_url)
    assert (row["input_tokens"], row["cached_tokens"], row["output_tokens"], row["ended"]) == (*expected, "complete")


@pytest.mark.parametrize(("endpoint", "events"), [("messages", MESSAGES[:4]), ("responses", RESPONSES[:2])])
async def test_a_stream_that_is_cut_says_so_in_its_own_dialect(
    store_url: str, endpoint: str, events: tuple[bytes, ...]
) -> None:
    cut = chunked(*events).removesuffix(b"0\r\n\r\n")
    async with (
        Backend(Peer.request, cut, Peer.close) as backend,
        gateway(store_url, documents([backend.url])) as house,
    ):
        body = json.dumps({"model": MODEL, **JSON_ENDPOINTS[endpoint][0], "stream": True}).encode()
        async with house.caller(await house.key(), body, path=f"/v1/{endpoint}".encode()) as caller:
            await caller.head()
            seen = await caller.rest()
        await house.settled()
    assert b"\r\n0\r\n\r\n" not in seen
    assert b"event: error\r\n" in seen or b"event: error\n" in seen
    (row,) = rows(store_url)
    assert (row["ended"], row["output_source"]) == (
        "upstream",
        "counted" if endpoint == "responses" else row["output_source"],
    )


# — errors in the caller's dialect


async def test_an_endpoint_of_anthropics_refuses_in_its_words(store_url: str) -> None:
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house:
        key = await house.key()
        async with house.client() as client:
            unknown = await client.post("/v1/messages", json={}, headers={"x-api-key": "gw_no"})
        invalid = await ask(house, "/v1/messages", key, {"model": MODEL, "messages": [], "temperature": 7})
        missing = await ask(house, "/v1/messages", key, {"model": "none", "messages": TEXT, "max_tokens": 1})
    found = [(r.status_code, r.json()["type"], r.json()["error"]["type"]) for r in (unknown, invalid, missing)]
    assert found == [
        (401, "error", "authentication_error"),
        (400, "error", "invalid_request_error"),
        (404, "error", "not_found_error"),
    ]
    assert all(word in invalid.json()["error"]["message"] for word in ("messages", "max_tokens", "temperature"))
    assert missing.json()["request_id"] == missing.headers["request-id"] == missing.headers["x-gateway-request-id"]
    assert missing.headers["request-id"]


async def test_who_prefers_problem_details_gets_them(store_url: str) -> None:
    one = {"free": {"limits": [{"name": "few", "count": "requests", "rate": "1/hour", "per": ["team"]}]}}
    reply = answer({"prompt_tokens": 1, "total_tokens": 1})
    async with (
        Backend(forever(Peer.request, reply)) as backend,
        gateway(store_url, documents([backend.url], plans=one)) as house,
    ):
        key = await house.key()
        accept = {"accept": "application/problem+json, application/json;q=0.5"}
        request = {"model": MODEL, "input": "a"}
        answers = [await ask(house, "/v1/embeddings", key, request, **accept) for _ in range(2)]
    refused = answers[1]
    assert [a.headers["content-type"] for a in answers] == ["application/json", "application/problem+json"]
    problem = refused.json()
    assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert (problem["status"], problem["violated-policies"]) == (429, ["few"])
    assert problem["error"]["code"] == "rate_limit_exceeded"


async def test_where_a_caller_of_messages_stands_is_told_in_anthropics_headers(store_url: str) -> None:
    limits = [
        {"name": "requests", "count": "requests", "rate": "10/minute", "per": ["team"]},
        {"name": "input", "count": "input_tokens", "rate": "1000/minute", "per": ["team"]},
    ]
    reply = answer(INPUT_OUTPUT).replace(b"\r\n\r\n", b"\r\nanthropic-ratelimit-requests-limit: 999\r\n\r\n", 1)
    async with (
        Backend(forever(Peer.request, reply)) as backend,
        gateway(store_url, documents([backend.url], plans={"free": {"limits": limits}})) as house,
    ):
        got = await ask(house, "/v1/messages", await house.key(), {"model": MODEL, "messages": TEXT, "max_tokens": 4})
    told = {name: value for name, value in got.headers.multi_items() if name.startswith("anthropic-ratelimit")}
    assert (told["anthropic-ratelimit-requests-limit"], told["anthropic-ratelimit-input-tokens-limit"]) == (
        "10",
        "1000",
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["anthropic-ratelimit-requests-reset"])


# — names of models


async def test_a_name_with_a_star_reaches_the_backend_as_what_the_star_stands_for(store_url: str) -> None:
    """Its rows carry the name that was asked; its limits count by the entry: a made-up name is no way around them."""
    few = {"name": "few", "count": "requests", "rate": "2/hour", "per": ["model"]}
    policies = {
        "models": {"openai/*": {"pool": "demo", "upstream_model": "*"}},
        "plans": {"free": {"limits": [few]}},
    }
    async with (
        Backend(forever(Peer.request, answer({"prompt_tokens": 1, "total_tokens": 1}, model="m"))) as backend,
        gateway(store_url, documents([backend.url], **policies)) as house,
    ):
        key = await house.key()
        names = ("openai/a", "openai/b", "openai/c", "other/a")
        answers = [await ask(house, "/v1/embeddings", key, {"model": name, "input": "x"}) for name in names]
        await house.settled()
    assert [a.status_code for a in answers] == [200, 200, 429, 404]
    assert [body["model"] for body in sent(backend)] == ["a", "b"]
    assert [row["model"] for row in rows(store_url)] == ["openai/a", "openai/b"]


@pytest.mark.parametrize("restore", [False, True])
async def test_an_answer_keeps_the_backends_name_unless_policy_restores_the_public_one(
    store_url: str, restore: bool
) -> None:
    named = {"public": {"pool": "demo", "upstream_model": "inner", "restore_name": restore}}
    body = b'{"id":"1", "model" : "inner", "data":[{"model":"inner"}], "n": 1e-7}'
    stream = chunked(b'data: {"model":"inner","choices":[]}\n\n', b"data: [DONE]\n\n")
    async with (
        Backend(forever(Peer.request, ok(body), Peer.request, stream)) as backend,
        gateway(store_url, documents([backend.url], models=named)) as house,
    ):
        key = await house.key()
        async with house.client(key) as client:
            whole = await client.post("/v1/embeddings", json={"model": "public", "input": "x"})
            request = {"model": "public", "prompt": "x", "stream": True}
            streamed = await client.post("/v1/completions", json=request)
    expected = body.replace(b'"inner"', b'"public"', 1).replace(b'"model" : ', b'"model":') if restore else body
    assert json.loads(whole.content) == json.loads(expected)
    assert b'"data":[{"model":"inner"}], "n": 1e-7}' in whole.content
    assert streamed.content == b'data: {"model":"inner","choices":[]}\n\ndata: [DONE]\n\n'


async def test_an_answer_that_comes_in_pieces_is_renamed_whole(store_url: str) -> None:
    named = {"public": {"pool": "demo", "upstream_model": "inner", "restore_name": True}}
    body = json.dumps({"data": "x" * 300_000, "model": "inner"}).encode()

    async def in_pieces(peer: Peer) -> None:
        await peer.request()
        await peer.send(*(ok(body)[at : at + 50_000] for at in range(0, len(ok(body)), 50_000)))

    async with Backend(in_pieces) as backend, gateway(store_url, documents([backend.url], models=named)) as house:
        got = await ask(house, "/v1/embeddings", await house.key(), {"model": "public", "input": "x"})
    assert got.json() == {"data": "x" * 300_000, "model": "public"}


async def test_a_model_is_found_by_any_of_its_names_and_only_by_who_may_use_it(store_url: str) -> None:
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house:
        key, other = await house.key(), await house.key(models=("nothing",))
        paths = [f"/v1/models/{MODEL}", f"/v1/models/{MODEL.replace('/', '%2F')}", "/inference/v1/models/llama"]
        async with house.client(key) as client:
            found = [await client.get(path) for path in [*paths, "/v1/models/none"]]
            listed = (await client.get("/v1/models")).json()
        async with house.client(other) as client:
            hidden = await client.get(paths[0])
    assert [r.json().get("id") for r in found] == [MODEL] * 3 + [None]
    assert (found[3].status_code, found[3].json()["error"]["code"], hidden.status_code) == (404, "model_not_found", 404)
    assert listed["data"] == [found[0].json()]


# — contexts


def too_long(window: int, prompt: int, output: int) -> bytes:
    message = (
        f"This model's maximum context length is {window} tokens. However, you requested {prompt + output} tokens "
        f"({prompt} in the messages, {output} in the completion). Please reduce the length."
    )
    body = json.dumps({"object": "error", "message": message, "type": "BadRequestError", "code": 400}).encode()
    return ok(body).replace(b"200 OK", b"400 Bad Request", 1)


OPENAI_LIKE = {"api": "openai", "retries": {"attempts": 1}}


def windowed(url: str, window: int | None) -> dict[str, Any]:
    model = {"pool": "demo"} if window is None else {"pool": "demo", "context_window": window}
    pool = {**OPENAI_LIKE, "upstreams": [{"url": url}]}
    return documents([], models={"m": model}, pools={"demo": pool})


async def test_max_tokens_is_lowered_to_what_fits_and_the_limits_reserve_no_more(store_url: str) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 90, "total_tokens": 100}
    limit = {"name": "out", "count": "output_tokens", "rate": "95/minute", "per": ["team"]}
    async with Backend(forever(Peer.request, answer(usage))) as backend:
        policies = windowed(backend.url, 100) | {"plans": {"free": {"limits": [limit]}}}
        async with gateway(store_url, policies) as house:
            request = {"model": "m", "prompt": [5] * 10, "max_tokens": 5000}
            got = await ask(house, "/v1/completions", await house.key(), request)
    assert got.status_code == 200
    assert sent(backend) == [{"model": "m", "prompt": [5] * 10, "max_tokens": 90}]


@pytest.mark.parametrize(
    ("given", "asked_again"),
    [
        ({"max_tokens": 500, "context_length_exceeded_behavior": "truncate"}, {"max_tokens": 70}),
        ({"max_completion_tokens": 500}, {"max_completion_tokens": 70}),
        ({}, {"max_tokens": 70}),
    ],
)
async def test_a_backend_that_names_what_fits_is_asked_once_more_for_that(
    store_url: str, given: dict[str, Any], asked_again: dict[str, Any]
) -> None:
    usage = {"prompt_tokens": 30, "completion_tokens": 70, "total_tokens": 100}
    script = forever(Peer.request, too_long(100, 30, 500), Peer.request, answer(usage))
    async with Backend(script) as backend, gateway(store_url, windowed(backend.url, None)) as house:
        request = {"model": "m", "messages": TEXT, **given}
        got = await ask(house, "/v1/chat/completions", await house.key(), request)
        await house.settled()
    given.pop("context_length_exceeded_behavior", None)
    assert got.status_code == 200
    assert sent(backend) == [{"model": "m", "messages": TEXT, **one} for one in (given, asked_again)]
    assert [row["output_tokens"] for row in rows(store_url)] == [70]


STOPPED = (
    "You passed 801 input tokens and requested 200 output tokens. However, the model's context length is only 1000"
)


@pytest.mark.parametrize("given", [{"max_tokens": 200}, {"max_completion_tokens": 200, "max_tokens": None}])
async def test_a_backend_that_did_not_count_to_the_end_is_asked_for_what_is_left_and_may_say_how_much_that_is(
    store_url: str, given: dict[str, Any]
) -> None:
    """vLLM tokenises a text no further than what fits; a chat without a bound gets what its window leaves."""
    refused = ok(json.dumps({"error": {"message": f"{STOPPED} tokens, …"}}).encode()).replace(b"200 OK", b"400 No", 1)
    script = forever(Peer.request, refused, Peer.request, answer({"prompt_tokens": 850, "completion_tokens": 150}))
    async with Backend(script) as backend, gateway(store_url, windowed(backend.url, None)) as house:
        key = await house.key()
        chat = await ask(house, "/v1/chat/completions", key, {"model": "m", "messages": TEXT, **given})
        prompt = await ask(house, "/v1/completions", key, {"model": "m", "prompt": "hello", "max_tokens": 200})
    assert [chat.status_code, prompt.status_code] == [200, 400]
    assert sent(backend)[1] == {"model": "m", "messages": TEXT}
    assert len(backend.requests) == 3


@pytest.mark.parametrize(
    ("told", "given"),
    [
        (too_long(100, 30, 500), {"context_length_exceeded_behavior": "error"}),
        (too_long(100, 100, 500), {}),  # nothing fits
        (ok(b'{"error":{"message":"bad seed"}}').replace(b"200 OK", b"400 No", 1), {}),
        (ok(b'"' + b"x" * 200_000 + b'"').replace(b"200 OK", b"400 No", 1), {}),  # longer than any error
    ],
)
async def test_an_error_that_is_wanted_or_names_no_room_is_the_callers(
    store_url: str, told: bytes, given: dict[str, Any]
) -> None:
    async with (
        Backend(forever(Peer.request, told)) as backend,
        gateway(store_url, windowed(backend.url, None)) as house,
    ):
        request = {"model": "m", "messages": TEXT, "max_tokens": 500, **given}
        got = await ask(house, "/v1/chat/completions", await house.key(), request)
    assert (got.status_code, got.content) == (400, told.partition(b"\r\n\r\n")[2])
    assert len(backend.requests) == 1


async def test_a_backend_that_never_has_room_is_asked_twice_and_no_more(store_url: str) -> None:
    async with (
        Backend(forever(Peer.request, too_long(100, 30, 500))) as backend,
        gateway(store_url, windowed(backend.url, None)) as house,
    ):
        got = await ask(
            house, "/v1/chat/completions", await house.key(), {"model": "m", "messages": TEXT, "max_tokens": 500}
        )
    assert (got.status_code, len(backend.requests)) == (400, 2)


async def test_a_counted_prompt_that_does_not_fit_is_refused_where_the_caller_wants_an_error(store_url: str) -> None:
    async with Backend() as backend, gateway(store_url, windowed(backend.url, 100)) as house:
        request = {"model": "m", "prompt": [5] * 90, "max_tokens": 11, "context_length_exceeded_behavior": "error"}
        got = await ask(house, "/v1/completions", await house.key(), request)
    assert (got.status_code, got.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert backend.requests == []


# — what is large


SHOWN = {
    "chat/completions": {"type": "image_url", "image_url": {"url": PNG}},
    "messages": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG[22:]}},
    "responses": {"type": "input_image", "image_url": PNG},
}


@pytest.mark.parametrize("endpoint", SHOWN)
async def test_an_image_in_a_message_is_estimated_as_an_image_and_not_as_text(store_url: str, endpoint: str) -> None:
    limit = {"name": "in", "count": "input_tokens", "rate": "2000/minute", "per": ["team"]}
    content = [{"type": "text", "text": "what is it"}, SHOWN[endpoint]]
    said = [{"role": "user", "content": content}]
    async with (
        Backend(forever(Peer.request, answer({"prompt_tokens": 900, "completion_tokens": 1}))) as backend,
        gateway(store_url, documents([backend.url], plans={"free": {"limits": [limit]}})) as house,
    ):
        request = {"model": MODEL, "max_tokens": 9, ENDPOINTS[endpoint].input: said}
        got = await ask(house, f"/v1/{endpoint}", await house.key(), request)
    assert got.status_code == 200
    assert sent(backend) == [request]


# — forms


BOUNDARY = "----gateway"


def form(*parts: tuple[str, bytes]) -> bytes:
    """A form of parts, each its header's end and its value."""
    pieces = [
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"
        for head, value in parts
    ]
    return b"".join((*pieces, f"--{BOUNDARY}--\r\n".encode()))


SOUND = bytes(range(256)) * 8000
FILE = ('name="file"; filename="a.wav"\r\nContent-Type: audio/wav', SOUND)
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.mark.parametrize("order", [0, 1])
async def test_a_form_is_passed_on_with_the_name_that_the_backend_knows_wherever_the_model_stands(
    store_url: str, order: int
) -> None:
    parts = [('name="model"', b"public"), FILE]
    named = {"public": {"pool": "demo", "upstream_model": "whisper-1"}}
    reply = answer({"input_tokens": 3, "output_tokens": 2}, text="hello")
    async with (
        Backend(forever(Peer.request, reply)) as backend,
        gateway(store_url, documents([backend.url], models=named)) as house,
    ):
        async with house.client(await house.key()) as client:
            body = form(*(parts[::-1] if order else parts))
            got = await client.post("/v1/audio/transcriptions", content=body, headers=FORM)
        await house.settled()
        (asked,) = backend.requests
    assert got.json()["text"] == "hello"
    assert asked.body == body.replace(b"public", b"whisper-1")
    assert dict(asked.headers)[b"content-type"] == FORM["content-type"].encode()
    (row,) = rows(store_url)
    assert (row["model"], row["endpoint"], row["input_tokens"]) == ("public", "audio/transcriptions", 3)


async def test_a_form_is_not_held_and_reaches_the_backend_while_it_comes(store_url: str) -> None:
    """The backend has the first half before the caller sends the second."""
    first_half = asyncio.Event()
    got = bytearray()

    async def reads(peer: Peer) -> None:
        await peer.head()
        while len(got) < len(SOUND) // 2 - 70_000:
            got.extend(await peer._reader.read(65536))
        first_half.set()
        while not got.endswith(b"0\r\n\r\n"):
            got.extend(await peer._reader.read(65536))
        await play(peer, answer(text="hello"))

    body = form(('name="model"', MODEL.encode()), FILE)

    async def halves() -> Any:
        yield body[: len(body) // 2]
        await asyncio.wait_for(first_half.wait(), 10)
        yield body[len(body) // 2 :]

    async with Backend(reads) as backend, gateway(store_url, documents([backend.url])) as house:
        async with house.client(await house.key()) as client:
            answered = await client.post("/v1/audio/transcriptions", content=halves(), headers=FORM)
    assert answered.json() == {"text": "hello"}
    assert b"transfer-encoding: chunked" in backend.requests[0].head.lower()


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (form(FILE), FORM, 422, "invalid_request_error"),
        (form(('name="model"', b"none"), FILE), FORM, 404, "model_not_found"),
        (b"{}", {"content-type": "application/json"}, 400, "invalid_form"),
        (form(('name="model"', MODEL.encode()), ('name="model"', b"other")), FORM, 400, "invalid_form"),
    ],
)
async def test_a_form_without_one_model_is_refused_and_reaches_nobody(
    store_url: str, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    async with Backend() as backend, gateway(store_url, documents([backend.url])) as house:
        async with house.client(await house.key()) as client:
            got = await client.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert (got.status_code, got.json()["error"]["code"]) == (status, code)
    assert backend.peers == []


async def test_who_leaves_in_the_middle_of_his_form_takes_the_backend_with_him(store_url: str) -> None:
    body = form(('name="model"', MODEL.encode()), FILE)
    framing = (b"content-length: %d" % len(body), *(f"{k}: {v}".encode() for k, v in FORM.items()))
    async with Backend(Peer.head) as backend, gateway(store_url, documents([backend.url])) as house:
        path = b"/v1/audio/transcriptions"
        async with house.caller(await house.key(), body[: len(body) // 2], *framing, path=path):
            while not backend.requests:
                await asyncio.sleep(0.005)
        await asyncio.wait_for(backend.peers[0].gone.wait(), 5)
        await house.settled()
    assert [(row["ended"], row["input_tokens"]) for row in rows(store_url)] == [("client", 0)]


# — routes


ROUTES = {
    "/v1/moderations": {"pool": "demo"},
    "/v1/files/*": {"pool": "demo", "methods": ["GET", "POST", "DELETE"]},
}


async def test_a_route_passes_with_key_limits_and_a_row_by_request(store_url: str) -> None:
    limits = [
        {"name": "requests", "count": "requests", "rate": "3/hour", "per": ["team"]},
        {"name": "tokens", "count": "total_tokens", "rate": "1/hour", "per": ["team"]},
    ]
    reply = answer({"prompt_tokens": 500, "total_tokens": 500}, done=True)
    async with (
        Backend(forever(Peer.request, reply)) as backend,
        gateway(store_url, documents([backend.url], routes=ROUTES, plans={"free": {"limits": limits}})) as house,
    ):
        async with house.client(await house.key()) as client:
            answers = [
                await client.post("/v1/moderations?x=%2F1", content=b"\0binary", headers={"content-type": "a/b"}),
                await client.get("/inference/v1/files/f-1/content"),
                await client.delete("/v1/files/f-1"),
                await client.get("/v1/files/f-1"),
            ]
        await house.settled()
    assert [a.status_code for a in answers] == [200, 200, 200, 429]
    assert [request.line for request in backend.requests] == [
        b"POST /v1/moderations?x=%2F1 HTTP/1.1",
        b"GET /v1/files/f-1/content HTTP/1.1",
        b"DELETE /v1/files/f-1 HTTP/1.1",
    ]
    assert backend.requests[0].body == b"\0binary"
    assert dict(backend.requests[0].headers)[b"content-type"] == b"a/b"
    found = [(row["model"], row["endpoint"], row["input_tokens"], row["cost_microusd"]) for row in rows(store_url)]
    assert found == [("/v1/moderations",) * 2 + (0, 0)] + [("/v1/files/*",) * 2 + (0, 0)] * 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/moderations", 405),
        ("POST", "/v1/moderations/", 404),
        ("POST", "/v1/files", 404),
        ("GET", "/v1/files/../moderations", 404),
        ("GET", "/v1/files/.", 404),
        ("GET", "/v1/files/..;/moderations", 404),
        ("GET", "/v1/files/.;x/moderations", 404),
        ("GET", "/v1/files/%%32e/moderations", 404),
        ("GET", "/v1/files/a%2Fb", 400),
        ("GET", "/v1/files/a%2e%2e", 400),
        ("GET", "/v1/files//x", 404),
        ("GET", "/v2/files/x", 404),
    ],
)
async def test_no_other_path_or_method_passes(store_url: str, method: str, path: str, status: int) -> None:
    async with Backend() as backend, gateway(store_url, documents([backend.url], routes=ROUTES)) as house:
        port = int(house.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"{method} {path} HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {await house.key()}\r\n"
        writer.write(head.encode() + b"content-length: 0\r\n\r\n")
        line = await reader.readline()
        writer.close()
    assert int(line.split()[1]) == status
    assert backend.peers == []


async def test_a_route_is_closed_to_teams_and_keys_that_do_not_name_it(store_url: str) -> None:
    teams = {"research": {"organisation": "acme", "plan": "free", "models": [MODEL, "/v1/moderations"]}}
    async with (
        Backend(forever(Peer.request, answer(done=True))) as backend,
        gateway(store_url, documents([backend.url], routes=ROUTES, teams=teams)) as house,
    ):
        async with house.client(await house.key()) as client:
            found = [(await client.post("/v1/moderations", json={})).status_code]
            refused = await client.get("/v1/files/f")
            found.append(refused.status_code)
        async with house.client(await house.key(models=(MODEL,))) as client:
            found.append((await client.post("/v1/moderations", json={})).status_code)
        async with house.client() as client:
            found.append((await client.post("/v1/moderations", json={})).status_code)
    assert found == [200, 403, 403, 401]
    assert refused.json()["error"]["message"] == "this team may not use /v1/files/*"


# — where the time went


@pytest.mark.parametrize("wanted", [False, True])
async def test_an_answer_says_where_its_time_went_where_policy_wants_it(store_url: str, wanted: bool) -> None:
    fields = b"fireworks-prompt-tokens: 3", b"fireworks-server-time-to-first-token: 0.1"
    stream = chunked(b"data: {}\n\n", b"data: [DONE]\n\n")
    policies = {"gateway": {"perf_headers": wanted}}
    async with (
        Backend(forever(Peer.request, ok(b"{}", *fields), Peer.request, stream)) as backend,
        gateway(store_url, documents([backend.url], **policies)) as house,
    ):
        async with house.client(await house.key()) as client:
            whole = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
            streamed = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True})
    told = whole.headers.get("server-timing"), streamed.headers.get("server-timing")
    number = r";dur=\d+\.\d{3}"
    if wanted:
        assert re.fullmatch(f"gateway{number}, queue{number}, upstream{number}", told[0] or "")
        assert re.fullmatch(f"upstream{number}", told[1] or "")
    else:
        assert told == (None, None)
    assert whole.headers["fireworks-prompt-tokens"] == "3"


async def test_a_refusal_says_where_its_time_went_as_far_as_it_came(store_url: str) -> None:
    number = r";dur=\d+\.\d{3}"
    async with (
        Backend(forever(Peer.request, Peer.reset)) as backend,
        gateway(store_url, documents([backend.url], gateway={"perf_headers": True})) as house,
    ):
        async with house.client(await house.key()) as client:
            body = {"model": MODEL, "prompt": "x"}
            answers = [await client.post("/v1/completions", json=given) for given in ({**body, "n": 0}, body)]
    assert [answer.status_code for answer in answers] == [422, 502]
    told = [answer.headers["server-timing"] for answer in answers]
    assert re.fullmatch(f"gateway{number}", told[0])
    assert re.fullmatch(f"gateway{number}, queue{number}, upstream{number}", told[1])


async def test_a_credential_is_shown_as_the_backend_wants_it(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKEND_KEY", "secret-of-the-backend")
    shown = []
    for api in ("openai", "anthropic"):
        async with Backend(forever(Peer.request, answer(INPUT_OUTPUT))) as backend:
            pools = {"demo": {"api": api, "upstreams": [{"url": backend.url, "key_env": "BACKEND_KEY"}]}}
            async with gateway(store_url, documents([], pools=pools)) as house:
                request = {"model": MODEL, "messages": TEXT, "max_tokens": 4}
                await ask(house, "/v1/messages", await house.key(), request, **{"anthropic-version": "2023-06-01"})
            headers = dict(backend.requests[0].headers)
            shown.append((headers.get(b"authorization"), headers.get(b"x-api-key"), headers[b"anthropic-version"]))
    secret = b"secret-of-the-backend"
    assert shown == [(b"Bearer " + secret, None, b"2023-06-01"), (None, secret, b"2023-06-01")]
