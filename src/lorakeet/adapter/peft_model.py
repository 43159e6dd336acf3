"""``PeftModel``: a model with adapters that can be saved, loaded and pushed; and ``get_peft_model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lorakeet.adapter.adapter_folders import adapter_folders, saved_adapters
from lorakeet.adapter.model_card import write_card
from lorakeet.adapter.older_names import with_current_names
from lorakeet.adapter.put_adapter import put_adapter
from lorakeet.adapter.residual.initial import initial_of, warn_of_residual
from lorakeet.adapter.serialization import check_base, read_notes, read_tensors, write_adapter
from lorakeet.adapter.tensor_loading import LoadResult
from lorakeet.adapter.unfrozen import NOTE
from lorakeet.errors import AdapterError
from lorakeet.lora.config import DOWNLOAD_ARGUMENTS, PeftConfig, refuse_unknown
from lorakeet.lora.inject import freeze_base
from lorakeet.lora.interop.wrappers import bare
from lorakeet.lora.lifecycle.adoption import adopt
from lorakeet.lora.lifecycle.merged import unmerged
from lorakeet.lora.lifecycle.rollback import all_or_nothing
from lorakeet.lora.model import LoraModel

#: PEFT's arguments that only choose a way to load: accepted, without effect. An adapter is made where its base is.
_LOADING = {
    *("device_map", "dtype", "ephemeral_gpu_offload", "ignore_mismatched_sizes", "low_cpu_mem_usage", "max_memory"),
    *("offload_dir", "offload_folder", "offload_index", "torch_device", "torch_dtype", "use_safetensors"),
    *("attn_implementation", "trust_remote_code"),  # of the base, which is loaded already
}


class PeftModel(LoraModel):
    """A transformers (or any) model with LoRA adapters: the object that was given, with these methods added.

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
        allow_untrained: bool = True,
        autocast_adapter_dtype: bool = True,
        **peft_only: Any,
    ) -> PeftModel:
        """Put a saved adapter on ``model``, in place, and activate it.

        Args:
            model: The base model; the same object comes back.
            model_id: Folder or hub id of the adapter.
            adapter_name: The name to give it here.
            is_trainable: Whether to continue its training; left out: frozen.
            config: Used instead of the adapter's own ``adapter_config.json``.
            revision: Revision of the hub repository.
            subfolder: Folder in the repository or folder.
            allow_other_base: Accept a base that is not the one the adapter was trained on.
            allow_untrained: Load an adapter whose every B is zero, with a warning; False: refuse it.
            autocast_adapter_dtype: Keep the adapter in fp32 where the base is in half precision; False: in the base's dtype.
            **peft_only: Arguments that only PEFT has; each is refused by name.

        Raises:
            AdapterError: no such adapter; tensors are missing, unexpected, not finite or of the wrong shape; a pickle; a
                damaged file; another base. The model is as before then.
            TargetError: the adapter's layers are not in this model.
        """
        refuse_unknown("from_pretrained", peft_only, {*_LOADING, *DOWNLOAD_ARGUMENTS})
        model = bare(model)
        fresh = not isinstance(model, LoraModel)
        with all_or_nothing(model):
            peft = adopt(model, cls)
            assert isinstance(peft, PeftModel)
            peft.load_adapter(
                model_id,
                adapter_name,
                is_trainable,
                config=config,
                revision=revision,
                subfolder=subfolder,
                allow_other_base=allow_other_base,
                allow_untrained=allow_untrained,
                autocast_adapter_dtype=autocast_adapter_dtype,
                **peft_only,
            )
            if fresh:
                freeze_base(peft)
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
        allow_untrained: bool = True,
        autocast_adapter_dtype: bool = True,
        **peft_only: Any,
    ) -> LoadResult:
        """Load a saved adapter beside the others; it is inactive until ``set_adapter``.

        An adapter that has the name already is replaced whole: settings, layers and weights. The new one acts where the
        old one did, and goes on training if that did.

        Args:
            model_id: Folder or hub id of the adapter.
            adapter_name: The name to give it here.
            is_trainable: Whether to continue its training, also while it is inactive; left out: a new adapter is frozen.
            config: Used instead of the adapter's own ``adapter_config.json``.
            revision: Revision of the hub repository.
            subfolder: Folder in the repository or folder.
            allow_other_base: Accept a base that is not the one the adapter was trained on.
            allow_untrained: Load an adapter whose every B is zero, with a warning; False: refuse it.
            autocast_adapter_dtype: Keep the adapter in fp32 where the base is in half precision; False: in the base's dtype.
            **peft_only: Arguments that only PEFT has; each is refused by name.

        Returns:
            Missing and unexpected keys, as PEFT returns them: always none, since either is an error.

        Raises:
            AdapterError: As :meth:`from_pretrained`.
            TargetError: As :meth:`from_pretrained`.
        """
        where = {"revision": revision, "subfolder": subfolder}
        where |= {key: peft_only.pop(key) for key in DOWNLOAD_ARGUMENTS if key in peft_only}
        refuse_unknown("load_adapter", peft_only, _LOADING)
        config = config or PeftConfig.from_pretrained(model_id, **where)
        notes = read_notes(model_id, **where)
        warn_of_residual(model_id, config, notes)
        if not allow_other_base:
            with unmerged(self):
                check_base(model_id, notes, self)
        config, tensors = with_current_names(self, config, read_tensors(model_id, **where))
        put_adapter(
            self,
            adapter_name,
            config,
            tensors,
            model_id,
            is_trainable,
            autocast_adapter_dtype,
            allow_untrained=allow_untrained or is_trainable,
            unfrozen=notes.get(NOTE, ()),
        )
        return LoadResult([], [])

    def restore_adapters(self, root: str | Path) -> list[str]:
        """Load every adapter of this model again from where :meth:`save_pretrained` put it below ``root``.

        Each keeps its name, and stays active or not, trainable or not: the state of a checkpoint or of the best step.

        Returns:
            Names of the adapters; one that neither trains nor acts may be missing in ``root``.

        Raises:
            AdapterError: ``root`` lacks an adapter that trains or acts, or one does not fit. The model is as before then.
        """
        folders = adapter_folders(root, self.peft_config)
        saved = saved_adapters(root)
        if missing := [
            name for name in folders if name not in saved and (self.trains(name) or name in self.switch.active)
        ]:
            listed = ", ".join(map(repr, saved)) or "none"
            raise AdapterError(
                f"{root} has no adapter {', '.join(map(repr, missing))}, it has {listed}",
                "name the adapters as in the run that saved them",
            )
        present = [name for name in folders if name in saved]
        with all_or_nothing(self):
            for name in present:
                config, notes = PeftConfig.from_pretrained(folders[name]), read_notes(folders[name])
                with unmerged(self):
                    check_base(folders[name], notes, self)
                accept = {"allow_untrained": True, "allow_new_base": True, "unfrozen": notes.get(NOTE, ())}
                put_adapter(self, name, config, read_tensors(folders[name]), folders[name], **accept)
        return present

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
        save_embedding_layers: bool | Literal["auto"] = "auto",
        path_initial_model_for_weight_conversion: str | Path | None = None,
        plain_lora: bool = False,
        **peft_only: Any,
    ) -> None:
        """Write the adapter (several: ``default`` here, each other in a subfolder of its name) and a model card.

        Args:
            save_directory: Made if it does not exist; other files in it stay.
            safe_serialization: Only True: weights are never pickled.
            selected_adapters: Names of the adapters; left out: all.
            state_dict: Gathered tensors of a sharded model.
            notes: Further facts for ``lorakeet.json``.
            is_main_process: Only the main process of several writes.
            push_to_hub: Also upload.
            repo_id: Name on the hub; left out: the folder's name.
            save_embedding_layers: Whether to save the embedding and the head too; ``auto``: if they are adapted or were
                resized.
            path_initial_model_for_weight_conversion: Folder where the adapter was saved before its training. It is written as
                plain LoRA of twice the rank on the whole base, although it took a part of it (PiSSA, OLoRA).
            plain_lora: The same without that folder, from what the model remembers. AdaLoRA becomes plain LoRA too, without
                the triplets that were set to zero.
            **peft_only: Arguments that only PEFT has; each is refused by name.

        Raises:
            AdapterError: NaN or infinite values, or ``safe_serialization=False``.
            OutputError: the folder cannot be written to.
        """
        token = peft_only.pop("token", None)
        refuse_unknown("save_pretrained", peft_only, {"max_shard_size", "save_function", "save_original_format"})
        if not safe_serialization:
            raise AdapterError(
                "safe_serialization=False would write a pickle", "leave it out: safetensors is the format"
            )
        folder = Path(save_directory)
        chosen = list(selected_adapters or self.peft_config)
        for name in chosen:
            self._check_known(name)
        given = {"state_dict": state_dict, "notes": notes, "save_embedding_layers": save_embedding_layers}
        with unmerged(self):
            for name, path in adapter_folders(folder, chosen).items() if is_main_process else ():
                initial = initial_of(self, name, path_initial_model_for_weight_conversion, plain_lora)
                self._write(name, path, initial=initial, plain_lora=plain_lora, **given)
        if push_to_hub and is_main_process:
            from lorakeet.adapter.hub import push_folder

            push_folder(folder, repo_id or folder.resolve().name, token=token)

    def _write(self, name: str, folder: Path, **options: Any) -> None:
        """Write an adapter and its model card; the options are those of :func:`write_adapter`."""
        config = write_adapter(self, name, folder, **options)
        if not hasattr(self, "config"):  # a base without a configuration has no public name
            config = config.model_copy(update={"base_model_name_or_path": None})
        write_card(folder, config, options["notes"] or {})

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
        """Upload the adapter and its card to the hub.

        Args:
            repo_id: ``user/name`` on the hub; made if it does not exist.
            private: Whether a new repository is private; left out: the owner's default.
            commit_message: Message of the commit.
            revision: Branch to push to; left out: ``main``.
            token: Token for the hub; left out: that of the login, or ``HF_TOKEN``. It is never shown.
            **peft_only: Arguments that only PEFT has; each is refused by name.

        Returns:
            The address of the repository's page.
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
        adapter_name: Name of the adapter.
        autocast_adapter_dtype: Keep the adapter in fp32 where the base is in half precision, as PEFT does; False: in
            the base's dtype.
        **peft_only: Arguments that only PEFT has; each is refused by name.

    Raises:
        AdapterError: the model has adapters already.
        TargetError: some of ``target_modules`` match nothing, with the nearest names; the model is as before then.
    """
    refuse_unknown("get_peft_model", peft_only, {"low_cpu_mem_usage", "mixed"})
    model = bare(model)
    if isinstance(model, LoraModel):
        raise AdapterError("this model has adapters already", "call add_adapter on it")
    with all_or_nothing(model):
        peft = adopt(model, PeftModel)
        assert isinstance(peft, PeftModel)
        peft.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        freeze_base(peft)
        peft.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return peft
