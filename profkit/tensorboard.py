"""The copy of a trace that TensorBoard's profiler plugin understands (torch-tb-profiler, which knows names of 2021)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from profkit.events import Kind, kind_of

PLUGIN_RUNTIME = "Runtime"
"""The only name it knows for calls of a device's runtime: under any other, operators have no device time."""


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    pid: int | float | str | None = None
    tid: int | float | str | None = None


class _Own(msgspec.Struct, gc=False):
    name: str
    ts: float
    dur: float
    args: dict[str, Any]


class _File(msgspec.Struct, gc=False):
    traceEvents: list[msgspec.Raw]  # noqa: N815 - the format's spelling


def plugin_copy(content: bytes) -> bytes:
    """Return the text of a trace with the plugin's names: runtime calls, steps, and modules from profkit's tracks.

    Steps become the `ProfilerStep#n` and scopes of the layers' track the module calls that the plugin's views are made
    of, on the thread with most operators. Other slices, counters and arrows of profkit's are left out.
    """
    raw = msgspec.json.decode(content, type=_File).traceEvents
    events = msgspec.json.Decoder(list[_Event]).decode(b"[" + b",".join(bytes(one) for one in raw) + b"]")
    header = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    header.pop("traceEvents")
    own_process = {event.pid for event in events if event.ph == "X" and kind_of(event.cat) is Kind.PROFKIT}
    own, kept = [], []
    for text, event in zip(raw, events, strict=True):
        if kind_of(event.cat) is Kind.PROFKIT or event.pid in own_process:
            if event.ph == "X":
                own.append(msgspec.json.decode(text, type=_Own))
        elif event.ph == "X" and kind_of(event.cat) is Kind.RUNTIME:
            kept.append(msgspec.json.encode({**msgspec.json.decode(text), "cat": PLUGIN_RUNTIME}))
        else:
            kept.append(bytes(text))
    threads = Counter((event.pid, event.tid) for event in events if kind_of(event.cat) is Kind.OPERATOR)
    process, thread = threads.most_common(1)[0][0] if threads else (0, 0)
    place = {"ph": "X", "pid": process, "tid": thread}
    made = [msgspec.json.encode({**place, **one}) for one in (*_steps(own), *_modules(own))]
    head = msgspec.json.encode(header)
    return head[:-1] + (b"," if header else b"") + b'"traceEvents":[' + b",\n".join([*made, *kept]) + b"]}"


def _steps(own: Sequence[_Own]) -> Iterator[dict[str, Any]]:
    """Yield profkit's steps, told from stages and scopes by what their arguments hold."""
    for one in own:
        if "step" in one.args and not {"module", "meaning"} & set(one.args):
            yield {
                "cat": "user_annotation",
                "name": f"ProfilerStep#{one.args['step']}",
                "ts": one.ts,
                "dur": one.dur,
                "args": {},
            }


def _modules(own: Sequence[_Own]) -> Iterator[dict[str, Any]]:
    """Yield calls of modules, each with its own number, that of the call around it, and that of its module."""
    calls = sorted((one for one in own if "module" in one.args), key=lambda one: (one.ts, -one.dur))
    numbers: dict[str, int] = {}
    around: list[tuple[int, float]] = []
    for number, one in enumerate(calls, start=1):
        while around and around[-1][1] <= one.ts:
            around.pop()
        path = one.args["module"]
        ids = {"Python id": number, "Python parent id": around[-1][0] if around else None}
        args = {**ids, "Python module id": numbers.setdefault(path, len(numbers))}
        yield {"cat": "python_function", "name": f"nn.Module: {path}", "ts": one.ts, "dur": one.dur, "args": args}
        around.append((number, one.ts + one.dur))
