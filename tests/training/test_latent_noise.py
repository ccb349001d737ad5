import pytest
import torch

from diffusers_moviegen.training import add_latent_noise


@pytest.mark.parametrize("shape", [(64, 3, 400), (64, 3, 4, 10, 10)])
def test_every_sample_has_noise_of_its_own_deviation(shape):
    """Uniform from 0 to what is asked for, in deviations of the channel."""
    latents = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    std = [1.0, 2.0, 5.0]
    noisy = add_latent_noise(latents, std, 0.5, torch.Generator().manual_seed(1))
    noise = ((noisy - latents).flatten(2) / torch.tensor(std).view(1, 3, 1)).std(dim=2)
    torch.testing.assert_close(noise, noise.mean(dim=1, keepdim=True).expand(-1, 3), rtol=0.25, atol=0.01)
    strengths = noise.mean(dim=1)
    assert strengths.max() < 0.55 and strengths.min() < 0.05
    assert 0.2 < strengths.mean() < 0.3
    assert torch.equal(noisy, add_latent_noise(latents, std, 0.5, torch.Generator().manual_seed(1)))
