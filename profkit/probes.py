"""Probes: wrappers around a model's methods that write the marks of a run, and come off without a trace.

A probe replaces a bound method, `forward` among others, in the instance's dictionary. Forward hooks would
do too, but send each call through a slower path of torch (1.6 us a module against 0.1 us, and 7 %
against 1 % of a dispatch-bound run), and they are skipped on Ctrl-C, where a `finally` is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from profkit.anatomy import Anatomy
from profkit.encodings import TOWERS, Encodings
from profkit.environment import runs_on
from profkit.errors import InputError
from profkit.ledger import Ledger, Scope
from profkit.plan import COMPILED_CALL, GRANULARITIES, Granularity, Place, places
from profkit.wrapping import Wrappers

Method = Callable[..., Any]
Marker = Callable[[int], int]
MarkerWrapper = Callable[[Marker], Marker]

FORWARDS = ("forward", "_compiled_call_impl")
TOKEN_INPUTS = ("inputs_embeds", "input_ids", "hidden_states")


class Clock(Protocol):
    """What is read at each mark, beside the host's clock: device events, or what else a pass is for."""

    @property
    def is_spread(self) -> bool:
        """Whether it matters on which device a module runs."""

    def restart(self) -> None:
        """Begin a new run."""

    def recorder(self, device: torch.device | None = None) -> Callable[[], int]:
        """Return a function that reads it for a mark and returns the reading's number."""


@dataclass(frozen=True)
class Call:
    """One call of generate() as seen from outside: the prompt (token ids or embeddings) and what it returned."""

    prompt: torch.Tensor | None
    tokens: torch.Tensor | None

    @property
    def prompt_tokens(self) -> int:
        """The prompt's length, 0 if the inputs do not tell."""
        return 0 if self.prompt is None else int(self.prompt.shape[1])

    @property
    def batch(self) -> int:
        """The number of sequences returned, else of those given."""
        known = self.tokens if self.tokens is not None else self.prompt
        return 1 if known is None else int(known.shape[0])

    def new_tokens(self) -> int | None:
        """Return how many tokens were appended to the prompt, None unless what was returned begins with it.

        Some models return the new tokens alone. Compares on the device: not for hot paths.
        """
        if self.tokens is None or self.prompt is None or self.prompt.is_floating_point():
            return None
        prompt, returned = self.prompt[0], self.tokens[0]
        if len(returned) < len(prompt) or not torch.equal(returned[: len(prompt)], prompt.to(returned.device)):
            return None
        return len(returned) - len(prompt)


