"""Makes the video and the event stream that ship with profkit: python tests/make_samples.py (needs PyAV with libx264).

The film pans and zooms over the photograph that ships as well; the events are those that an ideal event camera would
see of a part of it, shown faster. So both are profkit's own, under the photograph's terms.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

from profkit import event_streams

DATA = Path(__file__).parent.parent / "profkit" / "data"
FRAMES, SIZE, FRAMES_A_SECOND = 72, 240, 24
EVENT_FRAMES, INTERVAL_US = 12, 7_000


def film() -> np.ndarray:
    """Return the frames, uint8 [FRAMES, SIZE, SIZE, 3]: a window that moves over the picture and narrows."""
    with Image.open(DATA / "cat.jpg") as picture:
        width, height = picture.size
        shown = []
        for number in range(FRAMES):
            part = number / (FRAMES - 1)
            side = height * (1 - 0.4 * part)
            left, top = (width - side) * (0.5 - 0.5 * np.cos(np.pi * part)), (height - side) * 0.5 * part
            window = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            shown.append(np.asarray(window.convert("RGB")))
    return np.stack(shown)


def main() -> None:
    """Write both files."""
    frames = film()
    with av.open(str(DATA / "cat.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_A_SECOND)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "26", "preset": "slow"}
        for one in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
        container.mux(stream.encode())
    middle = frames[FRAMES // 2 : FRAMES // 2 + EVENT_FRAMES] @ np.array([0.299, 0.587, 0.114])
    found = event_streams.from_frames(middle, INTERVAL_US, threshold=0.5)
    columns = {name: getattr(found, name).astype(np.uint16) for name in ("x", "y")}
    np.savez_compressed(DATA / "cat_events.npz", **columns, t=found.t.astype(np.uint32), p=found.p.astype(np.uint8))
    print(f"{len(found)} events over {found.length_us / 1e3:.1f} ms")


if __name__ == "__main__":
    main()
