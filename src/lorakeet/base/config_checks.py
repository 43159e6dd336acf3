"""Checks of a model's configuration against its weights: what it asks for is what they have, and it names no code.

A model is built by its configuration before its weights are read. A wrong number there would fill the memory with random
weights, or build layers for hours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from lorakeet.base.quiet import quiet
from lorakeet.errors import BaseModelError
from lorakeet.security.shown import cut

#: Layers, blocks or experts of the largest model that is built without its weights.
MOST_PARTS = 4096
#: Numbers of a model that its weights may lack: a new head, tables that are computed.
_SLACK = 50_000_000
#: Weights that one number of a file may hold, where another tool has quantized and packed them.
_PACKED = 16
_COUNT = re.compile(r"(^|_)(layers?|blocks?|experts|depth)$|^(num|n)_(\w+_)?(layers?|blocks?|experts)")
_CODE = re.compile(r"_implementation$|^attn_implementation$")


class WeightFacts(NamedTuple):
    """Size of a model's weights, from the headers of its files.

    Attributes:
        tensors: Number of tensors.
        numbers: Number of values in all of them.
        longest: Largest dimension of any.
    """

    tensors: int
    numbers: int
    longest: int


def weight_facts(files: Iterable[Path]) -> WeightFacts:
    """Read the size of the weights in safetensors files from their headers."""
    tensors = numbers = longest = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                shape = file.get_slice(name).get_shape()
                count = 1
                for size in shape:
                    count *= size
                tensors, numbers, longest = tensors + 1, numbers + count, max(longest, *shape, 0)
    return WeightFacts(tensors, numbers, longest)


def config_problems(config: Mapping[str, Any], facts: WeightFacts | None = None, trust: bool = False) -> list[str]:
    """List what a ``config.json`` asks for that it must not: more parts than the weights can have, or code of the hub.

    Args:
        config: Its contents.
        facts: Size of the weights, if they are here.
        trust: Whether code that comes with models is trusted.
    """
    most = max(facts.tensors, facts.longest) if facts else MOST_PARTS
    where = "than the weights have tensors" if facts else f"expected at most {MOST_PARTS:,}"
    problems = []
    for name, value in _values(config):
        if isinstance(value, int) and _COUNT.search(name) and value > most:
            problems.append(f"config.json asks for {name} = {cut(str(value), 20)}, {'more ' if facts else ''}{where}")
        if isinstance(value, str) and "/" in value and _CODE.search(name) and not trust:
            problems.append(f"config.json asks for code of the hub ({name}: {value[:80]!r})")
    return problems


def _values(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the plain values at any depth with the key nearest above them."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _values(value)
            yield from ((str(key), inner) for inner in value.values() if isinstance(inner, str))
        elif isinstance(value, (int, str)) and not isinstance(value, bool):
            yield str(key), value


def check_size(config: PreTrainedConfig, facts: WeightFacts, name: str, auto_class: Any, **remote: bool) -> None:
    """Check that a model has no more numbers than its weights, before it is built in memory.

    Args:
        config: Of the model.
        facts: Size of its weights.
        name: Name of the model, for the message.
        auto_class: Class of `transformers` that will load it.
        **remote: The argument ``trust_remote_code``.

    Raises:
        BaseModelError: It has more, or cannot be built.
    """
    model = skeleton(config, name, auto_class, **remote)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    packed = _PACKED if getattr(config, "quantization_config", None) is not None else 2
    if wanted > packed * facts.numbers + _SLACK:
        raise BaseModelError(
            f"the config.json of {name} describes {wanted:.2e} parameters, its files have {facts.numbers:.2e}",
            "download its files again: the config belongs to another model",
        )


def skeleton(
    config: PreTrainedConfig, name: str, auto_class: Any, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Build the model of a configuration on the meta device, without memory for its weights.

    Args:
        config: Of the model.
        name: Name of the model, for the message.
        auto_class: Class of `transformers` that makes it.
        trust_remote_code: Whether that class may be one that comes with the model.
        **options: Further arguments, such as ``dtype``.

    Raises:
        BaseModelError: The configuration contradicts itself, or its architecture has no such class.
    """
    try:
        with quiet(), torch.device("meta"):
            concrete = isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel)
            build: Any = auto_class._from_config if concrete else auto_class.from_config
            remote = {} if concrete else {"trust_remote_code": trust_remote_code}
            model: PreTrainedModel = build(config, **remote, **options)
    except Exception as error:  # a wrong number raises whatever the model's code comes upon first
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BaseModelError(
            f"{name} cannot be built from its config.json: {type(error).__name__}: {reason}",
            "check its config.json, or update transformers",
        ) from error
    return model
