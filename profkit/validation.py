"""torch's own validator of traces, where this torch has one."""

from __future__ import annotations

import tempfile
from pathlib import Path


def validate(path: Path) -> str:
    """Return `passed`, the rules that a trace file breaks with how often, or why it was not checked."""
    try:
        from torch.profiler._trace_validator import validate_trace
    except ImportError as error:
        return f"not checked: {error}"
    try:
        passed, violations = validate_trace(str(path))
    except Exception as error:
        return f"not checked: torch's validator cannot read the file ({type(error).__name__})"
    rules: dict[str, list[str]] = {}
    for one in violations:
        rules.setdefault(one.rule_name.removeprefix("_check_"), []).append(one.message)
    return "passed" if passed else "; ".join(f"{rule} ({len(said)} times): {said[0]}" for rule, said in rules.items())


def validate_text(trace_json: bytes) -> str:
    """Return the same of the text of a trace."""
    with tempfile.TemporaryDirectory(prefix="profkit-") as folder:
        path = Path(folder) / "trace.json"
        path.write_bytes(trace_json)
        return validate(path)
