"""Incremental JSON for the OVSDB library, by Python's own parser, which is in C.

The library reads JSON character by character in Python unless its C extension was built, which pip does not do: that
took half of the agent's start. What it wants of a parser is to be fed a stream, and to be told where a message ends.
"""

from __future__ import annotations

import json
import re
from typing import Any

import ovs.json

# A string's begin, or a bracket; and what a string goes on with. Nothing is tried twice: the server's first message has
# all schemas, each in one string, and comes in many pieces.
_TOKEN = re.compile(r'[][{}"]')
_REST = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class Parser:
    """Takes a stream piece by piece until one object or array is complete (as ovs.json.Parser).

    Args:
        check_trailer: whether anything but white space after it is an error.
    """

    def __init__(self, check_trailer: bool = False) -> None:
        self._check_trailer = check_trailer
        self._text = ""
        self._scanned = self._depth = self._end = 0
        self._in_string = False
        self._error = ""

    def feed(self, piece: str) -> int:
        """Takes what belongs to the message from the piece; returns how many characters that are."""
        before = len(self._text)
        self._text += piece
        if not self._end and not self._error:
            self._scan()
        if self._check_trailer or not self.is_done():
            return len(piece)
        taken = max(0, self._end - before)
        self._text = self._text[: before + taken]
        return taken

    def _scan(self) -> None:
        text, place = self._text, self._scanned
        while True:
            if self._in_string:
                rest = _REST.match(text, place)
                assert rest is not None
                place = rest.end()
                if not text.startswith('"', place):  # more of it is still to come, or the second half of an escape
                    self._scanned = place
                    return
                place += 1
                self._in_string = False
            token = _TOKEN.search(text, place)
            if token is None:
                break
            place = token.end()
            first = token[0]
            if first == '"':
                self._in_string = True
            elif first in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth < 1:
                    self._end = place
                    return
        self._scanned = len(text)
        if not self._depth and self._text.strip():
            self._error = "neither an object nor an array"

    def is_done(self) -> bool:
        """Whether the message is complete, or nothing can make it so."""
        return bool(self._end or self._error)

    def finish(self) -> Any:
        """The message; a string says what is wrong with it."""
        if self._error:
            return self._error
        if self._end and self._check_trailer and self._text[self._end :].strip():
            return "something follows the end of the JSON text"
        try:
            return json.loads(self._text[: self._end] if self._end else self._text)
        except (ValueError, RecursionError) as exc:
            return f"not JSON: {exc}"


def install() -> None:
    """Has the library use this parser, unless it has one in C."""
    if ovs.json.PARSER != ovs.json.PARSER_C:
        ovs.json.Parser = Parser
