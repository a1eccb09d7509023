"""What a profiler recorded, as columns: operators, ranges, launches, kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property

import numpy as np

NOTHING = -1
"""In columns of ids: there is none. In `correlation`: the event takes part in no launch."""


class Kind(IntEnum):
    """What an event is, whatever its profiler called it."""

    OTHER = 0
    OPERATOR = 1
    ANNOTATION = 2
    """A range that the program opened itself: record_function, ProfilerStep."""
    PYTHON = 3
    """A Python function; calls of modules are named `nn.Module: …`."""
    RUNTIME = 4
    """A call of the device's runtime or driver on the host; some launch work, most do not."""
    KERNEL = 5
    MEMCPY = 6
    MEMSET = 7
    SYNC = 8
    """A wait of the device for an event or a stream; it occupies nothing."""
    DEVICE_RANGE = 9
    """An annotation as the device saw it, idle time included: never summed."""
    OVERHEAD = 10
    """The profiler's own time."""
    PROFKIT = 11
    """A slice of profkit's own tracks."""


HOST = (Kind.OPERATOR, Kind.ANNOTATION, Kind.PYTHON, Kind.RUNTIME)
"""What nests on a host thread."""
DEVICE = (Kind.KERNEL, Kind.MEMCPY, Kind.MEMSET)
"""What keeps a device busy."""

KIND_OF_CATEGORY = {
    **dict.fromkeys(("cpu_op", "operator"), Kind.OPERATOR),
    **dict.fromkeys(("user_annotation", "userannotation"), Kind.ANNOTATION),
    **dict.fromkeys(("python_function", "python function", "python"), Kind.PYTHON),
    **dict.fromkeys(("cuda_runtime", "cuda_driver", "runtime", "driver", "xpu_runtime", "xpu_driver"), Kind.RUNTIME),
    **dict.fromkeys(("mtia_runtime", "glow_runtime", "privateuse1_runtime", "privateuse1_driver"), Kind.RUNTIME),
    **dict.fromkeys(("kernel", "concurrent_kernel", "mtia_ccp_events", "hpu_op"), Kind.KERNEL),
    **dict.fromkeys(("gpu_memcpy", "memcpy"), Kind.MEMCPY),
    **dict.fromkeys(("gpu_memset", "memset"), Kind.MEMSET),
    **dict.fromkeys(("cuda_sync", "cuda_event"), Kind.SYNC),
    **dict.fromkeys(("gpu_user_annotation",), Kind.DEVICE_RANGE),
    **dict.fromkeys(("overhead",), Kind.OVERHEAD),
    **dict.fromkeys(("profkit",), Kind.PROFKIT),
}
"""Categories of kineto's traces, in lower case; those of 2021 were Operator, Runtime, Kernel."""


def kind_of(category: str) -> Kind:
    """Return what events of a category are."""
    return KIND_OF_CATEGORY.get(category.lower(), Kind.OTHER)


def device_name(category: str, number: object) -> str:
    """Return the name of a device: its number, behind its type where the category tells one of its own."""
    family = category.lower().partition("_")[0]
    return f"{family} {number}" if family in ("mtia", "hpu") else str(number)


@dataclass(frozen=True)
class Events:
    """Complete events as numpy columns of equal length, in the order they were recorded.

    `name` and `launched` index `names` (`launched`: the kernel that a runtime call says it launches), `category`
    indexes `categories`, `device` indexes `devices`; `start_ns` and `duration_ns` are integer nanoseconds on the
    profiler's
    clock; `process`, `thread` and `stream` are the recorder's numbers; `correlation` ties launches and kernels.
    Ids are NOTHING where an event has none. `kind` holds Kinds and follows from the category.
    """

    names: Sequence[str]
    categories: Sequence[str]
    devices: Sequence[str]
    name: np.ndarray
    category: np.ndarray
    start_ns: np.ndarray
    duration_ns: np.ndarray
    process: np.ndarray
    thread: np.ndarray
    correlation: np.ndarray
    device: np.ndarray
    stream: np.ndarray
    launched: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.name)

    @cached_property
    def end_ns(self) -> np.ndarray:
        """Where each event ends, in ns."""
        return self.start_ns + self.duration_ns

    @cached_property
    def length_ns(self) -> np.ndarray:
        """How long each event lasted, in ns; nothing for those of negative length, which some recorders write."""
        return np.maximum(self.duration_ns, 0)

    @cached_property
    def kind(self) -> np.ndarray:
        """What each event is: Kinds, as int8."""
        return np.array([kind_of(category) for category in self.categories], dtype=np.int8)[self.category]

    def is_kind(self, *wanted: Kind) -> np.ndarray:
        """Return which events are of one of these kinds."""
        table = np.zeros(len(Kind), dtype=bool)
        table[list(wanted)] = True
        return table[self.kind]

    def named(self, wanted: Sequence[bool] | np.ndarray) -> np.ndarray:
        """Return which events have a name that `wanted` (a mask over `names`) holds."""
        return np.asarray(wanted, dtype=bool)[self.name]

    def select(self, rows: np.ndarray) -> Events:
        """Return the events of a mask or a list of positions; the lists of names are shared."""
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS})


COLUMNS = tuple(one.name for one in fields(Events))[3:]
"""Names of the columns, in order."""
