"""profkit says where the time of a multimodal model's generate() goes, and proves its numbers.

import profkit

with profkit.profile(model) as prof:
    model.generate(**kwargs)
print(prof.stages())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profkit.capture import profile
    from profkit.inspection import inspect
    from profkit.report import write_report
    from profkit.run import Run, load
    from profkit.tracing import trace, trace_together

__version__ = "0.1.0"
__all__ = ["Run", "inspect", "load", "profile", "trace", "trace_together", "write_report"]

_HOMES = {
    "inspect": "inspection",
    "profile": "capture",
    "trace": "tracing",
    "trace_together": "tracing",
    "load": "run",
    "Run": "run",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `profkit.load` must work, and start fast, where torch is not installed."""
    if name not in _HOMES:
        raise AttributeError(f"module 'profkit' has no attribute {name!r}")
    return getattr(import_module(f"profkit.{_HOMES[name]}"), name)
