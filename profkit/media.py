"""What models are shown: images, videos, event streams, and the files that hold them."""

from __future__ import annotations

WORDS = {"images": "image", "videos": "video", "events": "event stream"}
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
KIND_OF_SUFFIX = {
    **dict.fromkeys(IMAGES, "images"),
    **dict.fromkeys(VIDEOS, "videos"),
    **dict.fromkeys((".npz", ".npy"), "events"),
}


def with_article(kind: str) -> str:
    """Return "an image" for images, and so on."""
    word = WORDS[kind]
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
