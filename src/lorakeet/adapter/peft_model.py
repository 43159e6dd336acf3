"""``PeftModel``: a model with adapters that can also be saved, loaded and pushed; and ``get_peft_model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakeet.adapter.model_card import write_card
from lorakeet.adapter.serialization import check_base, put_tensors, read_notes, read_tensors, write_adapter
from lorakeet.errors import AdapterError
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.inject import set_trainable
from lorakeet.lora.model import LoraModel, adopt, refuse_unknown, start

#: Arguments of PEFT's that only say how to load: accepted, without effect.
_LOADING = {"autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "torch_device"}


class PeftModel(LoraModel):
    """A transformers (or any) model with LoRA adapters: the object that was given, with these verbs added.

    Made by :func:`get_peft_model` or :meth:`from_pretrained`, never constructed.
    """

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        allow_other_base: bool = False,
        allow_untrained: bool = False,
        **peft_only: Any,
    ) -> PeftModel:
        """Put a saved adapter on ``model``, in place, and let it answer.

        Args:
            model: The base model; the same object comes back.
            model_id: Folder or hub id of the adapter.
            adapter_name: What to call it here.
            is_trainable: Whether it goes on learning; left out: frozen.
            config: Used instead of the adapter's own ``adapter_config.json``.
            revision: Revision of the hub repository.
            subfolder: Where in the repository or folder.
            allow_other_base: Go on although the base is not the one the adapter was trained on.
            allow_untrained: Accept an adapter whose every B is zero.

        Raises:
            AdapterError: no such adapter; tensors missing, unexpected, mis-shaped, not finite or all zero; a pickle; a
                damaged file; another base. The model is as before then.
            TargetError: the adapter's layers are not in this model.
        """
        refuse_unknown("from_pretrained", peft_only, _LOADING)
        fresh = not isinstance(model, LoraModel)
        peft = adopt(model, cls)
        assert isinstance(peft, PeftModel)
        try:
            peft.load_adapter(
                model_id,
                adapter_name,
                is_trainable,
                config=config,
                revision=revision,
                subfolder=subfolder,
                allow_other_base=allow_other_base,
                allow_untrained=allow_untrained,
            )
        except BaseException:
            if fresh:
                peft.unload()
            raise
        if fresh:
            set_trainable(peft, peft.peft_config[adapter_name], peft.lora_parts() if is_trainable else ())
            peft.eval()
        peft.set_adapter(adapter_name, inference_mode=not is_trainable)
        return peft

    def load_adapter(  # type: ignore[override]
        self,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        config: PeftConfig | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        allow_other_base: bool = False,
        allow_untrained: bool = False,
        **peft_only: Any,
    ) -> None:
        """Load a saved adapter beside the others; it is silent until ``set_adapter``.

        If an adapter of this name is there already, its weights are replaced (they must have the same shapes).
        Arguments and errors as for :meth:`from_pretrained`.
        """
        refuse_unknown("load_adapter", peft_only, _LOADING)
        config = config or PeftConfig.from_pretrained(model_id, revision=revision, subfolder=subfolder)
        notes = read_notes(model_id, revision=revision, subfolder=subfolder)
        if not allow_other_base:
            check_base(model_id, notes, self)
        tensors = read_tensors(model_id, revision=revision, subfolder=subfolder)
        known = adapter_name in self.peft_config
        if not known:
            self.add_adapter(adapter_name, config.model_copy(update={"inference_mode": not is_trainable}), strict=False)
        try:
            put_tensors(self, adapter_name, tensors, model_id, allow_untrained=allow_untrained or is_trainable)
        except BaseException:
            if not known:
                self.delete_adapter(adapter_name)
            raise
        if is_trainable and adapter_name in self.active_adapters:
            self.set_adapter(self.active_adapters)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        notes: Mapping[str, Any] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **peft_only: Any,
    ) -> None:
        """Write the adapter (several: ``default`` here, each other in a subfolder of its name) and a model card.

        Args:
            save_directory: Made if it is not there; other files in it stay.
            safe_serialization: Only True: weights are never pickled.
            selected_adapters: Which; left out: all.
            state_dict: Gathered tensors of a sharded model.
            notes: Further facts for ``lorakeet.json``.
            is_main_process: Only the main process of several writes.
            push_to_hub: Also upload to ``repo_id``, left out: the folder's name.

        Raises:
            AdapterError: NaN or infinite values, or ``safe_serialization=False``.
            OutputError: the folder cannot be written to.
        """
        refuse_unknown("save_pretrained", peft_only, {"max_shard_size", "save_function", "save_original_format"})
        if not safe_serialization:
            raise AdapterError(
                "safe_serialization=False would write a pickle", "leave it out: safetensors is the format"
            )
        if any(layer.merged_adapters for layer in self.lora_layers()):
            raise AdapterError("an adapter is merged into the base, so it would be saved twice over", "unmerge first")
        folder = Path(save_directory)
        for name in selected_adapters or list(self.peft_config):
            self._known(name)
            if is_main_process:
                place = folder if name == "default" else folder / name
                write_adapter(self, name, place, state_dict=state_dict, notes=notes)
                write_card(place, self.peft_config[name], notes or {})
        if push_to_hub and is_main_process:
            from lorakeet.adapter.hub import push_folder

            push_folder(folder, repo_id or folder.resolve().name)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **peft_only: Any,
    ) -> str:
        """Upload the adapter and its card to the hub; returns the address of the repository's page.

        The token is the one of the usual login or of ``HF_TOKEN`` unless given; it is never shown.
        """
        import tempfile

        from lorakeet.adapter.hub import push_folder

        refuse_unknown("push_to_hub", peft_only, {"safe_serialization", "max_shard_size"})
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, private=private, message=commit_message, revision=revision, token=token)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    **peft_only: Any,
) -> PeftModel:
    """Put a new, trainable adapter on ``model``, in place, and freeze everything else.

    Args:
        model: Any module; the same object comes back, as a :class:`PeftModel` too.
        peft_config: The settings.
        adapter_name: What to call the adapter.
        autocast_adapter_dtype: Hold the adapter in fp32 where the base is in half precision, as PEFT does; False: in
            the base's dtype.

    Raises:
        TargetError: ``target_modules`` match nothing or only in part, with the nearest names; nothing is touched then.
    """
    refuse_unknown("get_peft_model", peft_only, {"low_cpu_mem_usage", "mixed"})
    peft = start(model, peft_config, adapter_name, PeftModel)
    assert isinstance(peft, PeftModel)
    if not autocast_adapter_dtype:
        for layer in peft.lora_layers():
            for parameter in layer.parts(adapter_name):
                base = layer.base_layer
                parameter.data = parameter.data.to(base.weight.dtype if base.weight.is_floating_point() else base.dtype)
    return peft
