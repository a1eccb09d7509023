"""Video files, decoded to the frames that a model is shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from profkit.errors import InputError


def read_frames(path: Path, count: int) -> np.ndarray:
    """Return `count` frames at equal distances, the first and the last among them; uint8 [count, height, width, 3].

    Frames are counted by decoding, as a container's own number may be wrong. A film of fewer frames shows some of them
    more than once. Raises InputError for a file that is missing, no video, or without a frame.
    """
    try:
        total = sum(1 for _ in _decoded(path))
        if not total:
            raise InputError(f"The video {path} has no frames.")
        wanted = np.linspace(0, total - 1, count).round().astype(int)
        chosen = set(wanted.tolist())
        # Opened anew: not every container can be wound back.
        kept = {
            number: frame.to_ndarray(format="rgb24") for number, frame in enumerate(_decoded(path)) if number in chosen
        }
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise InputError(f"{path} is not a video that can be decoded: {' '.join(str(error).split())[:200]}.") from error
    sizes = sorted({frame.shape[:2] for frame in kept.values()})
    if len(sizes) > 1:
        said = " and ".join(f"{width} by {height}" for height, width in sizes)
        raise InputError(f"The video {path} changes its size on the way ({said}): cut it, or scale it to one.")
    return np.stack([kept[number] for number in wanted.tolist()])


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError(f"{path} has no video stream.")
        yield from container.decode(video=0)