class Instrument:
    """A context that probes a model's methods and writes marks to a ledger.

    An error inside the instrument is kept in `ledger.faults`; generate() goes on. On leaving the
    context every probe is removed, whatever happened inside. `clock` adds a device event to every mark.
    `wrap_marker` and `on_iteration` are for the profiled pass: the one goes around the ledger's marker, the
    other is called as each step begins. `known` are the places to probe, if plan.places() was asked before.
    `on_output` gets the arguments and the output of each pass of the decoder.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        ledger: Ledger,
        granularity: Granularity = "layer",
        clock: Clock | None = None,
        wrap_marker: MarkerWrapper | None = None,
        on_iteration: Callable[[int], None] | None = None,
        known: Sequence[Place] | None = None,
        on_output: Callable[[Mapping[str, Any], Any], None] | None = None,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise InputError(f"Unknown granularity {granularity!r}: choose one of {', '.join(GRANULARITIES)}.")
        self.calls: list[Call] = []
        self.anatomy = anatomy
        self.ledger = ledger
        self.encodings = Encodings()
        self._model = model
        self._granularity = granularity
        self._clock = clock
        self._wrap_marker = wrap_marker or (lambda marker: marker)
        self._markers: dict[torch.device | None, Marker] = {}
        self._on_iteration, self._on_output = on_iteration, on_output
        self._places = known
        self._passes = self._iterations = 0
        self._entry, self._methods, self._forwards = Wrappers(), Wrappers(), Wrappers()

    def __enter__(self) -> Instrument:
        if self._clock:
            self._clock.restart()
        try:
            self._attach(self._entry, self._model, "generate", Scope("generate()", "generate"))
            self._entry.active = True
            self._attach_parts()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def replan(self, anatomy: Anatomy) -> None:
        """Probe the parts of another anatomy from now on; the probe of generate() itself stays where it is."""
        self._remove_parts()
        self.anatomy = anatomy
        self._places = None
        self._attach_parts()

    def remove(self) -> None:
        """Take off every probe that this instrument put on, and nothing else."""
        self._remove_parts()
        self._entry.remove()

    def _remove_parts(self) -> None:
        self._forwards.remove()
        self._methods.remove()

    def _attach_parts(self) -> None:
        if self._places is None:
            self._places = places(self._model, self.anatomy, self._granularity)
        self._methods, self._forwards = Wrappers(), Wrappers()
        for module, name, scope in self._places:
            self._attach(self._forwards if name in FORWARDS else self._methods, module, name, scope)
        self._methods.active = self._forwards.active = True

    def _attach(self, wrappers: Wrappers, module: nn.Module, name: str, scope: Scope) -> None:
        make = {"decoder": self._decoder_probe, "generate": self._generate_probe, "prepare": self._prepare_probe}
        make[scope.kind] = self._compiled_probe if name == COMPILED_CALL else make.get(scope.kind, self._plain_probe)
        bound, code = getattr(module, name), self.ledger.scopes.number(scope)
        probe = self._tower_probe if scope.stage in TOWERS else make.get(scope.kind, self._plain_probe)
        wrappers.put(module, name, probe(bound, code, self._marker_of(module), wrappers))

    def _marker_of(self, module: nn.Module) -> Marker:
        """Return the marker whose events are recorded where a module runs."""
        device = None
        if self._clock and self._clock.is_spread:
            device = next((found for one in module.modules() if (found := runs_on(one)) is not None), None)
        if device not in self._markers:
            record = self._clock.recorder(device) if self._clock else None
            self._markers[device] = self._wrap_marker(self.ledger.marker(record))
        return self._markers[device]

    # generate() inspects the signatures of methods that it calls: functools.wraps() keeps them.

    def _plain_probe(self, bound: Method, code: int, mark: Marker, wrappers: Wrappers) -> Method:
        @functools.wraps(bound)
        def probe(*args: Any, **kwargs: Any) -> Any:
            if not wrappers.active or is_dynamo_compiling():
                return bound(*args, **kwargs)
            mark(code)
            try:
                return bound(*args, **kwargs)
            finally:
                mark(-code)

        return probe

    def _tower_probe(self, bound: Method, code: int, mark: Marker, wrappers: Wrappers) -> Method:
        """What a tower is given is kept, to be compared later."""

        @functools.wraps(bound)
        def probe(*args: Any, **kwargs: Any) -> Any:
            if not wrappers.active or is_dynamo_compiling():
                return bound(*args, **kwargs)
            index = mark(code)
            try:
                self._note(index, lambda: self.encodings.add(args, kwargs))
                return bound(*args, **kwargs)
            finally:
                mark(-code)

        return probe

    def _prepare_probe(self, bound: Method, code: int, mark: Marker, wrappers: Wrappers) -> Method:
        """Input preparation begins an iteration."""
        plain = self._plain_probe(bound, code, mark, wrappers)

        @functools.wraps(bound)
        def probe(*args: Any, **kwargs: Any) -> Any:
            if wrappers.active:
                self._begin_iteration()
            return plain(*args, **kwargs)

        return probe

    def _decoder_probe(self, bound: Method, code: int, mark: Marker, wrappers: Wrappers) -> Method:
        """A pass of the decoder stack is a step; how many tokens it is given is noted."""

        @functools.wraps(bound)
        def probe(*args: Any, **kwargs: Any) -> Any:
            if not wrappers.active or is_dynamo_compiling():
                return bound(*args, **kwargs)
            self._begin_iteration()
            self._passes += 1
            index = mark(code)
            try:
                self._note(index, lambda: sequence_length(args, kwargs))
                output = bound(*args, **kwargs)
                if self._on_output is not None:
                    self._on_output(kwargs, output)
                return output
            finally:
                mark(-code)

        return probe

    def _compiled_probe(self, bound: Method, code: int, mark: Marker, wrappers: Wrappers) -> Method:
        """What generate() compiled for its decode steps is a step from outside; inside it runs as without probes.

        A probe inside would be traced away, and make torch compile the whole again: so they come off before the first
        such step, until the next generate().
        """

        @functools.wraps(bound)
        def probe(*args: Any, **kwargs: Any) -> Any:
            compiled = bound(*args, **kwargs)
            whole = self._decoder_probe(compiled, code, mark, wrappers)

            def step(*args: Any, **kwargs: Any) -> Any:
                self._forwards.remove()
                return whole(*args, **kwargs)

            return step if wrappers.active and not _is_own_call(compiled) else compiled

        return probe

    def _generate_probe(self, bound: Method, code: int, mark: Marker, wrappers: Wrappers) -> Method:
        """A call of generate(): its prompt's length is noted, its sizes and tokens are kept."""

        @functools.wraps(bound)
        def probe(*args: Any, **kwargs: Any) -> Any:
            if not wrappers.active:
                return bound(*args, **kwargs)
            output, other = None, Wrappers()
            if self._methods.active and not self._forwards.active:
                # A compiled step of the last generate() took them off.
                self._remove_parts()
                self._attach_parts()
            index = mark(code)
            try:
                self._note(index, lambda: self._tokens_to_read(args, kwargs))
                self._keep_given(args, kwargs)
                self._watch_assistant(other, kwargs.get("assistant_model"))
                output = bound(*args, **kwargs)
                return output
            finally:
                other.remove()
                mark(-code)
                self._keep_call(args, kwargs, output)

        return probe

    def _tokens_to_read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            # The prompt is the encoder's; the decoder begins with a token, or what it is given.
            begin = kwargs.get("decoder_input_ids")
            return int(begin.shape[1]) if isinstance(begin, torch.Tensor) else 1
        return tokens_to_read(args, kwargs)

    def _watch_assistant(self, wrappers: Wrappers, assistant: Any) -> None:
        """Assisted decoding runs another model inside generate(): its time is `other`, with a row of its own."""
        if isinstance(assistant, nn.Module):
            try:
                self._attach(wrappers, assistant, "forward", Scope("assistant_model", "module", "other"))
                wrappers.active = True
            except Exception as error:
                self.ledger.fault(error, "assistant model")

    def _note(self, index: int, number: Callable[[], int]) -> None:
        try:
            self.ledger.note(index, number())
        except Exception as error:
            self.ledger.fault(error, "note of a mark")

    def _keep_given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        try:
            self.encodings.note_given(args, kwargs)
        except Exception as error:
            self.ledger.fault(error, "arguments of generate()")

    def _begin_iteration(self) -> None:
        """Tell the profiler's window that step number `_passes` begins, once a step."""
        if self._on_iteration is None or self._passes < self._iterations:
            return
        self._iterations = self._passes + 1
        try:
            self._on_iteration(self._passes)
        except Exception as error:
            self.ledger.fault(error, "profiler window")

    def _keep_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        try:
            self.calls.append(Call(prompt_of(args, kwargs), sequences(output)))
        except Exception as error:
            self.ledger.fault(error, "outputs of generate()")


