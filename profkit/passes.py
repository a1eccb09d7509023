"""The passes of a trace: warm-up, control, clean and profiled, over an unmodified generate(), and what they found."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

import pandas as pd
import torch
from torch import nn

from profkit import (
    annotate,
    arguments,
    attribution,
    capture,
    directories,
    environment,
    inspection,
    kineto,
    memory,
    structure,
    trace_file,
    validation,
    work_pass,
)
from profkit import run as runs
from profkit.anatomy import Anatomy, PartNames
from profkit.cache import CacheWatch
from profkit.checks import verdicts
from profkit.clock import DeviceClock
from profkit.environment import device_of, random_state, restore_random_state, synchronize
from profkit.errors import InputError, MeasurementError, ProfkitError
from profkit.explanation import explain
from profkit.ledger import Ledger, Scope, Scopes
from profkit.marking import calibrated
from profkit.memory import allocators_of
from profkit.page_cache import are_cached
from profkit.plan import GRANULARITIES, Granularity, Place, places
from profkit.probes import Call, Instrument, sequences
from profkit.run import Pass, Run
from profkit.spans import Spans

SAMPLE = Scope("sample", "sample")
INPUT_STAGES = ("load", "preprocess", "transfer")
DEFAULT_STEPS = frozenset(range(5))
"""The prefill and four decode steps: a profile whose size does not grow with the output."""


class Sample(Protocol):
    """Inputs that are loaded, preprocessed and transferred as part of the measurement."""

    notes: list[str]
    """What a reader of the figures must know of them."""

    def load(self) -> Any:
        """Read and decode the input files."""

    def preprocess(self, loaded: Any, part: Callable[[str], AbstractContextManager[Any]]) -> Any:
        """Turn what was loaded into tensors on the host; what it consists of goes inside `with part(name):`."""

    def transfer(self, batch: Any) -> Mapping[str, Any]:
        """Move the tensors to the model's device; the result goes to generate()."""


@dataclass
class Plan:
    """What a trace is to do; see tracing.trace()."""

    warmup: int = 1
    repeat: int = 6
    granularity: Granularity = "layer"
    profile: bool = True
    profile_steps: frozenset[int] = DEFAULT_STEPS
    trace_budget_bytes: int = 50_000_000
    work: bool = True
    energy: bool = False
    seed: int | None = None
    progress: Callable[[str], None] = field(default=lambda what: None, repr=False)

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise InputError(f"repeat is {self.repeat}: at least one clean pass is needed.")
        self.profile_steps = frozenset(self.profile_steps)
        if self.granularity not in GRANULARITIES:
            raise InputError(f"Unknown granularity {self.granularity!r}: choose one of {', '.join(GRANULARITIES)}.")
        if self.trace_budget_bytes < 1:
            raise InputError(f"trace_budget_bytes is {self.trace_budget_bytes}: profile=False leaves the trace out.")
        if self.warmup < 0:
            raise InputError(f"warmup is {self.warmup}: it cannot be negative.")


def prepared(sample: Sample) -> dict[str, Any]:
    """Return the arguments of generate() that a sample becomes."""
    loaded = sample.load()
    return dict(sample.transfer(sample.preprocess(loaded, lambda name: nullcontext())))


