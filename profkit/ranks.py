"""Processes that share a list of samples, as torchrun starts them; one alone where it did not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from profkit.errors import InputError, ProfkitError
from profkit.options import rank_here

T = TypeVar("T")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
PATIENCE = timedelta(days=7)
"""A rank that is done waits for one that still measures; one that is gone is noticed by its closed connection."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of one torchrun; every method is called by all of them, in the same order."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def restarted(self) -> bool:
        """Whether torchrun started these processes again after one had failed."""
        return int(os.environ.get(RESTARTS, "0")) > 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that are this rank's to do."""
        return items[self.rank :: self.world]

    def first(self, decide: Callable[[], T]) -> T:
        """Let rank 0 decide, and return what it decided everywhere. Where it raises an error, all stop; it alone
        speaks."""
        if self.world == 1:
            return decide()
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [decide()]
            except ProfkitError as error:
                told = [error]
        dist.broadcast_object_list(told, src=0, group=self.group)
        if isinstance(told[0], ProfkitError):
            raise told[0] if self.rank == 0 else SystemExit(told[0].exit_status)
        return told[0]

    def gathered(self, value: T) -> list[T] | None:
        """Return on rank 0 the values of all ranks, None on the others. Raises LostRankError if one is gone."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        try:
            dist.gather_object(value, found, dst=0, group=self.group)
        except RuntimeError as error:
            raise LostRankError(" ".join(str(error).split())[:200]) from error
        return found


class LostRankError(ProfkitError):
    """A rank ended before the others."""

    exit_status = 1


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started beside this one; alone if it did not.

    What the ranks tell each other goes over gloo, on the host, so that no device waits for it.
    Raises InputError if they cannot meet.
    """
    if rank_here() is None:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())
    mine = not dist.is_initialized()
    try:
        if mine:
            # After a restart the store still holds the addresses of the processes before.
            store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            attempt = f"attempt {os.environ.get(RESTARTS, 0)}"
            store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"The ranks cannot meet: {said}; start them with torchrun.") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if mine:
            dist.destroy_process_group()
