"""The list of events in a trace file, decoded piece by piece, and as far as a damaged file allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgspec

from profkit.events import NOTHING

BLOCK_BYTES = 1 << 22
"""How much text is decoded at once: what is alive at a time stays in the processor's caches."""
EXACT_US = 2.0**43
"""Up to here a float holds µs to the nanosecond; traces of 2024 hold ns behind the µs since 1970, far beyond."""

BETWEEN_EVENTS = re.compile(rb"\}\s*,\s*(?=\{)")
FIELDS = (b"ph", b"name", b"cat", b"ts", b"dur", b"pid", b"tid", b"id", b"args", b"bp", b"s")
"""What an event may begin with; objects among its arguments seldom do."""
FIRST_KEY = re.compile(rb'\s*\{\s*("[^"]*")')
NOT_JSON = re.compile(rb":\s*-?(?:nan|NaN|inf|Infinity)\b")
END = re.compile(rb"\}\s*\]\s*\}?\s*\Z")
CONTROL = bytes.maketrans(bytes(range(32)), b" " * 32)
SEARCHED_BYTES = 1 << 14
"""How far back from its end a block is searched for places between two events."""
NESTING_TRIED = 8
SAMPLE, MANY = 31, 10_000


class Args(msgspec.Struct, gc=False):
    """What is read of an event's arguments; the last four are those of profkit's own slices."""

    correlation: int | float | str | None = NOTHING
    stream: int | float | str | None = None
    device: int | float | str | None = None
    kernel: Any = None
    step: Any = None
    phase: Any = None
    tokens: Any = None
    module: Any = None


class Event(msgspec.Struct, gc=False):
    """What is read of an event; times in µs, as the format has them."""

    ph: str = ""
    name: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    pid: int | float | str | None = None
    tid: int | float | str | None = None
    args: Args | None = None


class ExactEvent(Event, gc=False):
    """The same where floats would lose nanoseconds."""

    ts: Decimal = Decimal(0)  # type: ignore[assignment]
    dur: Decimal = Decimal(0)  # type: ignore[assignment]


@dataclass
class Damage:
    """What of a file could not be read as it stands."""

    lost: int = 0
    """Events that could not be decoded."""
    mended: int = 0
    """Pieces of text that were decoded after bytes that JSON forbids had been replaced."""
    cut_short: bool = False
    """The file ends before its list of events does."""
    reason: str = ""
    """What the decoder, or gzip, said first."""

    def __bool__(self) -> bool:
        return bool(self.lost or self.mended or self.cut_short)