class Tracing:
    """One trace: prepare(), each repeat(), and finished(), which puts the Run together."""

    def __init__(
        self,
        model: nn.Module,
        sample: Sample | None,
        kwargs: dict[str, Any],
        anatomy: Anatomy | None,
        parts: PartNames | None,
        plan: Plan,
    ) -> None:
        self.model, self.sample, self.kwargs, self.plan = model, sample, kwargs, plan
        self.parts = parts or {}
        self.anatomy = anatomy or structure.find(model, self.parts)
        self.parts_are_known = anatomy is not None
        self.device = device_of(model)
        self.clock = DeviceClock.of(environment.devices_of(model))
        self.scopes = Scopes([SAMPLE, *(Scope(f"{name}()", "input", name) for name in INPUT_STAGES)])
        self.random_state = random_state()
        self.tokens: dict[str, list[torch.Tensor | None]] = {"control": [], "clean": [], "memory": [], "profiled": []}
        self.calls: list[Call] = []
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.modules: dict[str, int] = {}
        self.graphs = 0
        self.machine: dict[str, Any] = {}
        self.encoded: dict[str, Any] | None = None
        self.cached: bool | None = None
        self.passes: list[Pass] = []
        self.started_unix_ns = time.time_ns()

    def prepare(self) -> None:
        """Find the parts and warm up."""
        if not self.parts_are_known:
            self.plan.progress("finding the parts")
            self.find_parts()
        for number in range(self.plan.warmup):
            self.plan.progress(f"warm-up {number + 1} of {self.plan.warmup}")
            self.control()
        self.modules, self.graphs = environment.modules_of(self.model), environment.graphs_compiled()
        clock_ns = environment.clock_step_ns()
        self.machine = {"cores": os.cpu_count(), "clock_ns": clock_ns, "mark_cost": asdict(calibrated(self.clock))}
        self.machine["before"] = environment.machine_now(self.device)
        # Whoever looked for the parts or warmed up has read them.
        self.cached = are_cached(list(getattr(self.sample, "paths", [])))

    def repeat(self, number: int) -> None:
        """Make one clean pass beside a control."""
        self.plan.progress(f"repeat {number + 1} of {self.plan.repeat}")
        # In alternation, and in alternating order (ABBA), so that drift falls on both alike.
        pair = (self.control, self.clean) if number % 2 == 0 else (self.clean, self.control)
        self.passes += [measure() for measure in pair]

    def finished(self, manifest: dict[str, Any]) -> Run:
        """Check the passes, make the profiled one, and return the run."""
        passes, started_ms = self.passes, self.started_unix_ns // 1_000_000
        self.machine["after"] = environment.machine_now(self.device)
        clean = [one.spans for one in passes if one.spans is not None]
        compiled = environment.graphs_compiled() - self.graphs
        repaired = {name: max(vars(spans.repair)[name] for spans in clean) for name in vars(clean[0].repair)}
        checks: dict[str, Any] = {"repaired": repaired, "encoded": self.encoded}
        inputs = {} if self.sample is not None else environment.hashes(self.kwargs)
        about = {**environment.describe(self.model), "started_unix_ms": started_ms, "inputs": inputs}
        result = Run(
            {**about, **manifest, "plan": self._plan_dict()},
            self.anatomy.with_calls(capture.calls_by_path(clean[0])),
            self.scopes.list,
            passes,
        )
        if self.plan.profile:
            result.memory = self.memory()
            self.profiled(result)
        checks |= {"same_tokens": self.same_tokens(), "same_by_itself": _all_equal(self.tokens["control"])}
        # Behind the profiled pass, whose modules must be the same too; what that compiles is its own affair.
        checks |= {"changed": self._changed(compiled), "sampling": arguments.samples(self.model, self.kwargs)}
        result.manifest["calls"] = [capture.call_dict(self.calls[0])]
        result.manifest["tokens"] = _token_list(self.tokens["clean"][0])
        result.manifest["checks"] = {**result.manifest.get("checks", {}), **checks}
        notes = [*self.notes, *capture.not_split(self.model, clean[0])]
        result.manifest |= {"faults": self.faults, "notes": notes, "machine": self.machine}
        result.manifest["files_cached"] = self.cached
        if self.plan.work:
            self.plan.progress("counting the work")
            self._reset_random_state()
            work_pass.add_work(result, self.model, self._prepared, vars(self.plan))
        if self.plan.energy:
            self.plan.progress("measuring energy")
            work_pass.add_energy(result, self.model, self._prepared)
        result.manifest["checks"]["verdicts"] = found = [asdict(one) for one in verdicts(result)]
        if result.trace_json is not None:
            result.trace_json = annotate.with_checks(result.trace_json, directories.plain(found))
        return result

    def _changed(self, compiled: int) -> list[str]:
        """Return which modules were exchanged since the warm-up, and how many graphs were compiled since."""
        now = environment.modules_of(self.model)
        every = {**self.modules, **now}
        found = [path for path in every if self.modules.get(path) != now.get(path)]
        return [*found, *([f"{compiled} graphs compiled"] if compiled else [])]

    @cached_property
    def places(self) -> list[Place]:
        """What to probe; every pass probes the same."""
        return places(self.model, self.anatomy, self.plan.granularity)

    def find_parts(self) -> None:
        """Look for the model's parts with the sample's arguments."""
        kwargs = self._prepared()
        try:
            self.anatomy = inspection.anatomy_for(self.model, kwargs, self.parts)
        except Exception as error:
            # If generate() itself cannot run, the passes will say so; else structure alone must do.
            self.notes.append(f"parts are known by structure alone: {error}")

    def _plan_dict(self) -> dict[str, Any]:
        plan = {key: value for key, value in vars(self.plan).items() if key != "progress"}
        return {**plan, "profile_steps": sorted(self.plan.profile_steps)}

    def control(self) -> Pass:
        """generate() with nothing attached."""
        self._reset_random_state()
        output, elapsed = self._generate(self._prepared())
        self.tokens["control"].append(_cpu(sequences(output)))
        return Pass("control", elapsed)

    def clean(self) -> Pass:
        """generate() with probes and device events alone."""
        ledger = Ledger(self.scopes)
        instrument = Instrument(self.model, self.anatomy, ledger, self.plan.granularity, self.clock, known=self.places)
        elapsed = self._instrumented(ledger, instrument, "clean")
        spans = Spans(capture.marks_of(ledger, self.clock), self.scopes.list)
        self.encoded = capture.encoded(spans, instrument)
        self.faults += ledger.faults
        return Pass("clean", elapsed, spans)

    def memory(self) -> pd.DataFrame | None:
        """generate() with the memory of its devices read at every mark; None where allocators keep no statistics."""
        allocators = allocators_of(environment.devices_of(self.model))
        if not allocators:
            return None
        self.plan.progress("memory")
        ledger, clock = Ledger(self.scopes), memory.MemoryClock(allocators)
        session = kineto.Session(self.plan.profile_steps, self.device, memory=True)
        instrument = Instrument(
            *(self.model, self.anatomy, ledger, "stage", clock, session.wrap, session.on_iteration),
        )
        with session:
            self._instrumented(ledger, instrument, "memory")
        spans = attribution.aligned(Spans(ledger.marks(), self.scopes.list), session.events())
        known = sorted(self.plan.profile_steps & set(range(len(spans.steps))))
        return memory.measured(session, spans, runs.recorded(spans, known), clock.by_mark(ledger))

    def profiled(self, result: Run) -> None:
        """generate() with probes inside torch.profiler; adds operators, trace and checks to the run."""
        made = len(result.representative.steps)
        if not self.plan.profile_steps & set(range(made)):
            wanted = ", ".join(map(str, sorted(self.plan.profile_steps)))
            self.notes.append(f"no profiled pass: of the steps to profile ({wanted}) none is among the {made} seen")
            return
        self.plan.progress("profiled pass")
        ledger = Ledger(self.scopes)
        session = kineto.Session(self.plan.profile_steps, self.device)
        watch = CacheWatch(ledger)
        instrument = Instrument(
            *(self.model, self.anatomy, ledger, self.plan.granularity, self.clock, session.wrap, session.on_iteration),
            known=self.places,
            on_output=watch.note if self.anatomy.path("decoder") else None,
        )
        with session:
            elapsed = self._instrumented(ledger, instrument, "profiled")
        spans = Spans(capture.marks_of(ledger, self.clock), self.scopes.list)
        self.faults += ledger.faults
        known = tuple(sorted(self.plan.profile_steps & set(range(len(spans.steps)))))
        result.passes.append(Pass("profiled", elapsed, spans, known))
        events = session.events()
        profile_clock = attribution.aligned(spans, events)
        within = runs.recorded(spans, known)
        found = explain(profile_clock, events, within)
        result.operators, result.kernels, result.device = found.operators, found.kernels, found.device
        result.timeline, result.trees = found.timeline, found.trees
        result.manifest["cache_bytes"], result.manifest["cache_rows"] = watch.bytes_by_step, watch.rows
        file = trace_file.written(
            *(session.export(), profile_clock, events, found, known, self.plan.trace_budget_bytes),
            {"model": self.anatomy.model_class},
            watch.series(),
        )
        result.trace_json = file.text
        self.notes += file.notes(len(known), self.plan.trace_budget_bytes)
        result.manifest["checks"] = {
            "trace": validation.validate_text(result.trace_json),
            "profile": [asdict(one) for one in found.checks],
        }

    def _instrumented(
        self,
        ledger: Ledger,
        instrument: Instrument,
        kind: str,
    ) -> int:
        self._reset_random_state()
        with instrument:
            if self.sample is None:
                output, elapsed = self._generate(self._prepared())
            else:
                with ledger.scope(SAMPLE):
                    output, elapsed = self._generate(self._prepared(ledger))
        self.tokens[kind].append(_cpu(sequences(output)))
        self.calls += instrument.calls
        given = self.sample.notes if self.sample is not None else []
        self.notes += [one for one in given if one not in self.notes]
        return elapsed

    def _prepared(self, ledger: Ledger | None = None) -> dict[str, Any]:
        """Return the arguments of generate(), from the sample if there is one, marked in `ledger`."""
        if self.sample is None:
            return arguments.fresh(self.kwargs)

        def measured(name: str, stage: str) -> AbstractContextManager[Any]:
            return nullcontext() if ledger is None else ledger.scope(Scope(name, "input", stage))

        with measured("load()", "load"):
            loaded = self.sample.load()
        with measured("preprocess()", "preprocess"):
            batch = self.sample.preprocess(loaded, lambda name: measured(f"preprocess().{name}", "preprocess"))
        with measured("transfer()", "transfer"):
            moved = self.sample.transfer(batch)
        return {**moved, **self.kwargs}

    def _generate(self, kwargs: Mapping[str, Any]) -> tuple[Any, int]:
        begin = time.perf_counter_ns()
        try:
            output = self.model.generate(**kwargs)  # type: ignore[operator]
        except ProfkitError:
            raise
        except Exception as error:
            raise MeasurementError(describe_failure(error, self.model)) from error
        # generate() may return before its device is done.
        synchronize(self.device)
        return output, time.perf_counter_ns() - begin

    def _reset_random_state(self) -> None:
        if self.plan.seed is not None:
            torch.manual_seed(self.plan.seed)
        else:
            restore_random_state(self.random_state)

    def same_tokens(self) -> bool | None:
        """Tell whether every pass gave the tokens of the first control; None if there are none to compare."""
        return _all_equal([one for kind in self.tokens.values() for one in kind])


def describe_failure(error: Exception, model: nn.Module) -> str:
    """Return one sentence on an exception that generate() raised."""
    name, text = type(model).__name__, " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "out of memory" in text:
        return (
            f"{name}.generate() ran out of memory on {device_of(model)}: try --dtype bfloat16, fewer "
            f"--max-new-tokens, or a smaller model ({text[:200]})."
        )
    return f"{name}.generate() failed: {type(error).__name__}: {text[:500]}"


def _all_equal(every: Sequence[torch.Tensor | None]) -> bool | None:
    """Tell whether tokens are equal; None if there are none, or only those of one."""
    first, *others = every
    if first is None or not others or any(one is None for one in others):
        return None
    return all(one is not None and torch.equal(first, one) for one in others)


def _cpu(tokens: torch.Tensor | None) -> torch.Tensor | None:
    return None if tokens is None else tokens.cpu()


def _token_list(tokens: torch.Tensor | None) -> list[list[int]] | None:
    return None if tokens is None else tokens.tolist()
