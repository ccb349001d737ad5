from .lora_pipeline import MovieGenLoraLoaderMixin


__all__ = ["MovieGenLoraLoaderMixin"]
