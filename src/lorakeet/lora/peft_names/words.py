"""Messages in PEFT's very words, which programs compare with those of an error."""

from __future__ import annotations

#: Message of a merge with an adapter that is broken; takes ``adapter``.
BROKEN = "NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
#: Message of a merge of adapters that are merged.
MERGED_ALREADY = "All adapters are already merged, nothing to do"
#: Message of a new adapter whose name is taken; takes ``adapter``.
TAKEN = "Adapter with name {adapter!r} already exists"
#: Message of two copies of one module that would act together.
ONE_COPY = "Only one adapter can be set at a time for ModulesToSaveWrapper"
#: Message of a container that is to be trained whole; takes ``kind``.
NO_CONTAINER = "modules_to_save cannot be applied to modules of type {kind}"
#: Message of a mixed batch with an adapter of bare parameters.
NO_ROWS = "lora.ParamWrapper does not support mixed adapter batches yet"
#: Message of a trained bias of B on a layer that has none; takes ``kind``.
NO_BIAS = "`lora_bias=True` was passed but the targeted layer of type {kind} has no bias"
#: Message of a merge with a trained bias of B on a layer that has none.
NO_BIAS_TO_MERGE = "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias"
#: Message of settings whose parameters are not in the model, and that name no layers.
NO_TARGET = (
    "No `target_modules` passed but also no `target_parameters` found. Please check the values for these arguments."
)
#: Message of a verb on an adapter that the model has not; takes ``adapter``.
UNKNOWN = "Adapter {adapter} does not exist"
#: Message of deleting an adapter that is merged; takes ``adapters``, a list of names.
DELETE_MERGED = "Cannot delete adapter(s) {adapters} while they are merged. Please unmerge them first."
#: Message of a swap between adapters whose settings differ; takes ``key``, ``one`` and ``other``.
INCOMPATIBLE = "Configs are incompatible: for {key}, {one} != {other}"
#: Message of a preparation for swaps on a model without adapters.
NO_ADAPTER = "No adapter layers found on the model, so there is nothing to prepare"
#: Message of a preparation for swaps that comes too late.
COMPILED = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
#: Message of a rank below that of an adapter; takes ``rank`` and ``own``.
TOO_LOW = "Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({own})"
#: Message of a trained bias of B beside an initialization by name; takes ``how``.
LORA_BIAS = "The argument lora_bias=True is only supported with init_lora_weights=True or False, got {how} instead"
