from .autoencoder_kl_moviegen import AutoencoderKLMovieGen
from .transformer_moviegen import MovieGenTransformer3DModel


__all__ = ["AutoencoderKLMovieGen", "MovieGenTransformer3DModel"]
