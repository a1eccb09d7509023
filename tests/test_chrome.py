"""Reading Chrome traces: every dialect, exact times, damaged files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from handmade import HandMade
from hypothesis import given, settings
from hypothesis import strategies as st

from profkit import chrome, pieces
from profkit.errors import InputError
from profkit.events import Kind


def three() -> HandMade:
    made = HandMade()
    made.host("aten::mm", 0, 10)
    made.kernel(made.launch(2), 5, 4)
    return made


def names(trace: chrome.Trace) -> list[str]:
    return [trace.events.names[name] for name in trace.events.name]


def test_columns_hold_what_the_file_says():
    trace = chrome.parse(three().text(distributedInfo={"rank": 3}))
    events = trace.events
    assert names(trace) == ["aten::mm", "cudaLaunchKernel", "gemm"]
    assert events.kind.tolist() == [Kind.OPERATOR, Kind.RUNTIME, Kind.KERNEL]
    assert (events.start_ns.tolist(), events.duration_ns.tolist()) == ([0, 2000, 5000], [10000, 2000, 4000])
    assert events.correlation.tolist() == [-1, 1, 1]
    assert [trace.processes[one] for one in events.process] == [4000, 4000, 0]
    assert [trace.threads[one] for one in events.thread] == [1, 1, 7]
    assert (events.devices, events.device.tolist()) == (["0"], [-1, -1, 0])
    assert trace.threads[events.stream[2]] == 7
    assert trace.header == {"schemaVersion": 1, "distributedInfo": {"rank": 3}, "traceName": "x"}
    assert not trace.damage


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("compress", [False, True])
def test_any_layout_plain_or_gzip(tmp_path: Path, indent: int | None, compress: bool):
    text = json.dumps(json.loads(three().text()), indent=indent, separators=(" ,", " : ")).encode()
    path = tmp_path / "trace.json"
    path.write_bytes(gzip.compress(text) if compress else text)
    assert names(chrome.read(path)) == ["aten::mm", "cudaLaunchKernel", "gemm"]


def test_a_bare_list_and_one_that_was_never_closed():
    text = json.dumps(three().events).encode()
    assert names(chrome.parse(text)) == ["aten::mm", "cudaLaunchKernel", "gemm"]
    trace = chrome.parse(text[:-1])
    assert names(trace) == ["aten::mm", "cudaLaunchKernel", "gemm"]
    assert trace.damage.cut_short and not trace.damage.lost


def test_gzip_in_several_members(tmp_path: Path):
    text, path = three().text(), tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(text[:100]) + gzip.compress(text[100:]))
    assert len(chrome.read(path).events) == 3


def test_the_schema_of_2021():
    events = [
        {"ph": "X", "cat": "Operator", "name": "aten::mm", "pid": 7, "tid": "7 (python)", "ts": 1, "dur": 5, "args":
        {}}, {"ph": "X", "cat": "Runtime", "name": "cudaLaunchKernel", "pid": 7, "tid": "7 (python)", "ts": 2, "dur": 1,
         "args": {"correlation": 9, "external id": 4}},
        {"ph": "X", "cat": "Kernel", "name": "gemm", "pid": 0, "tid": "stream 7", "ts": 4, "dur": 0,
         "args": {"device": 0, "stream": 7, "correlation": 9, "external id": 4}},
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Traces", "tid": "Trace", "ts": 0, "dur": 9},
    ]  # fmt: skip
    found = chrome.parse(json.dumps({"traceEvents": events}).encode()).events
    assert found.kind.tolist() == [Kind.OPERATOR, Kind.RUNTIME, Kind.KERNEL, Kind.OTHER]
    assert found.correlation.tolist() == [-1, 9, 9, -1]


def test_correlations_written_as_text_or_not_at_all():
    made = three()
    made.events[1]["args"]["correlation"] = "12"
    made.events[2]["args"]["correlation"] = None
    assert chrome.parse(made.text()).events.correlation.tolist() == [-1, 12, -1]


def test_what_is_no_complete_event_is_counted():
    made = three()
    made.events += [
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 1, "tid": 1, "ts": 2},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 1, "tid": 1, "ts": 5},
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
        {"ph": "B", "cat": "x", "name": "y", "pid": 1, "tid": 1, "ts": 2},
    ]
    assert dict(chrome.parse(made.text()).others) == {("s", "ac2g"): 1, ("f", "ac2g"): 1, ("M", ""): 1, ("B", "x"): 1}


@given(st.lists(st.tuples(st.integers(0, 2**43 * 1000 - 1), st.integers(0, 10**12)), min_size=1, max_size=30))
def test_nanoseconds_behind_the_point_are_exact(times):
    """Times of today's traces: µs since a base of the last three months, with three decimals."""
    rows = [
        f'{{"ph":"X","name":"a","ts":{ts // 1000}.{ts % 1000:03},"dur":{d // 1000}.{d % 1000:03}}}' for ts, d in times
    ]
    events = chrome.parse(f'{{"traceEvents":[{",".join(rows)}]}}'.encode()).events
    assert list(zip(events.start_ns.tolist(), events.duration_ns.tolist(), strict=True)) == times


