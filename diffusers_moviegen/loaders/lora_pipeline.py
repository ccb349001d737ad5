import os
import re
from collections.abc import Callable

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict


# Keys of a LoRA file in the format of diffusers and PEFT, after the name of the component.
LORA_KEY = re.compile(r"(?P<module>.+?)\.(lora_[AB]\.(weight|bias)|lora_magnitude_vector(\.weight)?)")


class MovieGenLoraLoaderMixin(LoraBaseMixin):
    """Loads LoRA layers into the `transformer` of a pipeline, and saves, fuses and removes them."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        weight_name: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        proxies: dict[str, str] | None = None,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """
        Read LoRA weights from a safetensors file, a folder, a Hub repository or a state dict.

        Args:
            pretrained_model_name_or_path_or_dict: Path, repository name or state dict.
            return_lora_metadata: Whether to return the adapter's configuration too, `None` if the file has none.
            weight_name: Name of the safetensors file within the folder or repository.
            subfolder, cache_dir, force_download, proxies, local_files_only, token, revision:
                As in `from_pretrained`.
        """
        if weight_name is not None and not weight_name.endswith(".safetensors"):
            raise ValueError(
                f"`weight_name` must name a .safetensors file, got {weight_name!r}; other formats are not read."
            )
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            use_safetensors=True,
            allow_pickle=False,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            force_download=force_download,
            proxies=proxies,
            token=token,
            revision=revision,
            subfolder=subfolder,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ):
        """
        Add a LoRA to the transformer.

        Args:
            pretrained_model_name_or_path_or_dict: A safetensors file, a folder, a Hub repository or a state dict, with
                keys such as `transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`.
            adapter_name: Name for the LoRA, by default `default_0`, `default_1`, ...
            hotswap: Put the weights in place of those of the loaded LoRA `adapter_name`, without a recompilation.
            low_cpu_mem_usage: Create the layers without initialising them first.
            kwargs: Passed to `lora_state_dict`.

        Raises:
            `ValueError`: if a key does not belong to a module of the transformer. Nothing is loaded then.
        """
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        self._check_lora_keys(state_dict)
        self.transformer.load_lora_adapter(
            state_dict,
            prefix=self.transformer_name,
            adapter_name=adapter_name,
            metadata=metadata,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=self,
        )

    def _check_lora_keys(self, state_dict: dict[str, torch.Tensor]):
        # diffusers drops keys that match nothing without an error, and a LoRA that does nothing looks like a bad LoRA.
        modules = {name for name, _ in self.transformer.named_modules()}
        prefix = f"{self.transformer_name}."
        unmatched = []
        for key in state_dict:
            match = LORA_KEY.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
            if match is None or match["module"] not in modules:
                unmatched.append(key)
        if not state_dict:
            raise ValueError("The LoRA holds no weights; expected keys such as `transformer.<module>.lora_A.weight`.")
        if unmatched:
            shown = ", ".join(unmatched[:3]) + (", ..." if len(unmatched) > 3 else "")
            raise ValueError(
                f"{len(unmatched)} of {len(state_dict)} LoRA keys match nothing in the transformer ({shown}); expected"
                " `transformer.<module>.lora_A.weight` and `lora_B.weight` of modules it has. Convert or retrain the"
                " LoRA for this model."
            )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor],
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        transformer_lora_adapter_metadata: dict | None = None,
    ):
        """
        Save LoRA weights of the transformer as safetensors.

        Args:
            save_directory: Folder to write to, created if needed.
            transformer_lora_layers: State dict of the adapter, as `peft.get_peft_model_state_dict(transformer)` gives.
            is_main_process: Whether this process writes.
            weight_name: Name of the file, by default `pytorch_lora_weights.safetensors`.
            save_function: Function to write a state dict with, instead of that of safetensors.
            transformer_lora_adapter_metadata: Configuration of the adapter, `adapter_config.to_dict()`. With it,
                loading restores alpha exactly; without it alpha is taken to be the rank.
        """
        if not transformer_lora_layers:
            raise ValueError("`transformer_lora_layers` is empty; pass the state dict of the adapter.")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.transformer_name: transformer_lora_layers},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=True,
        )

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ):
        """
        Add the weights of the loaded LoRAs to those of the model, so that they cost nothing at inference.

        Args:
            components: Components to fuse, by default `["transformer"]`.
            lora_scale: Factor on the LoRA weights.
            safe_fusing: Refuse to fuse weights that hold NaN.
            adapter_names: LoRAs to fuse, by default the active ones.
        """
        super().fuse_lora(
            components=components or self._lora_loadable_modules,
            lora_scale=lora_scale,
            safe_fusing=safe_fusing,
            adapter_names=adapter_names,
        )

    def unfuse_lora(self, components: list[str] | None = None):
        """Undo `fuse_lora` in `components`, by default `["transformer"]`."""
        super().unfuse_lora(components=components or self._lora_loadable_modules)
