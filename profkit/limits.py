"""Which ceilings a run is held against: its own, those kept on this machine, or those measured now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from profkit import ceilings
from profkit.ceilings import Ceilings
from profkit.errors import InputError

if TYPE_CHECKING:
    from profkit.roofline import Roofline
    from profkit.run import Run

Report = Callable[[str], object]


def of_device(name: str, again: bool, progress: Report) -> tuple[Ceilings, list[str]]:
    """Return the ceilings of a device of this machine, kept or measured now, and what a reader must know."""
    progress("importing torch")
    from profkit import environment, models, stress

    device = models.choose_device(name)
    path, notes = stress.file_of(device), []
    if not again:
        found, damage = ceilings.read(path)
        if found is not None and found.device_name == environment.device_name(device):
            return found, []
        if found is not None:
            damage = f"{path} holds the ceilings of {found.device_name}, so it is not used"
        notes = [damage] if damage else []
    found = stress.measured(device, progress)
    kept = ceilings.write(found, path)
    return found, [*notes, *([kept] if kept else [])]


def of_run(run: Run, again: bool, progress: Report) -> tuple[Ceilings, list[str]]:
    """Return the ceilings of the device of a run, and what a reader must know; a saved run keeps them.

    Raises InputError if they are not known and this machine has no such device.
    """
    if run.ceilings is not None and not again:
        return run.ceilings, []
    about = run.manifest
    versions = about.get("versions") or {}
    threads = int(about.get("threads") or 0)
    kept = ceilings.kept_for(str(about.get("device_name")), str(versions.get("torch")), threads, about.get("driver"))
    found, notes = (kept, []) if kept is not None and not again else _measured_for(about, threads, again, progress)
    notes = [*(one for one in run.unreadable if "ceilings.json" in one), *notes]
    if run.path is not None:
        said = ceilings.write(found, run.path / "ceilings.json")
        notes += [said] if said else []
    return found, notes


def _measured_for(about: dict[str, Any], threads: int, again: bool, progress: Report) -> tuple[Ceilings, list[str]]:
    progress("importing torch")
    import torch

    from profkit import environment, models

    device = models.choose_device("auto" if about.get("device") != "cpu" else "cpu")
    here = environment.device_name(device)
    if here != about.get("device_name"):
        raise InputError(
            f"The run was made on {about.get('device_name')} and this machine has {here}: run profkit roofline on the "
            "run there, and it keeps its ceilings."
        )
    torch.set_num_threads(threads or torch.get_num_threads())
    return of_device(str(device), again, progress)


def of_model(
    name: str, inputs: Sequence[str], options: dict[str, Any], again: bool, progress: Report
) -> tuple[Roofline, list[str]]:
    """Count a model's work without running it, and return its floors on a device of this machine."""
    from profkit import jobs, roofline

    found, notes = of_device(options["device"], again, progress)
    work, dtype = jobs.count(name, inputs, options, progress)
    return roofline.answers(work, found, dtype, media_tokens=work.about["media_tokens"]), notes