def test_nanoseconds_since_1970_are_exact():
    """Traces of early 2024: a float of this size holds quarters of a µs."""
    text = b'{"traceEvents":[{"ph":"X","name":"a","ts":1712195495519689.047,"dur":63.813}]}'
    assert chrome.parse(text).events.start_ns.tolist() == [1712195495519689047]


def test_one_fraction_among_whole_microseconds_is_exact():
    text = '{"ph":"X","name":"a","ts":1700000000000000,"dur":1},' * 40
    text += '{"ph":"X","name":"b","ts":1700000000000010.100,"dur":0.220}'
    events = chrome.parse(f'{{"traceEvents":[{text}]}}'.encode()).events
    assert events.start_ns[-1] == 1700000000000010100 and events.duration_ns[-1] == 220


# -- damage ------------------------------------------------------------------------------------------


def test_events_that_begin_with_other_fields_are_read_up_to_the_damage():
    """Files put together, or written again, begin their metadata otherwise than their events."""
    meta = [f'{{"name":"process_name","ph":"M","pid":{n},"args":{{"name":"x"}}}}' for n in range(5)]
    rows = [f'{{"ph":"X","name":"op","ts":{10 * n},"dur":5,"args":{{"a":[{{"b":1}},{{"b":2}}]}}}}' for n in range(300)]
    whole = f'{{"traceEvents":[{",".join(meta + rows)}]}}'
    assert len(chrome.parse(whole.encode()).events) == 300
    cut = chrome.parse(whole[: len(whole) * 9 // 10].encode())
    assert 260 <= len(cut.events) < 300 and cut.damage.lost <= 1 and cut.damage.cut_short
    at = whole.index('"op"', len(whole) // 2)
    broken = chrome.parse((whole[:at] + "@" + whole[at + 1 :]).encode())
    assert (len(broken.events), broken.damage.lost) == (299, 1)


def test_an_event_in_front_of_a_break_is_kept():
    text = b'{"traceEvents":[{"ph":"X","name":"a","ts":1,"dur":1},{"ph":"X","name":"b","ts":2,"dur":1}, {"p'
    found = chrome.parse(text)
    assert len(found.events) == 2 and found.damage.cut_short


def many(count: int = 3000) -> HandMade:
    made = HandMade()
    for number in range(count):
        made.host(f"op{number}", number * 10, 5, **{"Input Dims": [[1, 2], []], "nested": [{"a": 1}, {"b": "}, {"}]})
    return made


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Many blocks a file, so that their borders are tested."""
    monkeypatch.setattr(chrome, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 5000)


def test_borders_of_blocks_lose_nothing(small_blocks, tmp_path: Path):
    trace = chrome.read(many().write(tmp_path / "trace.json"))
    assert names(trace) == [f"op{number}" for number in range(3000)]
    assert not trace.damage
    assert trace.header["traceName"] == "x"


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9999])
def test_a_file_cut_short_gives_what_is_there(small_blocks, tmp_path: Path, kept: float):
    text = many().text()
    text = text[: int(len(text) * kept)]
    path = tmp_path / "trace.json"
    path.write_bytes(text)
    trace = chrome.read(path)
    whole = text.count(b'"ph": "X"')
    assert whole - 1 <= len(trace.events) <= whole
    assert names(trace) == [f"op{number}" for number in range(len(trace.events))]
    assert trace.damage.cut_short
    assert trace.damage.lost == whole - len(trace.events)


def test_gzip_cut_short_gives_what_is_there(tmp_path: Path):
    packed = gzip.compress(many().text())
    path = tmp_path / "trace.json.gz"
    path.write_bytes(packed[: len(packed) // 2])
    trace = chrome.read(path)
    assert trace.damage.cut_short
    assert 500 < len(trace.events) < 3000
    assert names(trace) == [f"op{number}" for number in range(len(trace.events))]


def test_gzip_with_garbage_inside_gives_what_stands_before_it(tmp_path: Path):
    packed = bytearray(gzip.compress(many(20_000).text()))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = bytes(40)
    path = tmp_path / "trace.json.gz"
    path.write_bytes(packed)
    trace = chrome.read(path)
    assert trace.damage.cut_short
    assert 0 < len(trace.events) < 20_000
    assert "gzip" in trace.damage.reason


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 298), min_size=1, max_size=6))
def test_broken_events_are_left_out_and_counted(broken):
    made = many(300)
    listed = [json.dumps(one) for one in made.events]
    for one in broken:
        listed[one] = listed[one].replace('"ts"', 'ts"')
    trace = chrome.parse(('{"traceEvents": [' + ", ".join(listed) + '], "traceName": "x"}').encode())
    assert names(trace) == [f"op{number}" for number in range(300) if number not in broken]
    assert trace.damage.lost >= len(broken)
    assert trace.header == {"traceName": "x"}


def test_bytes_that_json_forbids_are_mended_and_counted():
    """What profilers are known to have written: broken UTF-8, control characters, infinities."""
    text = three().text().replace(b'"gemm"', b'"ge\xffmm\x07"').replace(b'"stream": 7', b'"stream": 7, "GB/s": inf')
    trace = chrome.parse(text)
    assert names(trace) == ["aten::mm", "cudaLaunchKernel", "ge\ufffdmm "]
    assert trace.damage.mended == 1 and not trace.damage.lost


def test_a_long_tail_behind_the_events(small_blocks):
    text = three().text()[:-1] + b', "more": ' + json.dumps([{"x": 1}] * 3000).encode() + b"}"
    trace = chrome.parse(text)
    assert names(trace) == ["aten::mm", "cudaLaunchKernel", "gemm"]
    assert len(trace.header["more"]) == 3000
    assert not trace.damage


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b", "is empty, or its compression is damaged from the start"),
        (b"hello", "is not JSON"),
        (b'{"model": 1}', "is JSON, but no Chrome trace: it has no list traceEvents"),
        (b'{"model": 1', "is not a whole JSON file"),
        (b"[1, 2, 3]", "holds no event that can be read"),
        (b'[{"a": 1}, {"b": 2}]', "the objects in it are not trace events"),
        (b'{"traceEvents": [{"ph": ', "holds no event that can be read"),
        (b'{"traceEvents": 5}', "no list traceEvents"),
    ],
)
def test_what_is_no_trace_is_refused_in_a_sentence(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as raised:
        chrome.read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + three().text(),
        three().text().replace(b'{"schemaVersion": 1,', b'{"meta": {"traceEvents": []}, "schemaVersion": 1,'),
    ],
)
def test_a_byte_order_mark_and_a_field_of_the_same_name_elsewhere(text):
    assert names(chrome.parse(text)) == ["aten::mm", "cudaLaunchKernel", "gemm"]


def test_a_whole_file_whose_last_event_is_broken_is_not_cut_short():
    text = b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1}, {"ph": "X", "name": "b", "ts": "later"}]}'
    trace = chrome.parse(text)
    assert names(trace) == ["a"]
    assert trace.damage.lost == 1 and not trace.damage.cut_short


def test_an_empty_list_is_an_empty_trace():
    trace = chrome.parse(b'{"traceEvents": [], "traceName": "x"}')
    assert len(trace.events) == 0 and not trace.damage
    assert trace.header == {"traceName": "x"}


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="No such file"):
        chrome.read(tmp_path / "none.json")
