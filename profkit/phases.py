"""Prefill and decode steps in a trace that says nothing of profkit: by its ranges, or by what repeats."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from profkit.events import NOTHING, Events, Kind
from profkit.nesting import Forest

NAMES = ("prefill", "decode", "mixed")
PREFILL, DECODE, MIXED = range(3)

WORD = re.compile(r"[a-z]+", re.IGNORECASE)
PHASE_OF_WORD = {"prefill": PREFILL, "extend": PREFILL, "decode": DECODE}
BESIDE = frozenset(
    (
        *(
            "step",
            "steps",
            "forward",
            "batch",
            "token",
            "tokens",
            "phase",
            "stage",
            "pass",
            "iter",
            "iteration",
            "loop",
        ),
        *("run", "execute", "model", "runner", "llm", "lm", "generate", "generation", "engine", "worker", "graph"),
        *("capture", "replay", "cuda", "hip", "gpu", "bs", "toks", "seq", "seqs", "len", "only", "first", "next"),
        *("the", "of", "a", "with", "eager", "static", "chunked", "full", "chunk", "request", "requests"),
    )
)
"""Words that a range may have beside that of its phase. Images, audio and tokens' text are decoded too."""
BATCH = re.compile(r"execute_(?:\d+_)?context_(\d+)\b.*_generation_(\d+)\b")
"""How vLLM names a batch: how many of its requests read their prompts, how many generate."""
PREFILL_FRAME = re.compile(r"generation/utils\.py\(\d+\): _prefill\w*$")
GENERATE_FRAME = re.compile(r"generation/utils\.py\(\d+\): generate$")
SELECTIONS = ("aten::argmax", "aten::multinomial")
EMBEDDING = "aten::embedding"
COMPUTING = ("aten::conv", "aten::linear", "aten::mm", "aten::addmm", "aten::matmul", "aten::bmm", "aten::scaled_dot")
TRAINING = ("autograd::engine", "Optimizer.")


@dataclass(frozen=True)
class Phases:
    """Steps found in a trace, in order of time: a phase (index into `names`, NOTHING if open), a label, host times.

    `evidence` says in a sentence what they were recognised by, or why none were.
    """

    names: tuple[str, ...]
    phase: np.ndarray
    labels: list[str]
    start_ns: np.ndarray
    end_ns: np.ndarray
    evidence: str

    def __len__(self) -> int:
        return len(self.labels)


def find_phases(events: Events, forest: Forest) -> Phases:
    """Return the steps of the generation that a trace shows, as far as something in it proves them."""
    for find in (_by_annotation, _by_generate_frame, _by_selection, _by_profiler_step):
        found = find(events, forest)
        if found is not None:
            return found
    nothing = np.empty(0, dtype=np.int64)
    return Phases(
        NAMES, nothing, [], nothing, nothing, "no steps: no range names one, and no selection of tokens repeats"
    )


def phase_of(name: str) -> int:
    """Return the phase that a range's name tells, NOTHING if none."""
    if batch := BATCH.search(name):
        reading, generating = int(batch[1]) > 0, int(batch[2]) > 0
        return MIXED if reading and generating else PREFILL if reading else DECODE if generating else NOTHING
    words = [word.lower() for word in WORD.findall(name)]
    said = {PHASE_OF_WORD[word] for word in words if word in PHASE_OF_WORD}
    others = {word for word in words if word not in PHASE_OF_WORD}
    return said.pop() if len(said) == 1 and others <= BESIDE else NOTHING


def _by_annotation(events: Events, forest: Forest) -> Phases | None:
    """Steps are the outermost annotations whose names tell a phase."""
    told = np.array([phase_of(name) for name in events.names], dtype=np.int64)[events.name[forest.rows]]
    told = np.where(events.kind[forest.rows] == Kind.ANNOTATION, told, NOTHING)
    at = np.flatnonzero((told >= 0) & ~_inside(forest, told >= 0))
    if not len(at):
        return None
    labels = [events.names[one] for one in events.name[forest.rows[at]].tolist()]
    return _steps(forest, at, told[at], labels, "steps: annotations whose names tell a phase")


