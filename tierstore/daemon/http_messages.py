"""Requests and answers of HTTP/1, as far as the daemon's small server needs them.

Input: the bytes of a request's head. Output: method, path and header Accept; the bytes of an answer. Errors: an answer
that says what is wrong with the request.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import NamedTuple

HEAD_BYTES_MAX = 8192  # of a request
TLS_HELLO = b"\x16\x03"  # how a client that speaks TLS begins


class HttpRequest(NamedTuple):
    """A request: its path without the query, and its header Accept, empty if it is missing."""

    path: str
    accept: str


class Answer(NamedTuple):
    """What a handler gives back: a status, a body of a type, and headers of its own."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


def text_answer(status: HTTPStatus, text: str) -> Answer:
    """Returns an answer of one line."""
    return Answer(status, f"{text}\n".encode("utf-8", "backslashreplace"))


def parse_head(head: bytes) -> tuple[str, HttpRequest] | Answer:
    """Returns the method and the request that a head is; the answer that says why, if it is not one that is served."""
    if head.startswith(TLS_HELLO):
        return text_answer(HTTPStatus.BAD_REQUEST, "this is plain HTTP, and you speak TLS: use http://")
    if b"\r\n\r\n" not in head:
        text = f"a head has {HEAD_BYTES_MAX} bytes at most"
        return text_answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)
    first, *lines = head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    words = first.split(" ")
    if first == "PRI * HTTP/2.0":
        text = "this is HTTP/1, and you speak HTTP/2: lookups by gRPC have an address of their own (--listen)"
        return text_answer(HTTPStatus.BAD_REQUEST, text)
    if len(words) != 3 or not words[1].startswith("/") or not words[2].startswith("HTTP/1."):
        return text_answer(HTTPStatus.BAD_REQUEST, "that is not a request of HTTP/1")
    method, target, _ = words
    if method not in ("GET", "HEAD"):
        return text_answer(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only")
    return method, HttpRequest(target.partition("?")[0], _header(lines, "accept"))


def _header(lines: list[str], name: str) -> str:
    """Returns a header's value; of one that is given several times, all values as a list."""
    values = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.lower() == name]
    return ", ".join(values)


def answer_bytes(answer: Answer, *, with_body: bool = True) -> bytes:
    """Returns an answer as it goes over the connection; without its body for HEAD."""
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in answer.headers),
    ]
    if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    head = "".join(f"{line}\r\n" for line in lines) + "\r\n"
    return head.encode("latin-1") + (answer.body if with_body else b"")
