from .autoencoder_dac_vae import AutoencoderDACVAE
from .autoencoder_kl_moviegen import AutoencoderKLMovieGen
from .transformer_moviegen import MovieGenTransformer3DModel
from .transformer_moviegen_audio import MovieGenAudioTransformer1DModel


__all__ = [
    "AutoencoderDACVAE",
    "AutoencoderKLMovieGen",
    "MovieGenAudioTransformer1DModel",
    "MovieGenTransformer3DModel",
]
