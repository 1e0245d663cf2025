"""Requests as bytes, and what a server must make of them: framing, smuggling, splitting, heads.

The ideas are our own, those of the RFCs that are named, and those of two projects' tests, written anew here:

- llhttp (github.com/nodejs/llhttp, test/request/: content-length.md, transfer-encoding.md, invalid.md, method.md,
  uri.md, connection.md, pipelining.md)
- h11 (github.com/python-hyper/h11, h11/tests/test_headers.py and test_io.py)

Where llhttp's tests accept something that is refused here, the case says so.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """Bytes that a caller sends at once.

    `status` is the one answer's; `taken` says whether an application is given the request whole. After a refusal the
    connection is closed; after an answer it is, where `closed` says so.
    """

    name: str
    raw: bytes
    status: int = 400
    taken: bool = False
    closed: bool = True


def head(*fields: bytes, line: bytes = b"POST /v1/completions HTTP/1.1", host: bool = True) -> bytes:
    """A head of these fields, with a Host and its blank line."""
    return b"\r\n".join((line, *((b"Host: gateway",) if host else ()), *fields, b"", b""))


def _ok(name: str, raw: bytes, *, closed: bool = False) -> Case:
    return Case(name, raw, 200, taken=True, closed=closed)


CHUNKED = b"Transfer-Encoding: chunked"
LENGTH = b"Content-Length: 5"
# What a smuggler hides behind the request that is seen.
HIDDEN = head(line=b"GET /hidden HTTP/1.1")
GET = b"GET /v1/models HTTP/1.1"

PLAIN = [
    _ok("a GET", head(line=GET)),
    _ok("a POST with a length", head(LENGTH) + b"hello"),
    _ok("a POST without a body", head(b"Content-Length: 0")),
    _ok("a POST without any framing has no body", head()),
    _ok("a GET with a body", head(LENGTH, line=GET) + b"hello"),
    _ok("names in any case", head(b"conTENT-Length: 5") + b"hello"),
    _ok("white space around a value", head(b"Content-Length:  5 \t") + b"hello"),
    _ok("a value that is empty", head(b"X-Empty:", LENGTH) + b"hello"),
    _ok("a value of one letter", head(b"X-One: a", LENGTH) + b"hello"),
    _ok("a tab inside a value", head(b"X-Tab: a\tb", LENGTH) + b"hello"),
    _ok("a value beyond ASCII", head(b"X-Name: J\xc3\xbcrgen \xff", LENGTH) + b"hello"),
    _ok("an underscore in a name", head(b"X_Team: a", b"X-Team: b", LENGTH) + b"hello"),
    _ok("empty lines before the request (RFC 9112 2.2)", b"\r\n\r\n" + head(line=GET)),
    _ok("an empty line after the request, as old browsers sent it", head(LENGTH) + b"hello\r\n"),
    _ok("Connection: close", head(b"Connection: close", line=GET), closed=True),
    _ok("Connection: close among others", head(b"Connection: foo, close", line=GET), closed=True),
    _ok("a query with anything in it", head(line=b"GET /v1/models?a=//..%2f%00&b=http://x/?y HTTP/1.1")),
]

CONTENT_LENGTH = [
    _ok("zeros before a length", head(b"Content-Length: 005") + b"hello"),
    Case("lengths that differ", head(LENGTH, b"Content-Length: 6") + b"hello!"),
    Case("lengths that agree", head(LENGTH, LENGTH) + b"hello"),  # h11 takes them for one
    Case("a list of lengths", head(b"Content-Length: 5, 5") + b"hello"),
    Case("a list of different lengths", head(b"Content-Length: 5,6") + b"hello"),
    Case("a length with a plus", head(b"Content-Length: +5") + b"hello"),
    Case("a length with a minus", head(b"Content-Length: -5") + b"hello"),
    Case("minus zero", head(b"Content-Length: -0")),
    Case("a length with a point", head(b"Content-Length: 5.0") + b"hello"),
    Case("a length with an exponent", head(b"Content-Length: 5e0") + b"hello"),
    Case("a hexadecimal length", head(b"Content-Length: 0x5") + b"hello"),
    Case("a length with an underscore, which int() takes", head(b"Content-Length: 1_0") + b"hello"),
    Case("a length in Arabic digits, which int() takes", head("Content-Length: ٥".encode()) + b"hello"),
    Case("a length with a space in it", head(b"Content-Length: 4 2") + b"hello"),
    Case("a length that is a word", head(b"Content-Length: asdf") + b"hello"),
    Case("a length with a letter behind it", head(b"Content-Length: 5x") + b"hello"),
    Case("a length that is empty", head(b"Content-Length:") + b"hello"),
    Case("a length that no integer holds", head(b"Content-Length: 1000000000000000000000")),
    Case("a length of a thousand digits", head(b"Content-Length: " + b"9" * 1000)),
    Case("a space before the colon", head(b"Content-Length : 5") + b"hello"),
    Case("CR in the name of the length", head(b"Content\rLength: 5") + b"hello"),
    Case("a length and a vertical tab", head(b"Content-Length:\x0b5") + b"hello"),
]

TRANSFER_ENCODING = [
    _ok("chunks", head(CHUNKED) + b"5\r\nhello\r\n0\r\n\r\n"),
    _ok(
        "chunks with sizes in upper and lower case", head(CHUNKED) + b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n"
    ),
    _ok("a coding in mixed case", head(b"Transfer-Encoding: cHuNkEd") + b"5\r\nhello\r\n0\r\n\r\n"),
    _ok("no chunk but the last", head(CHUNKED) + b"0\r\n\r\n"),
    _ok("a last chunk of three zeros", head(CHUNKED) + b"5\r\nhello\r\n000\r\n\r\n"),
    _ok("chunk extensions", head(CHUNKED) + b'5;a;b=c;d="e \\" f"\r\nhello\r\n0\r\n\r\n'),
    _ok("trailers", head(CHUNKED) + b"5\r\nhello\r\n0\r\nVary: *\r\nContent-Type: text/plain\r\n\r\n"),
    Case("chunks and a length", head(CHUNKED, LENGTH) + b"0\r\n\r\n" + HIDDEN),
    Case("a length and chunks", head(LENGTH, CHUNKED) + b"0\r\n\r\n" + HIDDEN),
    Case("a length of zero and chunks", head(b"Content-Length: 0", CHUNKED) + b"5\r\nhello\r\n0\r\n\r\n"),
    Case("two codings, chunked last", head(b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n"),  # llhttp lets it pass
    Case("two codings, chunked first", head(b"Transfer-Encoding: chunked, gzip") + b"0\r\n\r\n"),
    Case("chunked twice in one field", head(b"Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n"),
    Case("chunked twice in two fields", head(CHUNKED, CHUNKED) + b"0\r\n\r\n"),
    Case("chunked, then identity", head(CHUNKED, b"Transfer-Encoding: identity") + b"0\r\n\r\n"),
    Case("identity, then chunked", head(b"Transfer-Encoding: identity", CHUNKED) + b"0\r\n\r\n"),
    Case("gzip, then chunked, in two fields", head(b"Transfer-Encoding: gzip", CHUNKED) + b"0\r\n\r\n"),
    Case("a coding nobody knows", head(b"Transfer-Encoding: pigeons") + b"hello"),
    Case("identity", head(b"Transfer-Encoding: identity") + b"hello"),
    Case("identity with a length", head(b"Transfer-Encoding: identity", LENGTH) + b"hello"),
    Case("a coding that is empty, and a length", head(b"Transfer-Encoding:", LENGTH) + b"hello"),
    Case("a coding that is empty", head(b"Transfer-Encoding:") + b"0\r\n\r\n"),
    Case("a letter before chunked", head(b"Transfer-Encoding: xchunked") + b"0\r\n\r\n"),
    Case("a letter behind chunked", head(b"Transfer-Encoding: chunkedx") + b"0\r\n\r\n"),
    Case("chunked in quotes", head(b'Transfer-Encoding: "chunked"') + b"0\r\n\r\n"),
    Case("chunked with a parameter", head(b"Transfer-Encoding: chunked;q=1") + b"0\r\n\r\n"),
    Case("a comma before chunked", head(b"Transfer-Encoding: , chunked") + b"0\r\n\r\n"),
    Case("a vertical tab before chunked", head(b"Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n"),
    Case("chunked on a line of its own (obs-fold)", head(b"Transfer-Encoding:\r\n chunked") + b"0\r\n\r\n"),
    Case("a space before the colon of a coding", head(b"Transfer-Encoding : chunked") + b"0\r\n\r\n"),
    Case("a tab before the colon of a coding", head(b"Transfer-Encoding\t: chunked") + b"0\r\n\r\n"),
    Case("a coding behind a bare CR", head(b"X: a\rTransfer-Encoding: chunked") + b"0\r\n\r\n"),
    Case("a coding behind a bare LF", head(b"X: a\nTransfer-Encoding: chunked") + b"0\r\n\r\n"),
    Case("chunks in HTTP/1.0", head(CHUNKED, line=b"POST / HTTP/1.0") + b"0\r\n\r\n"),  # RFC 9112 6.1
    Case("a size that is not hexadecimal", head(CHUNKED) + b"g\r\nhello\r\n0\r\n\r\n"),
    Case("a size with a sign", head(CHUNKED) + b"+5\r\nhello\r\n0\r\n\r\n"),
    Case("a size with 0x", head(CHUNKED) + b"0x5\r\nhello\r\n0\r\n\r\n"),
    Case("a size that no integer holds", head(CHUNKED) + b"9" * 100 + b"\r\nhello"),
    Case("a size just too great", head(CHUNKED) + b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
    Case("a size that is empty", head(CHUNKED) + b"\r\nhello\r\n0\r\n\r\n"),
    Case("NUL in a size", head(CHUNKED) + b"5\x00\r\nhello\r\n0\r\n\r\n"),
    Case("NUL in a chunk extension", head(CHUNKED) + b"5;a=\x00\r\nhello\r\n0\r\n\r\n"),
    Case("a bare LF in a chunk extension", head(CHUNKED) + b"5;a\nhello\r\n0\r\n\r\n"),
    Case("a bare CR in a chunk extension", head(CHUNKED) + b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
    Case("an extension without a semicolon", head(CHUNKED) + b"2 erfr\r\naa\r\n0\r\n\r\n"),
    Case("nothing after the semicolon", head(CHUNKED) + b"2;\r\naa\r\n0\r\n\r\n"),
    Case("quotes that do not close", head(CHUNKED) + b'5;a="b\r\nhello\r\n0\r\n\r\n'),
    Case("a size ended by a bare LF", head(CHUNKED) + b"5\nhello\r\n0\r\n\r\n"),
    Case("a chunk ended by a bare LF", head(CHUNKED) + b"5\r\nhello\n0\r\n\r\n"),
    Case("a chunk ended by other bytes", head(CHUNKED) + b"3\r\nxxx__1a\r\n"),
    Case("a chunk ended by CR and another byte", head(CHUNKED) + b"3\r\nxxx\r_1a\r\n"),
    Case("a chunk ended by another byte and LF", head(CHUNKED) + b"3\r\nxxx_\n1a\r\n"),
    Case("a chunk longer than it says", head(CHUNKED) + b"3\r\nhello\r\n0\r\n\r\n"),
    Case("a trailer that is not a field", head(CHUNKED) + b"0\r\nno colon\r\n\r\n"),
]

HEADS = [
    Case("a space inside a name", head(b"Fo o: bar")),
    Case("a letter that no name has", head(b"Fo@: bar")),
    Case("a control character in a name", head(b"Foo\x01test: bar")),
    Case("NUL in a name", head(b"foo\x00bar: baz")),
    Case("a byte beyond ASCII in a name", head(b"foo\xffbar: baz")),
    Case("a name that is empty", head(b": bar")),
    Case("a line without a colon", head(b"Foo")),
    Case("a name folded", head(b"name\r\n : value")),
    Case("a value folded", head(b"Foo: a\r\n b")),
    Case("a length hidden in a folded value", head(b"Foo: bar\r\n Content-Length: 38") + HIDDEN),
    Case("the first field indented", head(line=b"GET / HTTP/1.1\r\n X: y")),
    Case("fields between bare LFs", head(line=GET).replace(b"\r\n", b"\n")),
    Case("one bare LF", head(b"Dummy: x\nContent-Length: 23") + HIDDEN),
    Case("one bare CR", head(b"Foo: 1\rBar: 2")),
    Case("CR in the place of the blank line", head(line=GET)[:-2] + b"\rZGET /evil: HTTP/1.1\r\nHost: a\r\n\r\n"),
    *(Case(f"byte {c:#04x} in a value", head(b"X: a" + bytes([c]) + b"b")) for c in range(32) if c != 9),
    Case("byte 0x7f in a value", head(b"X: a\x7fb")),
]

LINES = [
    Case("nothing that is HTTP", b"hello, world\r\n\r\n"),
    Case("the hello of TLS", bytes.fromhex("16030100c8010000c403036162") + bytes(64)),
    Case("a method nobody knows", head(line=b"BREW / HTTP/1.1")),
    Case("a method with a letter too many", head(line=b"GETX / HTTP/1.1")),
    Case("a method in lower case", head(line=b"get / HTTP/1.1")),
    _ok("two spaces before the version, which llhttp takes for one", head(line=b"GET /  HTTP/1.1")),
    Case("a tab for a space", head(line=b"GET\t/\tHTTP/1.1")),
    Case("a space in the target", head(line=b"GET /a b HTTP/1.1")),
    Case("no target", head(line=b"GET HTTP/1.1")),
    Case("a version in lower case", head(line=b"GET / http/1.1")),
    Case("words behind the version", head(line=b"HEAD /foo HTTP/1.1 xxxxxx")),
    Case("another protocol", head(line=b"GET / ICE/1.0")),
    Case("a word that ends in HTTP", head(line=b"GET / IHTTP/1.0")),
    Case("RTSP", head(line=b"PUT / RTSP/1.0")),
    Case("a method of RTSP", head(line=b"ANNOUNCE / HTTP/1.1")),
    Case("HTTP/1.2", head(line=b"GET / HTTP/1.2")),
    Case("HTTP/1.10", head(line=b"GET / HTTP/1.10")),
    Case("HTTP/1", head(line=b"GET / HTTP/1")),
    Case("HTTP/5.6", head(line=b"GET / HTTP/5.6")),
    Case("HTTP/2.0", head(line=b"GET / HTTP/2.0"), 505),
    Case("HTTP/0.9 by its name", head(line=b"GET / HTTP/0.9"), 505),
    Case("HTTP/0.9 by its form", b"GET /\r\n\r\n", 505),
    Case("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)),
    Case("CONNECT", head(line=b"CONNECT example.com:443 HTTP/1.1") + HIDDEN, 405),
    Case("TRACE", head(line=b"TRACE / HTTP/1.1"), 405),
    Case("an asterisk with OPTIONS", head(line=b"OPTIONS * HTTP/1.1")),
    Case("an asterisk with GET", head(line=b"GET * HTTP/1.1")),
    Case("an absolute target", head(line=b"GET http://gateway/v1/models HTTP/1.1")),
    Case("an absolute target of another host", head(line=b"GET http://evil.example/v1/models HTTP/1.1")),
    Case("an absolute target of another scheme", head(line=b"GET file:///etc/passwd HTTP/1.1")),
    Case("a target that is a host", head(line=b"GET evil.example HTTP/1.1")),
    Case("a target that is a user's", head(line=b"GET @evil.example/v1/models HTTP/1.1")),
    Case("a target that is a query", head(line=b"GET ?a=b HTTP/1.1")),
    Case("a fragment", head(line=b"GET /v1/models#a HTTP/1.1")),
    Case("a fragment in a query", head(line=b"GET /v1/models?a#b HTTP/1.1")),
    Case("a target beyond ASCII", head(line="GET /é HTTP/1.1".encode())),
    Case("NUL in a target", head(line=b"GET /a\x00b HTTP/1.1")),
    Case("DEL in a target", head(line=b"GET /a\x7fb HTTP/1.1")),
    Case("CR in a target", head(line=b"GET /a\rb HTTP/1.1")),
]

HOST = [
    Case("no Host", head(line=GET, host=False)),
    Case("two Hosts", head(b"Host: gateway", line=GET)),
    Case("two Hosts that differ", head(b"Host: evil.example", line=GET)),
    *(
        Case(f"Host: {value.decode('latin-1')!r}", head(b"Host: " + value, line=GET, host=False))
        for value in (
            b"",
            b"a b",
            b"a, b",
            b"a/b",
            b"a?b",
            b"a#b",
            b"user@a",
            b"a:b",
            b"a:1:2",
            b"[::1",
            b"::1",
            b"a\\b",
        )
    ),
    *(
        _ok(f"Host: {value.decode()}", head(b"Host: " + value, line=GET, host=False))
        for value in (b"a", b"a.example:8080", b"a_b", b"127.0.0.1:1", b"[::1]", b"[::1]:8080", b"a.:")
    ),
    _ok("HTTP/1.0 without Host", head(line=b"GET / HTTP/1.0", host=False), closed=True),
    _ok("HTTP/1.0 with Host", head(line=b"GET / HTTP/1.0"), closed=True),
    _ok("HTTP/1.0 is not kept", head(b"Connection: keep-alive", line=b"GET / HTTP/1.0"), closed=True),
    Case("HTTP/1.0 with two Hosts", head(b"Host: gateway", line=b"GET / HTTP/1.0")),
]

UPGRADE = [
    Case(f"{name}, {then}", raw + more)
    for name, raw in {
        "h2c": head(
            b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__", LENGTH
        ),
        "an Upgrade that Connection does not name": head(b"Upgrade: h2c", LENGTH),
        "HTTP2-Settings alone": head(b"HTTP2-Settings: AAMAAABk", LENGTH),
        "a WebSocket": head(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", LENGTH),
        "an Upgrade to the same": head(b"Connection: Upgrade", b"Upgrade: HTTP/1.1", LENGTH),
        "an Upgrade that is empty": head(b"Connection: Upgrade", b"Upgrade:", LENGTH),
    }.items()
    for then, more in {"a body": b"hello", "a request for a body": HIDDEN}.items()
]

EXPECT = [
    Case("an Expect that is something else", head(b"Expect: 200-ok", LENGTH) + b"hello", 417),
    Case("an Expect and something else", head(b"Expect: 100-continue, 200-ok", LENGTH) + b"hello", 417),
    Case("an Expect that is empty", head(b"Expect:", LENGTH) + b"hello", 417),
    _ok(
        "an Expect in HTTP/1.0 is not heard",
        head(b"Expect: 100-continue", LENGTH, line=b"POST / HTTP/1.0") + b"hello",
        closed=True,
    ),
]

# The first is answered, the connection ends, and what came too early was never a request.
PIPELINED = [
    _ok("two GETs", head(line=GET) + HIDDEN, closed=True),
    _ok("a hundred GETs", head(line=GET) * 100, closed=True),
    _ok("a GET behind a POST", head(LENGTH) + b"hello" + HIDDEN, closed=True),
    _ok("a GET behind chunks", head(CHUNKED) + b"5\r\nhello\r\n0\r\n\r\n" + HIDDEN, closed=True),
    _ok("a GET behind a POST without any framing", head() + HIDDEN, closed=True),
    _ok("a GET behind the last request", head(b"Connection: close", line=GET) + HIDDEN, closed=True),
    _ok("bytes beyond the length", head(b"Content-Length: 3") + b"hello", closed=True),
    _ok("garbage behind a request", head(LENGTH) + b"hello\x00\xff", closed=True),
    _ok("a GET behind a GET of HTTP/1.0", head(line=b"GET / HTTP/1.0") + HIDDEN, closed=True),
]

GROUPS = {
    "plain": PLAIN,
    "content-length": CONTENT_LENGTH,
    "transfer-encoding": TRANSFER_ENCODING,
    "heads": HEADS,
    "lines": LINES,
    "host": HOST,
    "upgrade": UPGRADE,
    "expect": EXPECT,
    "pipelined": PIPELINED,
}
