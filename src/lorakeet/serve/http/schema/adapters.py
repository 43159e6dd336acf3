"""Bodies of the routes that load and unload adapters."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from lorakeet.serve.http.schema.fields import Body, Name, Refused, wrong


class LoadBody(Body):
    """Adapter to load: a folder of the server's own, or a repository of the hub, under a name."""

    name: Name
    folder: Name | None = None
    hub: Name | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if self.folder is not None and self.hub is not None:
            raise wrong("folder and hub exclude each other")
        return self


class LoadLoraBody(Body):
    """Body of ``/v1/load_lora_adapter``, in vLLM's words; the path is the name of a folder."""

    lora_name: Name
    lora_path: Name
    load_inplace: bool | None = None
    base_model_name: Refused = None


class UnloadLoraBody(Body):
    """Body of ``/v1/unload_lora_adapter``, in vLLM's words."""

    lora_name: Name
    lora_int_id: Literal[None] = None
