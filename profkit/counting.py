"""Counting work: a mode of torch's dispatcher that adds up, operator by operator, what a generate() has to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from profkit import fakes, formulas
from profkit.errors import MeasurementError
from profkit.ledger import Scope
from profkit.work import QUANTITIES

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
ROWS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default}
"""Operators that read, of their first argument, only what they return."""
DEVICE = torch.ops.prim.device
IGNORED = {
    DEVICE,
    aten.sym_size,
    aten.sym_stride,
    aten.sym_numel,
    aten.sym_storage_offset,
    aten.size,
    aten.stride,
    aten.dim,
}
"""Questions about a tensor, which move nothing of it."""
PARTS = ("vision", "audio", "projector", "embed", "head")
FLOPS, WEIGHTS, CACHE_READ, CACHE_WRITTEN, ACTIVATIONS, MOVED, OPERATORS = range(len(QUANTITIES))
FOREIGN = -1
"""The kind of a storage that the counted model must not touch."""


@dataclass
class Tally:
    """What all calls of one operator did: FLOPs by its formula (None: it has none), bytes in and out."""

    formula: Callable[..., int] | None
    calls: int = 0
    flops: int = 0
    operator_bytes: int = 0


@dataclass(frozen=True)
class Operator:
    """What is known of an operator before it runs: see Counter._look_up()."""

    name: str
    tally: Tally
    decomposes: bool
    is_view: bool
    reads_rows: bool
    joins: bool
    groups: bool
    written: tuple[int, ...]


@dataclass
class Memory:
    """A storage: what it holds, which part of the model made it, and what of it was used in the current step."""

    kind: int
    """WEIGHTS, CACHE_READ or ACTIVATIONS: what reading it counts as; or FOREIGN."""
    size: int
    alive: StorageWeakRef
    """As long as this is kept, no other storage can have the address."""
    maker: str = ""
    step: int = -1
    counted: int = 0
    views: set[tuple[int, ...]] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)

    def begin(self, step: int) -> None:
        """Forget what earlier steps used."""
        if self.step != step:
            self.step, self.counted = step, 0
            self.views.clear()
            self.readers.clear()


class Counter(TorchDispatchMode):
    """Counts, while it is active, QUANTITIES of the operators of this thread; `tick()` takes the sums as they stand.

    `original` is the model of which `model` is a copy: an operator that meets its weights raises MeasurementError.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, original: nn.Module | None = None) -> None:
        super().__init__()
        self.ticks: list[list[int]] = []
        self.operators: dict[str, Tally] = {}
        self.packed: set[str] = set()
        """Operators that were given weights packed into an object, whose bytes nothing tells."""
        self._sums = [0] * len(QUANTITIES)
        self._known: dict[Any, Operator] = {}
        self._formulas = formulas.known()
        self._memory: dict[int, Memory] = {}
        self._part, self._step, self._has_cache = [""], 0, False
        # The model itself comes last: what it shares with the original is its own.
        for owner, kind in ((original, FOREIGN), (model, WEIGHTS)):
            for one in _kept_by(owner) if owner is not None else ():
                for memory in self._memory_of(one):
                    memory.kind = kind

    def tick(self) -> int:
        """Keep the sums as they stand and return their number: a clock whose time is work."""
        self.ticks.append(self._sums.copy())
        return len(self.ticks) - 1

    def begin_step(self, _: int) -> None:
        """Begin a step, in which everything must be read again; forget what is gone."""
        self._step += 1
        self._memory = {key: one for key, one in self._memory.items() if not one.alive.expired()}

    def following(self, scopes: Sequence[Scope]) -> Callable[[Callable[[int], int]], Callable[[int], int]]:
        """Return a wrapper of a ledger's marker that follows which part of the model runs."""

        def wrap(mark: Callable[[int], int]) -> Callable[[int], int]:
            def marked(code: int) -> int:
                index = mark(code)
                if code > 0:
                    self._part.append(_part_of(scopes[code]) or self._part[-1])
                elif len(self._part) > 1:
                    self._part.pop()
                return index

            return marked

        return wrap

    def hold_cache(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take in a cache that is given filled: what it holds was written before, and is read."""
        for memory in [memory for one in tensors for memory in self._memory_of(one)]:
            memory.kind, self._has_cache = CACHE_READ, True

    def note_cache(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take in what the cache holds as a pass of the decoder ends; a first one was written as a whole."""
        for memory in self._memory.values():
            if memory.kind == CACHE_READ:
                memory.kind = ACTIVATIONS
        held = [memory for one in tensors for memory in self._memory_of(one)]
        if not self._has_cache:
            self._sums[CACHE_WRITTEN] += sum({id(one): one.size for one in held}.values())
        for memory in held:
            memory.kind = CACHE_READ
        self._has_cache = bool(held)

    def _memory_of(self, tensor: torch.Tensor) -> list[Memory]:
        """Return the storage behind a tensor; nothing for one without (sparse, wrapped)."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return []
        found = self._memory.get(storage._cdata)
        if found is None:
            found = Memory(ACTIVATIONS, storage.nbytes(), StorageWeakRef(storage))
            self._memory[storage._cdata] = found
        return [found]

    # -- each operator ---------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._known.get(func) or self._look_up(func)
        if known.decomposes:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        ready = fakes.substitute(func, args, kwargs)
        result = ready if isinstance(ready, torch.Tensor) else func(*ready, **kwargs)
        # The transpose of a wrapped weight may be a new tensor, for which it was read.
        if not known.is_view or (args and is_wrapped(args[0]) and not is_wrapped(result)):
            self._count(known, args, kwargs, result)
        return result

    def _look_up(self, func: Any) -> Operator:
        packet, schema = getattr(func, "_overloadpacket", func), getattr(func, "_schema", None)
        formula = self._formulas.get(packet)
        name = schema.name if schema is not None else func.name()
        arguments = enumerate(schema.arguments if schema is not None else ())
        composite = formula is None and schema is not None and packet is not DEVICE
        composite = composite and (COMPOSITE in func.py_kernels or func.has_kernel_for_dispatch_key(COMPOSITE))
        found = self._known[func] = Operator(
            name,
            self.operators.setdefault(name, Tally(formula)),
            composite,
            packet in IGNORED or bool(getattr(func, "is_view", False)),
            func in ROWS,
            packet is aten.cat,
            name == "aten::_grouped_mm",
            tuple(number for number, one in arguments if one.alias_info is not None and one.alias_info.is_write),
        )
        return found

    def _count(self, known: Operator, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        tally, sums = known.tally, self._sums
        tally.calls += 1
        if tally.formula is not None:
            flops = int(tally.formula(*args, **kwargs, out_val=result))
            tally.flops += flops
            sums[FLOPS] += flops
        made = _tensors_in(result)
        made_bytes = moved = sum(one.nbytes for one in made)
        grown = held = 0
        reordered = False
        for place, value in enumerate((*args, *kwargs.values())):
            if isinstance(value, torch.ScriptObject):
                self.packed.add(known.name)
            for tensor in _tensors_in(value):
                rows, written = known.reads_rows and place == 0, place in known.written
                size = made_bytes if rows else tensor.nbytes
                if known.groups and place == 1 and tensor.dim() == 3:
                    # Of the experts, at most as many as there are rows: which ones, data decide.
                    size = size // tensor.shape[0] * min(tensor.shape[0], args[0].shape[0])
                moved += size
                for memory in self._memory_of(tensor):
                    if memory.kind == FOREIGN:
                        raise MeasurementError(
                            "a function that was put over a method of the model runs the model itself, not its copy"
                        )
                    if rows and memory.kind == CACHE_READ:
                        # Beams are put in another order: it stays what it is, and a cache that is paged need not move.
                        reordered = True
                        continue
                    if memory.kind == CACHE_READ:
                        held += size
                    elif tensor.is_floating_point() and not written:
                        grown = max(grown, size)
                    if not written:
                        self._read(memory, tensor, size, rows)
        if held and (known.joins or known.written):
            sums[CACHE_WRITTEN] += grown
        for tensor in made:
            for memory in self._memory_of(tensor):
                memory.maker = self._part[-1]
                memory.kind = CACHE_READ if reordered else memory.kind
        tally.operator_bytes += moved
        sums[MOVED] += moved
        sums[OPERATORS] += 1

    def _read(self, memory: Memory, tensor: torch.Tensor, size: int, rows: bool) -> None:
        """Count what must be brought to this step, or to this part of the model, for a tensor to be read."""
        memory.begin(self._step)
        if memory.kind == ACTIVATIONS:
            part = self._part[-1]
            if memory.maker != part and part not in memory.readers:
                self._sums[ACTIVATIONS] += size if memory.readers else 2 * size
                memory.readers.add(part)
            return
        if not rows:
            # A matrix and its transpose are one.
            view = (int(tensor.storage_offset()), *sorted(map(int, tensor.shape)))
            if view in memory.views:
                return
            memory.views.add(view)
        more = min(size, memory.size - memory.counted)
        memory.counted += more
        self._sums[memory.kind] += more


def _kept_by(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield a model's parameters, buffers, and the tensors that its modules keep as plain attributes."""
    attributes = (one for module in model.modules() for one in vars(module).values() if isinstance(one, torch.Tensor))
    for one in (*model.parameters(), *model.buffers(), *attributes):
        yield from plain_tensors(one)


def is_wrapped(value: Any) -> bool:
    """Tell whether a value is a wrapper of tensors, with no data of its own."""
    return bool(is_traceable_wrapper_subclass(value))


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a wrapper (of quantised weights, say) is made of; any other tensor alone."""
    if not is_wrapped(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in plain_tensors(getattr(tensor, name))]


def _part_of(scope: Scope) -> str:
    """Return the part of the model that a scope belongs to, "" for that of the scope around it."""
    if scope.kind in ("decoder", "stack") or scope.stage == "prefill":
        return "decoder"
    return scope.stage if scope.stage in PARTS else ""


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return plain_tensors(value)
    if isinstance(value, list | tuple):
        return [one for inner in value for one in _tensors_in(inner)]
    return []