class EventTexts:
    """Decodes the content of the list of events, piece by piece.

    A piece may only end between two events. Whether a place is one is not guessed: cut anywhere else, inside a
    string or an argument, the text does not decode.
    """

    def __init__(self, damage: Damage) -> None:
        self.rest = b""
        self.tail = b""
        self._damage = damage
        self._ended = False
        self._said = ""
        self._between = BETWEEN_EVENTS
        self._decode: Callable[[bytes], list[Event]] = msgspec.json.Decoder(list[Event]).decode

    def decoded(self, block: bytes) -> list[Event]:
        """Decode what is whole of `rest` and the block behind it; `rest` then holds what is not yet."""
        # Blocks are large: they are joined to what precedes them once, as they are decoded.
        before, text = (self.rest, block) if len(block) > SEARCHED_BYTES else (b"", self.rest + block)
        self._learn(before or text)
        if self._ended:
            self.tail, self.rest = self.tail + before + text, b""
            return []
        view, start = memoryview(text), max(0, len(text) - SEARCHED_BYTES)
        for cut in reversed([match.span() for match in BETWEEN_EVENTS.finditer(text, start)][-4:]):
            found = self._try(before, view[: cut[0] + 1])
            if found is not None:
                self.rest = text[cut[1] :]
                return found
        text = before + text
        if len(text) < 4 * BLOCK_BYTES:
            self.rest = text
            return []
        return self._carefully(text)

    def _learn(self, text: bytes) -> None:
        """See how this file's events begin: with the first one's field, or with one that any event may begin with."""
        if self._between is BETWEEN_EVENTS and (key := FIRST_KEY.match(text)):
            keys = b"|".join({re.escape(key[1]), *(b'"' + field + b'"' for field in FIELDS)})
            self._between = re.compile(rb"\}\s*,\s*(?=\{\s*(?:" + keys + rb"))")

    def last(self) -> list[Event]:
        """Decode all of `rest`, as the file ends here."""
        text, self.rest = self.rest, b""
        if self._ended:
            self.tail += text
            return []
        self._learn(text)
        found = self._up_to_end(text, reversed([match.start() for match in re.finditer(rb"\]", text[-65536:])][-4:]))
        if found is None:
            found = self._carefully(text) if text.strip(b" \r\n\t,") else []
            found += self._damaged([self.rest]) if self.rest else []
            self.rest = b""
        self._damage.cut_short |= not (self._ended or END.search(text))
        return found

    def _up_to_end(self, text: bytes, places: Iterable[int]) -> list[Event] | None:
        """Decode up to the first of some brackets that closes the list, if one of them does."""
        offset = max(0, len(text) - 65536)
        for place in places:
            found = self._try(text[: offset + place].rstrip(b" \r\n\t,"))
            if found is not None:
                self._ended, self.tail = True, text[offset + place + 1 :]
                return found
        return None

    def _try(self, *text: bytes | memoryview) -> list[Event] | None:
        """Decode a piece, given in parts; None if it is not a list of whole events."""
        whole = b"".join((b"[", *text, b"]"))
        try:
            found = self._decode(whole)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._said = str(error)
            return None
        return self._exactly(whole, found)

    def _exactly(self, text: bytes, found: list[Event]) -> list[Event]:
        """Decode once more in decimals if floats cannot tell this file's nanoseconds."""
        if self._decode.__self__.type is list[ExactEvent] or not found:  # type: ignore[attr-defined]
            return found
        # Three in four times with nanoseconds show a fraction even as floats: of many, a sample tells.
        some = found[:: SAMPLE if len(found) > MANY else 1]
        if not any(event.ts >= EXACT_US and (event.ts % 1 or event.dur % 1) for event in some):
            return found
        self._decode = msgspec.json.Decoder(list[ExactEvent]).decode  # type: ignore[assignment]
        return self._decode(text)

    def _carefully(self, text: bytes) -> list[Event]:
        """Decode a text in which something is wrong, or in which the list ends."""
        pieces = self._between.sub(b"}\0", text.replace(b"\0", b" ")).split(b"\0")
        self.rest = b""
        # The last piece may be half an event, whose other half is yet to come.
        whole, self.rest = pieces[:-1], pieces[-1]
        found = self._damaged(whole)
        if self._ended:
            self.tail, self.rest = self.tail + b"," + self.rest, b""
        return found

    def _damaged(self, pieces: list[bytes]) -> list[Event]:
        """Decode the pieces that can be, by halves."""
        if self._ended or not pieces:
            self.tail += b"".join(b"," + piece for piece in pieces)
            return []
        found = self._try_mending(b",".join(pieces))
        if found is not None:
            return found
        if len(pieces) <= NESTING_TRIED:
            return self._few(pieces)
        half = len(pieces) // 2
        return self._damaged(pieces[:half]) + self._damaged(pieces[half:])

    def _try_mending(self, text: bytes) -> list[Event] | None:
        """Decode a text, if need be after replacing what JSON forbids but traces hold.

        That is control characters, broken UTF-8, and numbers that are none. Parts of broken events may decode as
        objects of their own; they are no events.
        """
        found = self._try(text)
        if found is not None:
            return [event for event in found if event.ph]
        better = NOT_JSON.sub(b":null", text.decode("utf-8", "replace").encode().translate(CONTROL))
        said = self._said
        found = self._try(better) if better != text else None
        if found is None:
            return None
        self._damage.mended += 1
        self._damage.reason = self._damage.reason or said
        return [event for event in found if event.ph]

    def _few(self, pieces: list[bytes]) -> list[Event]:
        """Decode a few pieces one by one, or together where they are parts of one event."""
        result: list[Event] = []
        while pieces and not self._ended:
            for size in range(1, len(pieces) + 1):
                text = b",".join(pieces[:size])
                attempts = (attempt(text) for attempt in (self._try_mending, self._at_end))
                found = next((one for one in attempts if one is not None), None)
                if found is not None:
                    break
            else:
                found, size = self._before_break(pieces[0]), 1
                self._damage.lost += 1
                self._damage.reason = self._damage.reason or self._said
            result += found or []
            pieces = pieces[size:]
        if pieces:
            self.tail += b"," + b",".join(pieces)
        return result

    def _before_break(self, text: bytes) -> list[Event]:
        """Decode the event in front of another that breaks off at once."""
        cut = max((match.start() for match in BETWEEN_EVENTS.finditer(text)), default=0)
        return (self._try_mending(text[: cut + 1]) or []) if cut else []

    def _at_end(self, text: bytes) -> list[Event] | None:
        """Decode an event behind which the list ends."""
        for match in re.finditer(rb"\]", text):
            found = self._try_mending(text[: match.start()])
            if found:
                self._ended, self.tail = True, text[match.end() :]
                return found
        return None