def _by_generate_frame(events: Events, forest: Forest) -> Phases | None:
    """Steps are the calls of the module that transformers' generate() calls again and again, by its Python frames."""
    names = events.name[forest.rows]
    frames = events.named([GENERATE_FRAME.search(name) is not None for name in events.names])[forest.rows]
    modules = events.named([name.startswith("nn.Module: ") for name in events.names])[forest.rows]
    if (frames & _inside(forest, frames)).any():
        nothing = np.empty(0, dtype=np.int64)
        said = "no steps: a generate() inside another, as of a draft model, leaves open whose steps are whose"
        return Phases(NAMES, nothing, [], nothing, nothing, said)
    around = forest.nearest(frames)
    outermost = np.flatnonzero(modules & ~_inside(forest, modules) & (around >= 0))
    if not len(outermost):
        return None
    name, calls = Counter(names[outermost].tolist()).most_common(1)[0]
    if calls < 2:
        return None
    at = outermost[names[outermost] == name]
    first = np.append(True, around[at[1:]] != around[at[:-1]])
    # An iteration lasts until the next forward, or until generate() ends.
    end = np.where(np.append(first[1:], True), _end(forest)[around[at]], np.append(forest.start_ns[at[1:]], 0))
    said = f"steps: calls of {events.names[name].removeprefix('nn.Module: ')} inside transformers' generate()"
    # A long prompt may be read in several passes, which have a frame of their own around them.
    reading = events.named([PREFILL_FRAME.search(name) is not None for name in events.names])[forest.rows]
    reads = first | (np.append(forest.nearest(reading), NOTHING)[at] >= 0)
    return _phases(np.where(reads, PREFILL, DECODE), forest.start_ns[at], end, said)


def _by_selection(events: Events, forest: Forest) -> Phases | None:
    """Steps end where a token is selected, if what lies between two selections is the same again and again.

    Only what begins unlike the rest is called a prefill, and only behind one a decode step: where every iteration is
    the same, it may as well be an evaluation. What is trained is no generation.
    """
    if any(name.startswith(TRAINING) for name in events.names):
        return None
    top = np.flatnonzero((events.kind[forest.rows] == Kind.OPERATOR) & ~_inside_operators(events, forest))
    lane, name = forest.lane[top], events.name[forest.rows[top]]
    selects = np.isin(name, [i for i, one in enumerate(events.names) if one in SELECTIONS])
    if selects.sum() < 3:
        return None
    main = int(np.bincount(lane[selects]).argmax())
    top, name, selects = top[lane == main], name[lane == main], selects[lane == main]
    at = np.flatnonzero(selects)
    between = [name[one + 1 : other + 1].tobytes() for one, other in pairwise(at.tolist())]
    usual, times = Counter(between).most_common(1)[0]
    embedding = [i for i, one in enumerate(events.names) if one == EMBEDDING]
    if times < 2 or 2 * times < len(between) or not np.isin(np.frombuffer(usual, name.dtype), embedding).any():
        return None
    end = _end(forest)[top[at]]
    before = name[: at[0] + 1].tobytes()
    # What precedes a first iteration like all others is a prefill's only if it computes: an encoder, say.
    ahead = name[: at[0] + 1][: -len(usual) // name.itemsize] if before.endswith(usual) else None
    computes = ahead is not None and any(events.names[one].startswith(COMPUTING) for one in ahead.tolist())
    same = usual.endswith(before) or (ahead is not None and not computes)
    whole = not same and bool(np.isin(name[: at[0] + 1], embedding).any())
    phase = np.where([one == usual for one in between], DECODE, NOTHING)
    phase = np.append(PREFILL, phase) if whole else np.full(len(end), NOTHING)
    start = np.append(forest.start_ns[top[0]], end[:-1])
    said = f"steps: from one selection of a token to the next; the same operators {times} times of {len(between)}"
    return _phases(phase, start, end, said if whole else f"{said}; no prefill was seen, so what they do is open")


def _by_profiler_step(events: Events, forest: Forest) -> Phases | None:
    """Steps are those that the program told the profiler; what they do is open."""
    tells = events.named([name.startswith("ProfilerStep#") for name in events.names])[forest.rows]
    at = np.flatnonzero(tells & (events.kind[forest.rows] == Kind.ANNOTATION))
    if not len(at):
        return None
    labels = [events.names[one] for one in events.name[forest.rows[at]].tolist()]
    return _steps(
        forest, at, np.full(len(at), NOTHING), labels, "steps: ProfilerStep; nothing tells prefill from decode"
    )


def _inside(forest: Forest, wanted: np.ndarray) -> np.ndarray:
    """Return which positions lie inside one where `wanted` holds, themselves left out."""
    return np.append(forest.nearest(wanted), NOTHING)[forest.parent] >= 0


def _inside_operators(events: Events, forest: Forest) -> np.ndarray:
    return _inside(forest, events.kind[forest.rows] == Kind.OPERATOR)


def _end(forest: Forest) -> np.ndarray:
    return forest.start_ns + forest.duration_ns


def _steps(forest: Forest, at: np.ndarray, phase: np.ndarray, labels: list[str], evidence: str) -> Phases:
    order = np.argsort(forest.start_ns[at], kind="stable")
    at, phase, labels = at[order], phase[order], [labels[one] for one in order.tolist()]
    return Phases(NAMES, phase, labels, forest.start_ns[at], _end(forest)[at], evidence)


def _phases(phase: np.ndarray, start_ns: np.ndarray, end_ns: np.ndarray, evidence: str) -> Phases:
    labels = [f"{NAMES[one] if one >= 0 else 'step'} {number}" for number, one in enumerate(phase.tolist())]
    return Phases(NAMES, phase, labels, start_ns, end_ns, evidence)
