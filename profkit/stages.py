"""The vocabulary of stages: what generate() spends its time on, in the order it is shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """One of the four stages of the classic split: load, preprocess, vision, language model."""

    number: int
    title: str


LOAD = Group(1, "Load")
PREPROCESS = Group(2, "Preprocess")
ENCODE = Group(3, "Vision encoding")
LLM = Group(4, "LLM")

GROUPS = (LOAD, PREPROCESS, ENCODE, LLM)


@dataclass(frozen=True)
class Stage:
    """A kind of work. Every instant of a run belongs to exactly one stage."""

    name: str
    group: Group
    meaning: str


STAGES = (
    Stage("load", LOAD, "reading and decoding the input files"),
    Stage("preprocess", PREPROCESS, "the processor: resize, normalise, tokenise"),
    Stage("transfer", PREPROCESS, "moving the inputs from host to device"),
    Stage("vision", ENCODE, "the vision tower"),
    Stage("audio", ENCODE, "the audio tower"),
    Stage("projector", ENCODE, "the connector between tower and language model"),
    Stage("merge", ENCODE, "feature packing, pooling and splicing outside modules"),
    Stage("setup", LLM, "generate()'s own preparation and the inputs of each step"),
    Stage("embed", LLM, "the token embedding"),
    Stage("prefill", LLM, "the decoder stack over the prompt"),
    Stage("decode", LLM, "the decoder stack, one pass for each further step"),
    Stage("head", LLM, "the language-model head"),
    Stage("select", LLM, "logits processing, sampling and stopping"),
    Stage("other", LLM, "the rest: what no scope explains"),
)

NAMES = tuple(stage.name for stage in STAGES)
INDEX = {name: number for number, name in enumerate(NAMES)}
BY_NAME = {stage.name: stage for stage in STAGES}

MEDIA = ("vision", "audio", "projector")
"""Stages whose output is spliced into the prompt: what follows them, before the decoder, is `merge`."""
