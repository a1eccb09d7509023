"""Whether a file lies in the system's page cache, which makes reading it warm."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path


def are_cached(files: Sequence[Path]) -> bool | None:
    """Tell whether every page of some files is in memory; None where there are no files or the system does not say.

    Nothing is read: reading, even without waiting, would let the system fetch what comes next.
    """
    try:
        return all(_is_cached(path) for path in files) if files else None
    except (OSError, AttributeError):
        return None


def _is_cached(path: Path) -> bool:
    if not path.stat().st_size:
        return True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        held = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(pages)), held
        )
        # While something points into the mapping, it cannot be closed.
        del start
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return all(one & 1 for one in held)
