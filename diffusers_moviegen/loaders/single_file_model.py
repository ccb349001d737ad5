import os
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import is_valid_url, load_single_file_checkpoint


class MovieGenSingleFileMixin(FromOriginalModelMixin):
    """
    Adds `from_single_file` to a model. By itself diffusers guesses a configuration for weights it does not know,
    leaves missing weights uninitialised, unpickles files, and rounds the weights of `_keep_in_fp32_modules`.
    """

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        config: str | os.PathLike | None = None,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs,
    ):
        r"""
        Load the model from one safetensors file with the key names that `save_pretrained` writes, in evaluation mode.

        ```py
        >>> transformer = MovieGenTransformer3DModel.from_single_file(
        ...     "backbone.safetensors", config="runs/a", subfolder="transformer"
        ... )
        >>> pipe = MovieGenPipeline.from_pretrained("runs/a", transformer=transformer)
        ```

        Args:
            pretrained_model_link_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                A `.safetensors` file, its address on the Hub
                (`https://huggingface.co/<user>/<name>/blob/main/<file>.safetensors`), or a state dict. Other formats
                are refused: reading them can run code.
            config (`str` or `os.PathLike`, *optional*):
                Folder or Hub repository (`user/name`) of the `config.json`. The weights alone do not tell the number
                of attention heads, the groups of the norms or the statistics of the latents. By default the folder
                of the file.
            subfolder (`str`, *optional*):
                Folder of the `config.json` within `config`, such as "transformer" or "vae" if that is a pipeline.
            dtype (`torch.dtype`, *optional*):
                Type of the weights, by default float32. Those of `_keep_in_fp32_modules` are float32 all the same, as
                with `from_pretrained`.
            torch_dtype (`torch.dtype`, *optional*):
                Older name of `dtype`.
            kwargs:
                Values to use in place of those in the `config.json`, and the remaining arguments of
                [`~diffusers.loaders.FromOriginalModelMixin.from_single_file`]: `cache_dir`, `config_revision`,
                `device`, `disable_mmap`, `force_download`, `local_files_only`, `low_cpu_mem_usage`, `proxies`,
                `revision`, `token`.

        Raises:
            `OSError`: There is no such file or configuration, or it cannot be read.
            `ValueError`: The file is not safetensors, no configuration is given, or it is that of another model, or
            the tensors of the file are not exactly those that the configuration asks for, or a `quantization_config`
            is given.
        """
        if kwargs.get("quantization_config") is not None:
            # diffusers takes it here and, of torchao at least, returns a model that is not quantised.
            raise ValueError(
                "`quantization_config` is not supported by `from_single_file`; use `save_pretrained`, then"
                " `from_pretrained` with it."
            )

        # 1. Weights. Those of a safetensors file stay on the disk until they are used.
        if isinstance(pretrained_model_link_or_path_or_dict, dict):
            source, checkpoint = "The state dict", pretrained_model_link_or_path_or_dict
        else:
            path = os.fspath(pretrained_model_link_or_path_or_dict)
            source = f"'{path}'"
            if os.path.isdir(path):
                raise OSError(f"{source} is a folder; pass a .safetensors file, or use `from_pretrained`.")
            if not path.endswith(".safetensors"):
                raise ValueError(
                    f"{source} is not a .safetensors file; other formats are not read, because reading them can run"
                    " code."
                )
            if not os.path.isfile(path) and not is_valid_url(path):
                raise OSError(f"There is no file {source}; pass a .safetensors file or its address on the Hub.")
            names = ("cache_dir", "disable_mmap", "force_download", "local_files_only", "proxies", "revision", "token")
            checkpoint = load_single_file_checkpoint(path, **{name: kwargs[name] for name in names if name in kwargs})
            if config is None and (Path(path).parent / "config.json").is_file():
                config = Path(path).parent
        if config is None:
            raise ValueError(
                f"{source} needs a `config`: weights do not tell a whole configuration. Pass the folder that holds the"
                f" config.json of this {cls.__name__}."
            )

        # 2. Configuration
        config = os.fspath(config)
        try:
            values = cls.load_config(
                config,
                subfolder=subfolder,
                local_files_only=kwargs.get("local_files_only"),
                token=kwargs.get("token"),
                revision=kwargs.get("config_revision"),
            )
        except OSError as error:
            # Some of these messages run over several lines.
            reason = " ".join(str(error).split())
            raise OSError(
                f"`config` is '{config}', which has no readable config.json ({reason}); pass the folder of a"
                f" {cls.__name__}, with `subfolder` if it is part of a pipeline."
            ) from error
        if values.get("_class_name") != cls.__name__:
            raise ValueError(
                f"`config` '{config}' describes a {values.get('_class_name')}; pass the folder of a {cls.__name__}."
            )
        init_names = cls._get_init_keys(cls)
        values.update({name: value for name, value in kwargs.items() if name in init_names})

        # 3. Do they belong together?
        with init_empty_weights():
            expected = {name: tuple(tensor.shape) for name, tensor in cls.from_config(values).state_dict().items()}
        problem = _first_difference(expected, {name: tuple(tensor.shape) for name, tensor in checkpoint.items()})
        if problem is not None:
            raise ValueError(
                f"{source} does not fit the {cls.__name__} that '{config}' describes: {problem}. Pass the whole model"
                " in one file, and its own config."
            )

        # 4. Load
        model = super().from_single_file(
            checkpoint,
            config=config,
            subfolder=subfolder,
            dtype=dtype if dtype is not None else torch_dtype,
            **kwargs,
        )
        if cls._keep_in_fp32_modules is not None:
            # diffusers ends by casting the whole model.
            for name, parameter in model.named_parameters():
                if not set(cls._keep_in_fp32_modules).isdisjoint(name.split(".")):
                    parameter.data = checkpoint[name].to(parameter.device, torch.float32)
        return model


def _first_difference(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str | None:
    if expected.keys().isdisjoint(found):
        return f"it holds another model, with tensors such as `{min(found)}`" if found else "it holds no tensors"
    for verb, names in (("lacks", expected.keys() - found.keys()), ("also holds", found.keys() - expected.keys())):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"it {verb} `{min(names)}`{others}"
    for name, shape in expected.items():
        if found[name] != shape:
            return f"`{name}` has shape {found[name]} instead of {shape}"
    return None
