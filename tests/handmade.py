"""Chrome traces made by hand or at random, whose right answers are known because they were decided first."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SHARED_TRACES = Path(__file__).parents[2] / "shared" / "traces"
HOST_PID = 4000


@dataclass
class Kernel:
    """A device event and what is true of it."""

    name: str
    start: int
    duration: int
    device: int
    stream: int
    path: str
    operator: str
    why: str


@dataclass
class HandMade:
    """Writes events; times are whole µs, threads numbers. Answers are kept beside them."""

    events: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    correlation: int = 0

    def host(
        self, name: str, start: int, duration: int, category: str = "cpu_op", thread: int = 1, **args: Any
    ) -> None:
        """Add an event on the host."""
        self._add(name, category, HOST_PID, thread, start, duration, args)

    def launch(
        self, start: int, duration: int = 2, name: str = "cudaLaunchKernel", thread: int = 1, **args: Any
    ) -> int:
        """Add a launch and return its correlation."""
        self.correlation += 1
        self.host(name, start, duration, "cuda_runtime", thread, correlation=self.correlation, **args)
        return self.correlation

    def kernel(
        self,
        correlation: int,
        start: int,
        duration: int,
        name: str = "gemm",
        device: int = 0,
        stream: int = 7,
        category: str = "kernel",
        path: str = "",
        operator: str = "",
        why: str = "inside",
    ) -> None:
        """Add a device event, and what is true of it."""
        args = {"correlation": correlation, "device": device, "stream": stream}
        self._add(name, category, device, stream, start, duration, args)
        self.kernels.append(Kernel(name, start, duration, device, stream, path, operator, why))

    def _add(self, name: str, cat: str, pid: int, tid: int, start: int, duration: int, args: dict[str, Any]) -> None:
        fields = {"name": name, "cat": cat, "pid": pid, "tid": tid, "ts": start, "dur": duration, "args": args}
        self.events.append({"ph": "X", **fields})

    def text(self, **header: Any) -> bytes:
        """Return the text of the file."""
        return json.dumps({"schemaVersion": 1, **header, "traceEvents": self.events, "traceName": "x"}).encode()

    def write(self, path: Path, **header: Any) -> Path:
        """Write the file."""
        path.write_bytes(self.text(**header))
        return path


@st.composite
def programs(draw: st.DrawFn) -> HandMade:
    """A program of nested modules, annotations and operators on one to three threads, and what it launches where.

    The first thread opens modules and annotations; others only run operators, so that what they do belongs to
    what the first one had open. Launches may lead to a kernel, to a whole graph, or to nothing; kernels may lack a
    launch; streams run at once, and a device clock may be ahead.
    """
    made = HandMade()
    device_free: dict[tuple[int, int], int] = {}
    opened: list[tuple[int, int, str]] = []

    def run_on_device(correlation: int, called: int, path: str, operator: str, why: str) -> None:
        device, stream = draw(st.integers(0, 1)), draw(st.integers(7, 8))
        begins = max(device_free.get((device, stream), 0), called + draw(st.integers(-2, 30)))
        lasts = draw(st.integers(0, 40))
        device_free[device, stream] = begins + lasts
        category = draw(st.sampled_from(["kernel", "gpu_memcpy", "gpu_memset"]))
        name = draw(st.sampled_from(["gemm", "softmax", "copy"]))
        made.kernel(correlation, begins, lasts, name, device, stream, category, path, operator, why)

    def launch(at: int, thread: int, path: str, operator: str, inside: str) -> None:
        what = draw(st.sampled_from(["kernel", "graph", "nothing", "sync"]))
        if what == "sync":
            made.host("cudaStreamSynchronize", at, 1, "cuda_runtime", thread, correlation=made.correlation + 500_000)
            return
        name = "cudaGraphLaunch" if what == "graph" else "cudaLaunchKernel"
        number = made.launch(at, 1, name, thread)
        why = inside if what == "kernel" or inside == "no_scope" else "graph"
        for _ in range({"kernel": 1, "graph": draw(st.integers(1, 4)), "nothing": 0}[what]):
            run_on_device(number, at, path, operator, why)

    def fill(start: int, stop: int, path: str, operator: str, depth: int, module: bool) -> None:
        while stop - start > 8 and len(made.events) < 60 and draw(st.booleans()):
            begin = start + draw(st.integers(1, (stop - start) // 2))
            end = draw(st.integers(begin + 1, stop - 1))
            what = draw(st.sampled_from(["module", "annotation", "operator", "launch"])) if depth < 6 else "launch"
            # An operator does not open scopes: where modules call operators, not the other way.
            what = "operator" if operator and what in ("module", "annotation") else what
            if what == "launch":
                launch(begin, 1, path, operator, "inside" if path or operator else "no_scope")
                end = begin + 1
            elif what == "operator":
                name = draw(st.sampled_from(["aten::mm", "aten::add"]))
                made.host(name, begin, end - begin)
                fill(begin + 1, end, path, name, depth + 1, module)
            elif what == "module":
                name = draw(st.sampled_from(["Block_0", "Linear_0"]))
                made.host(f"nn.Module: {name}", begin, end - begin, "python_function")
                inner = f"{path}{'.' if module else '/'}{name}" if path else name
                opened.append((begin, end, inner))
                fill(begin + 1, end, inner, "", depth + 1, True)
            else:
                name = draw(st.sampled_from(["forward", "loss"]))
                made.host(name, begin, end - begin, "user_annotation")
                inner = f"{path}/{name}" if path else name
                opened.append((begin, end, inner))
                fill(begin + 1, end, inner, "", depth + 1, module)
            start = end

    fill(0, 400, "", "", 0, False)
    for thread in range(2, 2 + draw(st.integers(0, 2))):
        at = 0
        while at < 380 and draw(st.booleans()):
            at += draw(st.integers(5, 150))
            around = [one for one in opened if one[0] <= at < one[1]]
            path = max(around, key=lambda one: (one[0], -one[1]))[2] if around else ""
            made.host("aten::mul", at, 4, thread=thread)
            called = at + 1
            around = [one for one in opened if one[0] <= called < one[1]]
            path = max(around, key=lambda one: (one[0], -one[1]))[2] if around else ""
            launch(called, thread, path, "aten::mul", "other_thread" if path else "inside")
            at += 6
    for _ in range(draw(st.integers(0, 2))):
        run_on_device(900_000 + len(made.kernels), 0, "", "", "no_launch")
    order = draw(st.permutations(range(len(made.events))))
    made.events = [made.events[one] for one in order]
    return made
