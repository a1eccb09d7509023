"""Videos: which frames are shown, and files that are none."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from profkit import samples, videos
from profkit.errors import InputError


def write_video(path: Path, count: int) -> Path:
    """A video whose frame k is a grey of 20 k."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        container.start_encoding()
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * number, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("count", "shown"), [(12, [0, 2, 3, 5, 6, 8, 9, 11]), (8, [*range(8)]), (1, [0] * 8)])
def test_frames_are_taken_at_equal_distances(tmp_path, count, shown):
    frames = videos.read_frames(write_video(tmp_path / "a.mp4", count), 8)
    assert frames.shape == (8, 32, 32, 3)
    assert np.abs(frames.mean(axis=(1, 2, 3)) - 20 * np.array(shown)).max() < 4


def test_the_video_that_ships_is_one():
    frames = videos.read_frames(samples.default_file("videos"), 8)
    assert frames.shape == (8, 240, 240, 3)
    assert len({frame.tobytes() for frame in frames}) == 8


def test_files_that_are_no_videos(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        videos.read_frames(tmp_path / "none.mp4", 8)
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(InputError, match="not a video that can be decoded"):
        videos.read_frames(tmp_path / "text.mp4", 8)
    whole = write_video(tmp_path / "whole.mp4", 10).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(InputError):
        videos.read_frames(tmp_path / "cut.mp4", 8)
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="not a video that can be decoded"):
        videos.read_frames(tmp_path / "empty.mp4", 8)
    with pytest.raises(InputError, match="has no frames"):
        videos.read_frames(write_video(tmp_path / "no_time.avi", 0), 8)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="has no video stream"):
        videos.read_frames(tmp_path / "sound.mp4", 8)


def test_a_video_that_changes_its_size(tmp_path):
    def part(size: int) -> bytes:
        path = tmp_path / f"{size}.mpg"
        with av.open(str(path), "w", format="mpeg2video") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            for number in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 40 * number, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path.read_bytes()

    (tmp_path / "both.mpg").write_bytes(part(64) + part(96))
    with pytest.raises(InputError, match=r"changes its size on the way \(64 by 64 and 96 by 96\)"):
        videos.read_frames(tmp_path / "both.mpg", 8)


def test_a_stream_that_cannot_be_wound_back(tmp_path):
    with av.open(str(tmp_path / "raw.h264"), "w", format="h264") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert videos.read_frames(tmp_path / "raw.h264", 3).shape == (3, 64, 64, 3)
