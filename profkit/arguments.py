"""The arguments of generate(): fresh ones for each call, and those that decode greedily."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def fresh(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments for one more generate(): a cache given by the user would remember the last one."""
    return {key: copy.deepcopy(value) if key == "past_key_values" else value for key, value in kwargs.items()}


def samples(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether generate() draws its tokens, by its arguments and by the model's configuration."""
    return bool(_setting(model, kwargs, "do_sample"))


def greedy(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with which generate() takes the likeliest token: of several sequences all would be the same."""
    found = {**kwargs, "do_sample": False}
    if (_setting(model, kwargs, "num_return_sequences") or 1) > (_setting(model, kwargs, "num_beams") or 1):
        found["num_return_sequences"] = 1
    return found


def _setting(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return kwargs.get(name, getattr(settings, name, None))
