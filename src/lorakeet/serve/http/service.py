"""The served model with everything that routes need: engine, names, limits, grammars, figures."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import Depends, Request

from lorakeet.errors import did_you_mean
from lorakeet.inference.generate import end_tokens
from lorakeet.loaded_model import LoadedModel
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.http.access.keys import Keys
from lorakeet.serve.http.errors import ApiError
from lorakeet.serve.http.grammar import Grammars
from lorakeet.serve.http.tokenizers import Tokenizers

#: Seconds after the start, and between two looks whether the engine is idle.
_AFTER_START, _BETWEEN_LOOKS = 1.0, 0.1


@dataclass(frozen=True)
class Limits:
    """Limits of the answers.

    Attributes:
        answer_tokens: Tokens of the longest answer; a request that asks for more is refused.
        timeout: Seconds that a request may take; a body may ask for fewer.
    """

    answer_tokens: int = 4096
    timeout: float = 600.0


@dataclass
class Service:
    """The served model.

    Attributes:
        engine: The engine, which runs.
        opened: The base with its tokenizer and task.
        base_name: Name that callers know the base by.
        keys: Keys of callers.
        limits: Limits of the answers.
        allow_hub: Whether an admin may load adapters from the hub.
        grammars: Maker of grammars for JSON schemas.
        tokenizers: Tokenizers of the adapters.
        started: Time of the start, in seconds since 1970.
    """

    engine: Engine
    opened: LoadedModel
    base_name: str
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    allow_hub: bool = False
    grammars: Grammars = field(init=False)
    tokenizers: Tokenizers = field(init=False)
    _own_grammars: WeakKeyDictionary[Any, Grammars] = field(init=False, repr=False)
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.tokenizers = Tokenizers(self.tokenizer, self.engine.residents)
        self.grammars = Grammars(self.tokenizer, sorted(self.engine.ends))
        self._own_grammars = WeakKeyDictionary()

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the base."""
        return self.opened.base.tokenizer

    @property
    def task(self) -> str:
        """Name of the task that the model was opened for."""
        return self.opened.task.name

    def adapter(self, model: str) -> str | None:
        """Return the adapter that a body's ``model`` names; None: the base.

        Raises:
            ApiError: Nothing of this name is served.
        """
        if model == self.base_name:
            return None
        names = [resident.name for resident in self.engine.residents.list()]
        if model in names:
            return model
        hint = did_you_mean(model, [self.base_name, *names]) or "GET /v1/models lists what is served"
        raise ApiError(404, f"no model {model!r} is served; {hint}", param="model", code="model_not_found")

    def system_turn(self, adapter: str | None) -> str | None:
        """Return the system turn that an adapter was taught with, for conversations that have none; None: it had none."""
        served = {resident.name: resident for resident in self.engine.residents.list()}
        return served[adapter].taught.chat.get("system") if adapter in served else None

    def grammars_of(self, adapter: str | None) -> Grammars:
        """Return the maker of grammars for the tokens of an adapter; None: of the base."""
        tokenizer = self.tokenizers.of(adapter)
        if tokenizer is self.tokenizer:
            return self.grammars
        if tokenizer not in self._own_grammars:
            ends = sorted(end_tokens(self.engine.model, tokenizer))
            is_same = tokenizer.get_vocab() == self.tokenizer.get_vocab() and ends == sorted(self.engine.ends)
            self._own_grammars[tokenizer] = self.grammars if is_same else Grammars(tokenizer, ends)
        return self._own_grammars[tokenizer]

    def prepare_grammars(self) -> None:
        """Let a thread take the tokenizer apart for grammars, once the engine runs and is idle.

        That holds up all threads for most of a second, so it is neither part of the start nor of a request. A request with a
        schema that comes before does it itself.
        """

        def wait() -> None:
            time.sleep(_AFTER_START)
            while self.engine.is_running and self.engine.is_busy:
                time.sleep(_BETWEEN_LOOKS)
            if self.engine.is_running:
                self.grammars.ready()

        if self.grammars.are_possible:
            threading.Thread(target=wait, name="lorakeet-grammars", daemon=True).start()

    def check_task(self, *tasks: str) -> None:
        """Check that the model has one of these tasks.

        Raises:
            ApiError: It has another.
        """
        if self.task not in tasks:
            raise ApiError(
                400,
                f"this server has a {self.task} model, and this route needs {' or '.join(tasks)}",
                param="model",
                code="wrong_task",
            )


def service_of(request: Request) -> Service:
    """Return the service of the app that a request came to."""
    service: Service = request.app.state.service
    return service


#: Parameter of a route: the service of its app.
Served = Annotated[Service, Depends(service_of)]
