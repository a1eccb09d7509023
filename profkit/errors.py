"""What can go wrong, in few meanings, each with its exit status and a sentence that names the cure."""

from __future__ import annotations


class ProfkitError(Exception):
    """Base of every error profkit raises itself. The message is one sentence a user can act on."""

    exit_status = 2


class InputError(ProfkitError):
    """The user asked for something that cannot be done as written: a path, a name, an option."""


class AnatomyError(ProfkitError):
    """A model's parts cannot be found, or the model cannot be measured at all."""


class MeasurementError(ProfkitError):
    """The measurement was begun and failed: out of memory, an error inside generate(), a check."""

    exit_status = 1


class LedgerError(MeasurementError):
    """Times that must add up do not: never expected, never hidden."""


class InterruptedRunError(ProfkitError):
    """The user pressed Ctrl-C; what was measured until then is kept."""

    exit_status = 130
