"""Routes that list, load and unload adapters; ``/v1/load_lora_adapter`` and its sibling are vLLM's names for two of them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from lorakeet.errors import LorakeetError, UnknownAdapter
from lorakeet.security.paths import is_hub_id, is_plain_name
from lorakeet.serve.engine.residents import Resident
from lorakeet.serve.http.body import JsonRoute
from lorakeet.serve.http.errors import ApiError, bad_request, from_lorakeet
from lorakeet.serve.http.schema.adapters import LoadBody, LoadLoraBody, UnloadLoraBody
from lorakeet.serve.http.service import Served, Service, service_of

router = APIRouter(route_class=JsonRoute)


def only_admins(request: Request, service: Annotated[Service, Depends(service_of)]) -> None:
    """Refuse callers without the key of an admin.

    Raises:
        ApiError: The caller is no admin, or the server has none.
    """
    if not service.keys.is_admin(request.headers.get("authorization")):
        why = (
            "this needs the key of an admin" if service.keys.admins else "this server was started without an admin key"
        )
        raise ApiError(403, why, code="admin_only")


_ADMINS = [Depends(only_admins)]


@router.get("/v1/adapters")
async def list_adapters(service: Served) -> dict[str, Any]:
    """List the adapters that answer now."""
    return {"object": "list", "data": [describe(one) for one in service.engine.residents.list()]}


@router.post("/v1/adapters", dependencies=_ADMINS)
async def load_adapter(body: LoadBody, service: Served) -> dict[str, Any]:
    """Load an adapter under a name, in place of the one that has it."""
    return describe(await run_in_threadpool(_load, service, body.name, body.folder, body.hub))


@router.delete("/v1/adapters/{name}", dependencies=_ADMINS)
async def unload_adapter(name: str, service: Served) -> dict[str, Any]:
    """Unload an adapter; requests under way are answered."""
    await run_in_threadpool(_unload, service, name)
    return {"object": "adapter", "name": name, "deleted": True}


@router.post("/v1/load_lora_adapter", dependencies=_ADMINS)
async def load_lora_adapter(body: LoadLoraBody, service: Served) -> Response:
    """Load an adapter, in vLLM's words."""
    served = [one.name for one in service.engine.residents.list()]
    if body.lora_name in served and not body.load_inplace:
        raise bad_request(f"{body.lora_name!r} is loaded already; load_inplace replaces it", "lora_name")
    await run_in_threadpool(_load, service, body.lora_name, body.lora_path, None)
    return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")


@router.post("/v1/unload_lora_adapter", dependencies=_ADMINS)
async def unload_lora_adapter(body: UnloadLoraBody, service: Served) -> Response:
    """Unload an adapter, in vLLM's words."""
    await run_in_threadpool(_unload, service, body.lora_name)
    return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")


def describe(resident: Resident) -> dict[str, Any]:
    """Return what callers may know of an adapter; the path that it came from is not part of it."""
    return {
        "object": "adapter",
        "name": resident.name,
        "version": resident.version,
        "digest": resident.digest,
        "rank": resident.rank,
        "bytes": resident.bytes,
    }


def _load(service: Service, name: str, folder: str | None, hub: str | None) -> Resident:
    """Load an adapter from the server's folder, or from the hub if the owner allows it.

    Raises:
        ApiError: A name is a path, the base has the name, or the adapter is refused.
    """
    for field, given in (("name", name), ("folder", folder)):
        if given is not None and not is_plain_name(given):
            raise bad_request("expected the name of a folder among the server's adapters, no path", field)
    if name == service.base_name:
        raise bad_request("the base has this name", "name")
    if hub is not None and not (service.allow_hub and is_hub_id(hub) and "/" in hub):
        raise ApiError(403, "this server loads this adapter from no hub", param="hub", code="hub_not_allowed")
    try:
        resident = service.engine.residents.load(name, hub or folder)
        service.tokenizers.of(name)  # read now, before its files can change
        return resident
    except LorakeetError as error:
        raise from_lorakeet(error, "name") from None


def _unload(service: Service, name: str) -> None:
    try:
        service.engine.residents.unload(name)
    except UnknownAdapter as error:
        raise ApiError(404, error.message, param="name", code="adapter_not_found") from None
