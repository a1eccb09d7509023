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
    from profkit.run import Run
    from profkit.sample_runs import SampleRun
    from profkit.sample_runs import load_any as load
    from profkit.tracing import trace, trace_together

__version__ = "0.1.0"
__all__ = ["Run", "SampleRun", "inspect", "load", "profile", "trace", "trace_together", "write_report"]

_HOMES = {
    "inspect": "inspection.inspect",
    "profile": "capture.profile",
    "trace": "tracing.trace",
    "trace_together": "tracing.trace_together",
    "load": "sample_runs.load_any",
    "Run": "run.Run",
    "SampleRun": "sample_runs.SampleRun",
    "write_report": "report.write_report",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `profkit.load` must work, and start fast, where torch is not installed."""
    if name not in _HOMES:
        raise AttributeError(f"module 'profkit' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(".")
    return getattr(import_module(f"profkit.{module}"), attribute)
