"""The plain definitions of what a trace says, written to be read, not to be fast."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

DEVICE = {"kernel", "gpu_memcpy", "gpu_memset", "Kernel", "Memcpy", "Memset"}
CALLS = {"cuda_runtime", "cuda_driver", "Runtime"}
OPERATORS = {"cpu_op", "Operator"}
HOST = {*CALLS, *OPERATORS, "user_annotation", "python_function"}


@dataclass
class Plain:
    """A trace as Python objects; times are integer nanoseconds."""

    events: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Plain:
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        events = json.loads(text, parse_float=Decimal)["traceEvents"]
        complete = [one for one in events if one.get("ph") == "X"]
        for one in complete:
            one["start"], one["length"] = int(one["ts"] * 1000), int(one["dur"] * 1000)
            one["end"] = one["start"] + one["length"]
        return cls(complete)

    def of(self, categories: set[str]) -> list[dict[str, Any]]:
        return [one for one in self.events if one.get("cat") in categories]

    def kernels_by_name(self) -> dict[str, tuple[int, int]]:
        """Count and total time of device events by name."""
        count: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for one in self.of(DEVICE):
            count[one["name"]] += 1
            total[one["name"]] += one["length"]
        return {name: (count[name], total[name]) for name in count}

    def busy(self) -> dict[str, int]:
        """The union of device events on each device: intervals merged one after the other."""
        result: dict[str, int] = {}
        for device in {str(one["args"]["device"]) for one in self.of(DEVICE)}:
            mine = [(one["start"], one["end"]) for one in self.of(DEVICE) if str(one["args"]["device"]) == device]
            merged: list[list[int]] = []
            for start, end in sorted(mine):
                if merged and start <= merged[-1][1]:
                    merged[-1][1] = max(merged[-1][1], end)
                else:
                    merged.append([start, end])
            result[device] = sum(end - start for start, end in merged)
        return result

    def stacks(self) -> dict[int, list[dict[str, Any]]]:
        """For each host event (by id) the events around it on its thread, outermost first, itself last.

        Going through a thread in order of time, an event that has ended is no longer around what follows.
        """
        threads: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
        for one in self.of(HOST):
            threads.setdefault((one["pid"], one["tid"]), []).append(one)
        result = {}
        for events in threads.values():
            around: list[dict[str, Any]] = []
            for one in sorted(events, key=lambda one: (one["start"], -one["length"])):
                while around and around[-1]["end"] <= one["start"]:
                    around.pop()
                around.append(one)
                result[id(one)] = list(around)
        return result

    def launches(self) -> dict[int, dict[str, Any]]:
        """The launch of each device event (by id): the runtime call of the same correlation, the first of several."""
        calls: dict[int, dict[str, Any]] = {}
        for one in self.of(CALLS):
            number = one["args"].get("correlation", 0)
            if number > 0 and (number not in calls or one["start"] < calls[number]["start"]):
                calls[number] = one
        device = self.of(DEVICE)
        return {id(one): calls[one["args"]["correlation"]] for one in device if one["args"]["correlation"] in calls}

    def owners(self) -> list[tuple[str, int, str, str]]:
        """Of each device event its name, start, module chain and innermost operator by its own thread, "" for none."""
        stacks, launches = self.stacks(), self.launches()
        result = []
        for one in self.of(DEVICE):
            around = stacks[id(launches[id(one)])] if id(one) in launches else []
            names = [host["name"] for host in around]
            modules = [name.removeprefix("nn.Module: ") for name in names if name.startswith("nn.Module: ")]
            operators = ["", *(host["name"] for host in around if host["cat"] in OPERATORS)]
            result.append((one["name"], one["start"], ".".join(modules), operators[-1]))
        return sorted(result)

    def self_times(self) -> Counter[str]:
        """The own time of operators, annotations and runtime calls by name, Python frames left out of the nesting."""
        kept = Plain([one for one in self.events if one.get("cat") in HOST - {"python_function"}])
        own: Counter[str] = Counter()
        for stack in kept.stacks().values():
            one = stack[-1]
            own[one["name"]] += one["length"]
            if len(stack) > 1:
                own[stack[-2]["name"]] -= min(one["end"], stack[-2]["end"]) - one["start"]
        return own
