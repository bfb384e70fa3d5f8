"""What stands in for a VAE in the toy pipelines. toy_models.save_generator copies this file into
the pipeline's folder, beside the codec's weights, from where diffusers loads it (model_index.json:
"vae": ["toy_codec", "PatchCodec"]; trust_remote_code=True). It imports nothing of ours.

Shapes: B images or clips, F frames, C = 8 channels; a patch of 16 x 16 pixels is 32 numbers.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import nn


class PatchCodec(ModelMixin, ConfigMixin):
    """A whitened PCA of 16 x 16 patches. A patch's 32 numbers lie as (8, 2, 2), so FLUX packs them
    into one token."""

    @register_to_config
    def __init__(self, latent_channels=8, block_out_channels=(1, 1, 1, 1), scaling_factor=1.0,
                 shift_factor=0.0):
        super().__init__()
        k = 4 * latent_channels
        self.mean = nn.Parameter(torch.zeros(768), requires_grad=False)
        self.basis = nn.Parameter(torch.zeros(k, 768), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(k), requires_grad=False)

    def fit(self, images):
        """Principal components of the patches of images (B, 3, H, W) in [-1, 1], half whitened,
        latents of unit variance."""
        x = F.unfold(images, 16, stride=16).mT.reshape(-1, 768)
        self.mean.data = x.mean(0)
        x = x - self.mean
        variances, vectors = torch.linalg.eigh(x.T @ x / len(x))        # ascending
        k = len(self.basis)
        self.basis.data = vectors.flip(1)[:, :k].T.contiguous()
        self.scale.data = variances.flip(0)[:k] ** .25
        self.scale.data *= self.encode(images).latent_dist.mode().std()
        return self

    def encode(self, images):
        """.latent_dist of (B, 8, 6, 6) for images (B, 3, 48, 48); its sample() is its mode()."""
        rows = images.shape[2] // 16
        columns = images.shape[3] // 16
        patches = F.unfold(images, 16, stride=16).mT                    # (B, 9, 768)
        z = (patches - self.mean) @ self.basis.T / self.scale           # (B, 9, 32)
        z = F.pixel_shuffle(z.mT.unflatten(2, (rows, columns)), 2)      # (B, 8, 6, 6)
        return SimpleNamespace(latent_dist=SimpleNamespace(
            sample=lambda generator=None: z, mode=lambda: z))

    def decode(self, z, return_dict=True):
        """Images (B, 3, 48, 48), about in [-1, 1], of latents (B, 8, 6, 6)."""
        z = F.pixel_unshuffle(z, 2)                                     # (B, 32, 3, 3)
        x = (z.flatten(2).mT * self.scale) @ self.basis + self.mean     # (B, 9, 768)
        x = F.fold(x.mT, (16 * z.shape[2], 16 * z.shape[3]), 16, stride=16)
        return SimpleNamespace(sample=x) if return_dict else (x,)


class ClipCodec(ModelMixin, ConfigMixin):
    """For Wan: PatchCodec frame by frame. A patch's 32 numbers lie as (8, 2, 2), which Wan's
    transformer makes one token."""

    @register_to_config
    def __init__(self, z_dim=8, scale_factor_temporal=1, scale_factor_spatial=8,
                 latents_mean=[0.0] * 8, latents_std=[1.0] * 8):
        super().__init__()
        self.frame = PatchCodec(z_dim)

    def encode(self, frames):
        """PatchCodec's: .latent_dist of (B F, 8, 6, 6) for frames (B F, 3, 48, 48)."""
        return self.frame.encode(frames)

    def decode(self, z, return_dict=True):
        """Clips (B, 3, F, 48, 48), about in [-1, 1], of latents (B, 8, F, 6, 6)."""
        x = self.frame.decode(rearrange(z, "b c f h w -> (b f) c h w")).sample
        x = rearrange(x, "(b f) c h w -> b c f h w", b=len(z))
        return SimpleNamespace(sample=x) if return_dict else (x,)
