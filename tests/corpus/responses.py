"""What an upstream may send in answer to one request, and what must become of it.

Own cases, and after the kinds that the public tests of two parsers know: llhttp's `test/response/*.md` (nodejs/llhttp)
and h11's `h11/tests` (python-hyper/h11). Where our expectation differs from theirs, a comment says why.

`raw` is sent as it stands, and the connection is closed afterwards where `closes`. `expected` is the status and body
that are relayed, or the code of the failure.
"""

from __future__ import annotations

from dataclasses import dataclass

BAD = "upstream_protocol_error"
CUT = "upstream_disconnected"

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
STRAY = OK + b"Content-Length: 6\r\n\r\nSECRET"  # an answer to nobody's question


@dataclass(frozen=True, slots=True)
class Case:
    raw: bytes
    expected: tuple[int, bytes] | str
    closes: bool = False
    method: str = "POST"


def length(body: bytes, *fields: bytes, start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((start, *fields, b"Content-Length: %d" % len(body), b"", body))


# — what is relayed

RELAYED = {
    # llhttp: sample.md
    "no field but the length": Case(length(b""), (200, b"")),
    "white space around values": Case(length(b"a", b"X:\t y \t"), (200, b"a")),
    "a body that has the length it says": Case(OK + b"Content-Length:  5  \r\n\r\nhello", (200, b"hello")),
    "a status without a reason": Case(length(b"a", start=b"HTTP/1.1 301"), (301, b"a")),
    "an empty reason": Case(length(b"a", start=b"HTTP/1.1 200 "), (200, b"a")),
    "a reason of other bytes": Case(length(b"a", start=b"HTTP/1.1 200 \xd0\x94\xd0\xb0"), (200, b"a")),
    "a reason that is a number": Case(length(b"a", start=b"HTTP/1.1 200 404"), (200, b"a")),
    "odd characters in names": Case(length(b"a", b"X-$Odd: 1", b"X_y.z: 2"), (200, b"a")),
    "an empty value does not take the next field": Case(length(b"a", b"Pragma:", b"X: y"), (200, b"a")),
    "1.0 that keeps the connection": Case(
        length(b"a", b"Connection: keep-alive", start=b"HTTP/1.0 200 OK"), (200, b"a")
    ),
    "nothing at all until the close": Case(b"HTTP/1.1 404 Not Found\r\n\r\n", (404, b""), closes=True),
    # llhttp: connection.md
    "Proxy-Connection means nothing": Case(length(b"hello", b"Proxy-Connection: close"), (200, b"hello")),
    "a body that looks like an answer, until the close": Case(OK + b"\r\n" + STRAY, (200, STRAY), closes=True),
    "1.0 with keep-alive and no length ends with the close": Case(
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\nHTTP/1.0 200 OK", (200, b"HTTP/1.0 200 OK"), closes=True
    ),
    "204 with an answer behind it": Case(b"HTTP/1.1 204 No Content\r\n\r\n" + STRAY, (204, b"")),
    "204 that closes, with an answer behind it": Case(
        b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n" + STRAY, (204, b"")
    ),
    "204 of 1.0 that keeps, with an answer behind it": Case(
        b"HTTP/1.0 204 No Content\r\nConnection: keep-alive\r\n\r\n" + STRAY, (204, b"")
    ),
    "a length that closes, with bytes behind it": Case(
        OK + b"Content-Length: 5\r\nConnection: close\r\n\r\nhelloSECRET", (200, b"hello")
    ),
    "200 with Upgrade, until the close": Case(
        OK + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\nbody", (200, b"body"), closes=True
    ),
    "200 with Upgrade and a length": Case(length(b"body", b"Connection: upgrade", b"Upgrade: h2c"), (200, b"body")),
    "200 with Upgrade and chunks": Case(
        OK
        + b"Connection: upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n",
        (200, b"body"),
    ),
    # llhttp: content-length.md
    "Content-Length-X is another field": Case(
        OK + b"Content-Length-X: 0\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n", (200, b"OK")
    ),
    "tabs around a length": Case(OK + b"Content-Length:\t2\t\r\n\r\nab", (200, b"ab")),
    "HEAD with a length, and an answer behind it": Case(
        OK + b"Content-Length: 123\r\n\r\n" + STRAY, (200, b""), method="HEAD"
    ),
    # llhttp: transfer-encoding.md
    "chunk extensions": Case(CHUNKED + b"5;a;b=c\r\nhello\r\n6;d;e\r\n world\r\n0\r\n\r\n", (200, b"hello world")),
    "quoted chunk extensions": Case(CHUNKED + b'5;a="x; y";b="z";c\r\nhello\r\n0\r\n\r\n', (200, b"hello")),
    "a quoted pair in a chunk extension": Case(CHUNKED + b'1;a="x\\"y"\r\na\r\n0\r\n\r\n', (200, b"a")),
    # h11: test_io.py, test_connection.py
    "chunk sizes in both cases, with zeros before them": Case(
        CHUNKED + b"0000A\r\n0123456789\r\n0b\r\n0123456789a\r\n00\r\n\r\n", (200, b"01234567890123456789a")
    ),
    "trailers": Case(CHUNKED + b"1\r\na\r\n0\r\nX: y\r\nSome: Header\r\n\r\n", (200, b"a")),
    "a length in the trailers": Case(CHUNKED + b"1\r\na\r\n0\r\nX-Length: 9\r\n\r\n", (200, b"a")),
    "Chunked, by another case": Case(OK + b"Transfer-Encoding: CHUNKED\r\n\r\n1\r\na\r\n0\r\n\r\n", (200, b"a")),
    "an answer behind the last chunk": Case(CHUNKED + b"1\r\na\r\n0\r\n\r\n" + STRAY, (200, b"a")),
    "304 with a length": Case(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", (304, b"")),
    "HEAD with chunks": Case(CHUNKED, (200, b""), method="HEAD"),
    "several informational answers": Case(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + length(b"a"), (200, b"a")
    ),
    # own
    "an informational answer with a length, that is none": Case(
        b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\n" + length(b"a"), (200, b"a")
    ),
    "an answer behind an answer": Case(length(b"a") + STRAY, (200, b"a")),
    "line ends behind an answer": Case(length(b"a") + b"\r\n\r\n", (200, b"a")),
    "garbage behind an answer": Case(length(b"a") + b"\0\xffSECRET", (200, b"a")),
    "half of an answer behind an answer": Case(length(b"a") + b"HTTP/1.1 200 OK\r\nX-SECRET: ", (200, b"a")),
    "an informational answer behind an answer": Case(length(b"a") + b"HTTP/1.1 100 Continue\r\n\r\n", (200, b"a")),
    "a body with every byte": Case(length(bytes(range(256))), (200, bytes(range(256)))),
    "an error with its body": Case(length(b"{}", start=b"HTTP/1.1 503 Down"), (503, b"{}")),
    "200 fields": Case(length(b"a", *[b"X: y"] * 199), (200, b"a")),
}

# — what is no answer

REFUSED = {
    # llhttp: invalid.md
    "another protocol's name": Case(b"HTP/1.1 200 OK\r\n\r\n", BAD),
    "a longer name": Case(b"HTTPER/1.1 200 OK\r\n\r\n", BAD),
    "two digits of the major version": Case(b"HTTP/01.1 200 OK\r\n\r\n", BAD),
    "version eleven": Case(b"HTTP/11.1 200 OK\r\n\r\n", BAD),
    "two digits of the minor version": Case(b"HTTP/1.01 200 OK\r\n\r\n", BAD),
    "a version that there is not": Case(b"HTTP/5.6 200 OK\r\n\r\n", BAD),
    "a tab behind the version": Case(b"HTTP/1.1\t200 OK\r\n\r\n", BAD),
    "two spaces before the status": Case(b"HTTP/1.1  200 OK\r\n\r\n", BAD),
    "a status of one digit": Case(b"HTTP/1.1 2 OK\r\n\r\n", BAD),
    "a status of four digits": Case(b"HTTP/1.1 2000 OK\r\n\r\n", BAD),
    "a space before the first name": Case(OK + b" Host: a\r\n\r\n", BAD),
    "fields parted by CR": Case(OK + b"X: 1\rY: 2\r\nContent-Length: 0\r\n\r\n", BAD),
    "lines ended by LF": Case(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", BAD),
    # llhttp: sample.md. It knows these protocols; nobody here speaks them
    "RTSP": Case(length(b"a", start=b"RTSP/1.1 200 OK"), BAD),
    "ICE": Case(length(b"a", start=b"ICE/1.1 200 OK"), BAD),
    # llhttp: connection.md. It hands the connection over; nobody here asked for that
    "101 with a length": Case(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n\r\nbodyXX",
        BAD,
    ),
    "101 with chunks": Case(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n0\r\n\r\nSECRET",
        BAD,
    ),
    # llhttp: transfer-encoding.md
    "an empty coding beside a length": Case(OK + b"Transfer-Encoding:\r\nContent-Length: 5\r\n\r\nhello", BAD),
    "spaces behind a chunk size": Case(CHUNKED + b"5  \r\nhello\r\n0\r\n\r\n", BAD),
    "words behind a chunk size": Case(CHUNKED + b"2 abc\r\naa\r\n0\r\n\r\n", BAD),
    "a semicolon and no extension": Case(CHUNKED + b"2;\r\naa\r\n0\r\n\r\n", BAD),
    "a quote that is not closed": Case(CHUNKED + b'5;a="b\r\nhello\r\n0\r\n\r\n', BAD),
    # It reads the next three until the close, which is right for a coding that one knows
    "chunked before another coding": Case(OK + b"Transfer-Encoding: chunked, deflate\r\n\r\nWorld", BAD, closes=True),
    "chunked before another coding's field": Case(
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\nWorld", BAD, closes=True
    ),
    "chunkedchunked": Case(OK + b"Transfer-Encoding: chunkedchunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n", BAD, closes=True),
    "chunked twice": Case(OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n", BAD),
    "chunked in two fields": Case(
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n", BAD
    ),
    "a folded coding": Case(OK + b"Transfer-Encoding: chunked\r\n  abc\r\n\r\n5\r\nWorld\r\n0\r\n\r\n", BAD),
    # h11: test_io.py, test_headers.py
    "garbage": Case(b"\x00SECRET", BAD),
    "a TLS record": Case(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", BAD),
    "an HTTP/2 preface": Case(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD),
    "HTTP/0.9": Case(b"<html>SECRET</html>", BAD, closes=True),
    "NUL in a value": Case(length(b"a", b"X: a\0b"), BAD),
    "NUL in a name": Case(length(b"a", b"X\0: a"), BAD),
    "a space before the colon": Case(length(b"a", b"X : a"), BAD),
    "a field without a name": Case(length(b"a", b": a"), BAD),
    "a field without a colon": Case(length(b"a", b"X"), BAD),
    "a folded value": Case(length(b"a", b"X: a", b" b"), BAD),
    "two lengths that differ": Case(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", BAD),
    # h11 takes these two for one length; who sends them does not know what he sends
    "two lengths that agree": Case(OK + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na", BAD),
    "a list of one length": Case(OK + b"Content-Length: 1, 1\r\n\r\na", BAD),
    "a length below zero": Case(OK + b"Content-Length: -1\r\n\r\na", BAD),
    "a length with a sign": Case(OK + b"Content-Length: +1\r\n\r\na", BAD),
    "a length in hex": Case(OK + b"Content-Length: 0x1\r\n\r\na", BAD),
    "a length with an underscore": Case(OK + b"Content-Length: 1_0\r\n\r\n0123456789", BAD),
    "a length of a fraction": Case(OK + b"Content-Length: 1.0\r\n\r\na", BAD),
    "no length after its name": Case(OK + b"Content-Length:\r\n\r\na", BAD),
    "a length beyond 64 bits": Case(OK + b"Content-Length: 18446744073709551617\r\n\r\na", BAD),
    "a length and chunks": Case(OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", BAD),
    "chunks and a length": Case(OK + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n", BAD),
    "a chunk size of words": Case(CHUNKED + b"hello\r\n", BAD),
    "a chunk size below zero": Case(CHUNKED + b"-1\r\n", BAD),
    "a chunk size in 0x": Case(CHUNKED + b"0x1\r\na\r\n0\r\n\r\n", BAD),
    "a chunk size with an underscore": Case(CHUNKED + b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n", BAD),
    "a chunk size beyond 64 bits": Case(CHUNKED + b"10000000000000001\r\na\r\n0\r\n\r\n", BAD),
    "a chunk that is longer than its size": Case(CHUNKED + b"1\r\naXX0\r\n\r\n", BAD),
    "a chunk ended by LF": Case(CHUNKED + b"1\na\n0\n\n", BAD),
    "NUL in a chunk extension": Case(CHUNKED + b"1;a\0b\r\na\r\n0\r\n\r\n", BAD),
    "CR in a chunk extension": Case(CHUNKED + b"1;a\rb\r\na\r\n0\r\n\r\n", BAD),
    "LF in a chunk extension": Case(CHUNKED + b"1;a\nb\r\na\r\n0\r\n\r\n", BAD),
    # own
    "an empty line before the answer": Case(b"\r\n" + length(b"a"), BAD),
    "an answer for a value": Case(OK + b"X: a\r\n\r" + STRAY, BAD),
    "CR at the end of a value": Case(OK + b"X: a\r\r\nContent-Length: 0\r\n\r\n", BAD),
    "chunks in 1.0": Case(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", BAD),
    "an identity coding": Case(OK + b"Transfer-Encoding: identity\r\n\r\na", BAD, closes=True),
    "a coding in quotes": Case(OK + b'Transfer-Encoding: "chunked"\r\n\r\n1\r\na\r\n0\r\n\r\n', BAD, closes=True),
    "a vertical tab before chunked": Case(OK + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", BAD, closes=True),
    "a status of no class": Case(length(b"a", start=b"HTTP/1.1 099 X"), BAD),
    "a status beyond 599": Case(length(b"a", start=b"HTTP/1.1 600 X"), BAD),
    "201 fields": Case(length(b"a", *[b"X: y"] * 200), BAD),
    "a head beyond 64 KiB": Case(length(b"a", *[b"X: " + b"y" * 660] * 100), BAD),
    "a head beyond 64 KiB, behind an informational one": Case(
        b"HTTP/1.1 102 Processing\r\n\r\n" + length(b"a", *[b"X: " + b"y" * 660] * 100), BAD
    ),
}

# — what ends too early

ENDED = {
    "nothing": Case(b"", CUT, closes=True),
    "one byte": Case(b"H", CUT, closes=True),
    "half of a status line": Case(b"HTTP/1.1 20", CUT, closes=True),
    "half of a field": Case(OK + b"Content-Le", CUT, closes=True),
    "a head without its end": Case(OK + b"Content-Length: 0\r\n", CUT, closes=True),
    "an informational answer alone": Case(b"HTTP/1.1 100 Continue\r\n\r\n", CUT, closes=True),
    "a length, and no body": Case(OK + b"Content-Length: 3\r\n\r\n", CUT, closes=True),
    "a length, and less": Case(OK + b"Content-Length: 3\r\n\r\nab", CUT, closes=True),
    "no chunk": Case(CHUNKED, CUT, closes=True),
    "half of a chunk size": Case(CHUNKED + b"1", CUT, closes=True),
    "half of a chunk": Case(CHUNKED + b"3\r\nab", CUT, closes=True),
    "a chunk without its line end": Case(CHUNKED + b"1\r\na", CUT, closes=True),
    "no last chunk": Case(CHUNKED + b"1\r\na\r\n", CUT, closes=True),
    "half of the last chunk": Case(CHUNKED + b"1\r\na\r\n0\r\n", CUT, closes=True),
    "trailers without their end": Case(CHUNKED + b"1\r\na\r\n0\r\nX: y\r\n", CUT, closes=True),
}

CASES = {**RELAYED, **REFUSED, **ENDED}