def _is_own_call(compiled: Any) -> bool:
    """Tell whether get_compiled_call() gave the model's own call, as it does for models that it never compiles."""
    return getattr(compiled, "__func__", None) is nn.Module.__call__


def sequence_length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return how many tokens a decoder pass is given, -1 if its inputs do not tell."""
    candidates = [kwargs.get(name) for name in TOKEN_INPUTS] + list(args[:1])
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return int(value.shape[1])
    return -1


def prompt_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the prompt given to generate(): embeddings [batch, tokens, width] or ids [batch, tokens].

    The attention mask stands for a prompt of which it alone is known; None if there is none of them.
    """
    named = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs", "attention_mask")]
    for value in [*named, *args[:1]]:
        if isinstance(value, torch.Tensor) and value.dim() == (3 if value.is_floating_point() else 2):
            return value.detach()
    return None


def tokens_to_read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return how many tokens of the prompt the decoder has yet to read: those not in a cache that is given."""
    cache: Any = kwargs.get("past_key_values")
    cached = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    return max(Call(prompt_of(args, kwargs), None).prompt_tokens - cached, 0)


def sequences(output: Any) -> torch.Tensor | None:
    """Return the token ids in what generate() returned."""
    found = getattr(output, "sequences", output)
    return found.detach() if isinstance(found, torch.Tensor) else None
