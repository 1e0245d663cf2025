"""The endpoints: a row for each, with all that differs between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gateway.errors import Dialect

# As OpenAI's base URL has it, and as the reference's server URL does.
PREFIXES = ("/v1", "/inference/v1")

Events = Literal["completions", "chat", "responses", "messages", "other"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint, or one route of the policies."""

    name: str  # what logs, rows and schemas call it: "chat/completions"; a route's is its path with its star
    body: Literal["json", "form", "any"] = "json"  # form: multipart, passed on as it comes; any: not looked into
    dialect: Dialect = "openai"  # in which its errors and limits are told
    events: Events = "other"  # how the events of its streams look
    input: str = "input"  # the member that is to be worked on
    output: str | None = None  # the member that bounds what is produced; None: its answers hold no tokens of output
    headed: bool = False  # whether usage may stand in the beginning of its answers
    rewrites: bool = False  # whether its requests have aliases, and its streams may be asked for their usage

    @property
    def invalid(self) -> int:
        """The status of a request that breaks the contract: Anthropic's clients know no 422."""
        return 400 if self.dialect == "anthropic" else 422

    @property
    def path(self) -> str:
        """What it is called by, here and at the backends."""
        return self.name if self.name.startswith("/") else f"/v1/{self.name}"


ENDPOINTS = {
    endpoint.name: endpoint
    for endpoint in (
        Endpoint("completions", events="completions", input="prompt", output="max_tokens", rewrites=True),
        Endpoint("chat/completions", events="chat", input="messages", output="max_tokens", rewrites=True),
        Endpoint("responses", events="responses", output="max_output_tokens", headed=True),
        Endpoint(
            "messages", dialect="anthropic", events="messages", input="messages", output="max_tokens", headed=True
        ),
        Endpoint("embeddings", headed=True),
        Endpoint("rerank", input="documents", headed=True),
        Endpoint("images/generations", input="prompt"),
        Endpoint("images/edits", body="form", input="prompt"),
        Endpoint("images/variations", body="form", input="image"),
        Endpoint("audio/transcriptions", body="form", input="file"),
        Endpoint("audio/translations", body="form", input="file"),
    )
}
