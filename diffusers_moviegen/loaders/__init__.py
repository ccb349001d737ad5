from .lora_pipeline import MovieGenLoraLoaderMixin
from .single_file_model import MovieGenSingleFileMixin


__all__ = ["MovieGenLoraLoaderMixin", "MovieGenSingleFileMixin"]
