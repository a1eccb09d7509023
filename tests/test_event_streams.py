"""Event streams: reading safely, what is refused, drawing, and the camera model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profkit import event_streams, options, samples
from profkit.errors import InputError
from profkit.event_streams import EventStream, cut, frame, frames, from_frames, read_stream, slices


def columns(count: int = 10) -> dict[str, np.ndarray]:
    number = np.arange(count)
    kinds = {"x": number % 4, "y": number % 3, "t": number * 7, "p": number % 2}
    return {name: column.astype(np.uint16 if name != "p" else np.uint8) for name, column in kinds.items()}


def write_npz(path: Path, **changed) -> Path:
    np.savez(path, **{**columns(), **changed})
    return path


def test_npz_and_pickled_npy_give_the_same(tmp_path):
    one = read_stream(write_npz(tmp_path / "a.npz"))
    np.save(tmp_path / "b.npy", columns(), allow_pickle=True)
    other = read_stream(tmp_path / "b.npy")
    for name in ("x", "y", "t", "p"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert (len(one), one.length_us) == (10, 63)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/profkit-was-here",)


@pytest.mark.parametrize("value", [Evil(), {"x": Evil()}, {**columns(), "more": Evil()}])
def test_an_npy_file_runs_no_code(tmp_path, value):
    np.save(tmp_path / "evil.npy", np.array(value, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="only numpy arrays are unpickled"):
        read_stream(tmp_path / "evil.npy")
    assert not Path("/tmp/profkit-was-here").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({name: np.empty(0, dtype=np.int64) for name in "xytp"}, "is empty"),
        ({"t": np.array([0, 5, 3, *range(6, 13)])}, "out of order: event 2 is earlier"),
        ({"x": np.arange(3)}, "columns of different sizes"),
        ({"t": np.linspace(0, 1, 10)}, "must be whole numbers"),
        ({"x": np.full(10, -1)}, "x -1, y 0, off any sensor"),
        ({"y": np.array([*range(9), 10**9])}, "Event 9 .* y 1000000000, off any sensor"),
    ],
)
def test_streams_that_cannot_be(tmp_path, changed, said):
    with pytest.raises(InputError, match=said) as raised:
        read_stream(write_npz(tmp_path / "a.npz", **changed))
    assert str(tmp_path / "a.npz") in str(raised.value)


def test_files_that_are_no_streams(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_stream(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    np.save(tmp_path / "plain.npy", np.arange(3))
    np.save(tmp_path / "list.npy", np.array([1, "a"], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "list.npy").read_bytes()[:40])
    for name in ("text.npz", "other.npz", "plain.npy", "list.npy", "cut.npy"):
        with pytest.raises(InputError, match="is no event stream"):
            read_stream(tmp_path / name)


def test_coordinates_beyond_a_known_sensor(tmp_path):
    path = write_npz(tmp_path / "a.npz", x=np.array([1, 2, 640, *range(7)]))
    assert len(read_stream(path)) == 10
    with pytest.raises(InputError, match=r"Event 2 .* is at x 640, y 2, off the sensor of 640 by 480"):
        read_stream(path, sensor=(480, 640))
    with np.load(path) as arrays:
        np.savez(tmp_path / "told.npz", height=480, width=640, **arrays)
    with pytest.raises(InputError, match="off the sensor of 640 by 480"):
        read_stream(tmp_path / "told.npz")


streams = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.booleans()), min_size=1, max_size=60)


@given(streams)
def test_drawing_equals_drawing_event_by_event(events):
    x, y, p = (np.array(column) for column in zip(*events, strict=True))
    drawn = frame(EventStream(x, y, np.arange(len(x)), p))
    expected = np.full((max(y) + 1, max(x) + 1, 3), 255, dtype=np.uint8)
    for one_x, one_y, brighter in events:
        expected[one_y, one_x] = (255, 0, 0) if brighter else (0, 0, 255)
    assert np.array_equal(drawn, expected)


@given(st.integers(5, 60))
def test_slices_have_equal_counts_and_the_last_takes_the_rest(count):
    number = np.arange(count)
    parts = slices(EventStream(number, number, number, number > 3))
    assert [len(one) for one in parts] == [count // 5] * 4 + [count - 4 * (count // 5)]
    assert np.concatenate([one.t for one in parts]).tolist() == number.tolist()


def test_too_few_events_for_the_frames():
    with pytest.raises(InputError, match="3 events are too few for 5 frames"):
        frames(EventStream(*(np.arange(3),) * 3, np.arange(3) > 0))


def test_a_long_stream_is_noted_and_a_window_of_it_can_be_taken(tmp_path):
    path = write_npz(tmp_path / "long.npz", t=np.linspace(0, 250_000, 10).astype(np.int64))
    sample = samples.EventSample([path], "?", None, None, 1)
    assert len(sample.load()) == len(sample.load()) == 10
    (note,) = sample.notes
    assert "lasts 250 ms" in note and "--event-window 0-99" in note
    part = cut(path, tmp_path / "part.npz", 0, 99_000)
    assert part.length_us < 100_000
    assert len(samples.EventSample([tmp_path / "part.npz"], "?", None, None, 1).load()) == len(part) == 4
    windowed = samples.EventSample([path], "?", None, None, 1, samples.Reading(options.parse_window("0-99")))
    assert len(windowed.load()) == 4 and windowed.notes == []
    with pytest.raises(InputError, match="no events between"):
        cut(path, tmp_path / "none.npz", 300_000, 400_000)
    with pytest.raises(InputError, match=r"no events between 300 and 400\.5 ms"):
        samples.EventSample([path], "?", None, None, 1, samples.Reading(options.parse_window("300 - 400.5"))).load()
    for wrong in ("50", "50-20", "a-b", "-5-10"):
        with pytest.raises(InputError, match="is no window in ms"):
            options.parse_window(wrong)


def test_the_camera_model_gives_an_event_a_step_of_log_intensity():
    # One pixel goes from dark to bright and back over two intervals of 1000 us, the other stays.
    grey = np.array([[[50.0, 90.0]], [[200.0, 90.0]], [[50.0, 90.0]]])
    found = from_frames(grey, 1000, threshold=0.3)
    # log(200/255 + 0.05) - log(50/255 + 0.05) = -0.181 + 1.400 = 1.219 = 4 x 0.3 + 0.019: four events up to
    # 0.019 below the top; then down 1.219 from there, of which 1.2 makes four events again.
    assert found.x.tolist() == [0] * 8
    assert found.p.tolist() == [True] * 4 + [False] * 4
    # Up, the first crossing is a fraction 0.3 / 1.219 of the way; down, the first is (0.3 + 0.019) / 1.219 of it.
    assert found.t.tolist()[:2] == pytest.approx([246, 492], abs=1)
    assert found.t.tolist()[4] == pytest.approx(1000 + 262, abs=1)


def test_the_stream_that_ships_is_one():
    found = read_stream(samples.default_file("events"))
    assert len(found) > 50_000
    assert found.length_us < event_streams.EVENTGPT_LIMIT_US
    assert len(frames(found)) == 5


def test_damaged_bytes_are_said_as_such(tmp_path):
    random = np.random.default_rng(0)
    columns = {name: random.integers(0, 100, 5000) for name in "xyp"}
    np.savez_compressed(tmp_path / "a.npz", **columns, t=np.arange(5000))
    whole = (tmp_path / "a.npz").read_bytes()
    for start in range(100, len(whole) - 400, len(whole) // 12):
        damaged = bytes(byte ^ 0xFF for byte in whole[start : start + 200])
        (tmp_path / "b.npz").write_bytes(whole[:start] + damaged + whole[start + 200 :])
        with pytest.raises(InputError, match=r"b\.npz is no event stream"):
            read_stream(tmp_path / "b.npz")
