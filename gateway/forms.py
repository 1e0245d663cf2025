"""What callers of the control plane write, read strictly: the words of a query, the members of a body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.asgi import read_body
from gateway.errors import BadRequest, ClientGone

_MOST = 64 * 1024  # bytes of a body
FRESH = {"cache-control": "no-store"}

T = TypeVar("T", bound=msgspec.Struct)


def words_of(request: Request, once: Sequence[str] = (), often: Sequence[str] = ()) -> dict[str, list[str]]:
    """The words of the query by name. Raises BadRequest for a name that is not known, and for one that comes twice."""
    words: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        if name not in once and name not in often:
            raise odd(name, f'"{name}" is unknown, expected some of {", ".join((*once, *often)) or "(none)"}')
        if name in words and name in once:
            raise odd(name, f'"{name}" is given twice, expected once')
        words.setdefault(name, []).append(value)
    return words


def one_of(request: Request, *names: str) -> dict[str, str]:
    """The words of a query that may come once each. Raises BadRequest."""
    return {name: given[0] for name, given in words_of(request, names).items()}


async def body_of(request: Request, form: type[T]) -> T:
    """The JSON body as what it has to be. Raises BadRequest and TooLarge."""
    try:
        body = await read_body(request.scope, request.receive, _MOST)
    except ClientGone as gone:  # nobody reads this
        raise BadRequest("the body has no end", code="invalid_body") from gone
    try:
        return msgspec.json.decode(body, type=form)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        members = ", ".join(field.encode_name for field in msgspec.structs.fields(form))
        raise BadRequest(f"{wrong}; expected JSON with some of {members}", code="invalid_body") from wrong


def odd(name: str, text: str, code: str = "invalid_query") -> BadRequest:
    return BadRequest(text, code=code, param=name)


def listed(data: object) -> Response:
    """A list, as OpenAI's clients know them."""
    return JSONResponse({"object": "list", "data": data}, headers=FRESH)


def told(what: dict[str, object], status: int = 200) -> Response:
    return JSONResponse(what, status, headers=FRESH)
