"""JSON as RapidJSON reads it, because that is how TensorFlow Serving reads it.

RapidJSON skips a byte order mark, takes `NaN`, `Inf` and `Infinity` with or without a sign, and ignores whatever
follows the document; a number that no double holds is an error. Python's parser, in C, reads what both agree on.
What it refuses, or might read differently, goes through `_Reader`, a transcription of RapidJSON's reader.h that
also finds its error messages and byte offsets.
"""

import json
import math
import re
from typing import Any, NoReturn

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WHITESPACE = re.compile(rb"[ \t\r\n]*")
NUMBER = re.compile(rb"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
HEX4 = re.compile(rb"[0-9a-fA-F]{4}")
UNESCAPED = re.compile(rb'[^"\\\x00-\x1f]*')
ESCAPES = {b'"': b'"', b"\\": b"\\", b"/": b"/", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}
LITERALS = {b"n": (b"null", None), b"t": (b"true", True), b"f": (b"false", False)}
# What Python takes and RapidJSON refuses: doubles that overflow, and unpaired surrogates. Each pattern begins with
# a literal, which `re` finds at the speed of memchr.
SUSPECT = tuple(map(re.compile, (rb"e\+?[0-9]{3}", rb"E\+?[0-9]{3}", rb"\\u[dD][89a-fA-F]")))


class ParseError(ValueError):
    """The document is malformed. The message is RapidJSON's, `offset` counts bytes."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


def parse(body: bytes) -> Any:
    """The value at the start of `body`.

    Invalid UTF-8 within strings is kept as surrogate escapes.

    Raises:
        ParseError: there is none.
        RecursionError: it is nested too deeply.
    """
    if not any(pattern.search(body) for pattern in SUSPECT):
        text = body.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "surrogateescape").lstrip(" \t\r\n")
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            pass  # _Reader finds RapidJSON's words for it, or finds that RapidJSON accepts it
    return _Reader(body).document()


class _Reader:
    """One pass over a document; `_at` is the offset of the next byte."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = len(BYTE_ORDER_MARK) if body.startswith(BYTE_ORDER_MARK) else 0

    def document(self) -> Any:
        self._skip_whitespace()
        if self._peek() in (b"", b"\0"):
            self._fail("The document is empty.")
        return self._value()

    def _fail(self, message: str, offset: int | None = None) -> NoReturn:
        raise ParseError(message, self._at if offset is None else offset)

    def _peek(self) -> bytes:
        return self._body[self._at : self._at + 1]

    def _take(self, wanted: bytes) -> bool:
        found = self._peek() == wanted
        self._at += found
        return found

    def _take_all(self, letters: bytes) -> bool:
        return all(self._take(letters[at : at + 1]) for at in range(len(letters)))

    def _skip_whitespace(self) -> None:
        if match := WHITESPACE.match(self._body, self._at):
            self._at = match.end()

    def _value(self) -> Any:
        first = self._peek()
        if first == b"{":
            return self._object()
        if first == b"[":
            return self._array()
        if first == b'"':
            return self._string()
        if first in LITERALS:
            letters, value = LITERALS[first]
            return value if self._take_all(letters) else self._fail("Invalid value.")
        return self._number()

    def _object(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._at += 1
        self._skip_whitespace()
        if self._take(b"}"):
            return found
        while True:
            if self._peek() != b'"':
                self._fail("Missing a name for object member.")
            name = self._string()
            self._skip_whitespace()
            if not self._take(b":"):
                self._fail("Missing a colon after a name of object member.")
            self._skip_whitespace()
            found[name] = self._value()
            self._skip_whitespace()
            if self._take(b"}"):
                return found
            if not self._take(b","):
                self._fail("Missing a comma or '}' after an object member.")
            self._skip_whitespace()

    def _array(self) -> list[Any]:
        found: list[Any] = []
        self._at += 1
        self._skip_whitespace()
        if self._take(b"]"):
            return found
        while True:
            found.append(self._value())
            self._skip_whitespace()
            if self._take(b"]"):
                return found
            if not self._take(b","):
                self._fail("Missing a comma or ']' after an array element.")
            self._skip_whitespace()

    def _string(self) -> str:
        found = bytearray()
        self._at += 1
        while True:
            if match := UNESCAPED.match(self._body, self._at):
                found += match.group()
                self._at = match.end()
            if self._take(b'"'):
                return found.decode("utf-8", "surrogateescape")
            if self._peek() == b"\\":
                found += self._escape()
            elif self._peek() in (b"", b"\0"):
                self._fail("Missing a closing quotation mark in string.")
            else:
                self._fail("Invalid encoding in string.")

    def _escape(self) -> bytes:
        start = self._at
        self._at += 1
        if (plain := ESCAPES.get(self._peek())) is not None:
            self._at += 1
            return plain
        if not self._take(b"u"):
            self._fail("Invalid escape character in string.", start)
        code = self._hex4(start)
        if 0xD800 <= code < 0xE000:
            second = self._hex4(start) if code < 0xDC00 and self._take_all(b"\\u") else 0
            if not 0xDC00 <= second < 0xE000:
                self._fail("The surrogate pair in string is invalid.", start)
            code = 0x10000 + ((code - 0xD800) << 10 | (second - 0xDC00))
        return chr(code).encode()

    def _hex4(self, escape: int) -> int:
        if (match := HEX4.match(self._body, self._at)) is None:
            self._fail("Incorrect hex digit after \\u escape in string.", escape)
        self._at = match.end()
        return int(match.group(), 16)

    def _number(self) -> float:
        start = self._at
        if (match := NUMBER.match(self._body, start)) is None:
            return self._not_finite()
        self._at = match.end()
        _, fraction, exponent = match.groups()
        if fraction is None and exponent is None and self._take(b"."):
            self._fail("Miss fraction part in number.")
        if exponent is None and (self._take(b"e") or self._take(b"E")):
            _ = self._take(b"+") or self._take(b"-")
            self._fail("Miss exponent in number.")
        double = float(match.group())
        if math.isinf(double):
            self._fail("Number too big to be stored in double.", start)
        if fraction is None and exponent is None and -(1 << 63) <= double <= 1 << 64:
            whole = int(match.group())
            if -(1 << 63) <= whole < 1 << 64:
                return whole
        return double

    def _not_finite(self) -> float:
        sign = -1.0 if self._take(b"-") else 1.0
        if self._take(b"N") and self._take_all(b"aN"):
            return math.nan
        if self._take(b"I") and self._take_all(b"nf") and (self._peek() != b"i" or self._take_all(b"inity")):
            return sign * math.inf
        return self._fail("Invalid value.")
