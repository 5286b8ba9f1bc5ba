"""The tokenizer: a convolutional KL-VAE that turns each frame into a grid of continuous tokens.

Kingma & Welling 2014 (arXiv 1312.6114), as used for latents by Rombach et al. 2022 (arXiv
2112.10752). Which VAE the paper takes is not known; this small one, trained by train.py on the
user's own frames, is ours.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class Tokenizer(nn.Module):
    """x (..., 3, H, W) in [-1, 1]  <->  f (..., N, C), each channel of mean 0 and std 1.

    N = (H / stride) * (W / stride).
    """

    def __init__(self, cfg):
        """cfg: the `tokenizer` section of the configuration."""
        super().__init__()
        self.cfg, levels = cfg, int(math.log2(cfg.stride))
        widths = [min(cfg.width * 2**i, 8 * cfg.width) for i in range(levels)]
        first, deepest = widths[0], widths[-1]
        encoder = [nn.PixelUnshuffle(2), nn.Conv2d(12, first, 3, padding=1), Residual(first)]
        for fine, coarse in zip(widths, widths[1:]):
            encoder += [nn.Conv2d(fine, coarse, 4, stride=2, padding=1), Residual(coarse)]
        encoder += [Residual(deepest), *norm_act_conv(deepest, 2 * cfg.channels)]
        decoder = [nn.Conv2d(cfg.channels, deepest, 3, padding=1)]
        decoder += [Residual(deepest), Residual(deepest)]
        for coarse, fine in zip(widths[::-1], widths[-2::-1]):
            conv = nn.Conv2d(coarse, fine, 3, padding=1)
            decoder += [nn.Upsample(scale_factor=2), conv, Residual(fine)]
        decoder += [Residual(first), *norm_act_conv(first, 12), nn.PixelShuffle(2)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.register_buffer("mean", torch.zeros(cfg.channels, 1, 1))
        self.register_buffer("std", torch.ones(cfg.channels, 1, 1))

    def posterior(self, x):
        """x (B, 3, H, W) -> mean and log-variance of q(latent | x), (B, C, h, w), unscaled."""
        mean, log_variance = self.encoder(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def forward(self, x, noise):
        """Return (loss, logs). x (B, 3, H, W) in [-1, 1], noise (B, C, h, w) standard normal.

        loss = mean squared error + kl_weight * KL(q || standard normal), the KL in nats per latent
        number; PSNR in dB.
        """
        mean, log_variance = self.posterior(x)
        x_hat = self.decoder(mean + noise * (0.5 * log_variance).exp()).float()
        mse = F.mse_loss(x_hat, x)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        psnr = -10 * torch.log10(mse.detach() / 4)  # the range of x is 2
        return mse + self.cfg.kl_weight * kl, {"psnr": psnr, "kl": kl.detach()}

    def encode(self, x):
        """x (..., 3, H, W) in [-1, 1] -> standardised posterior means f (..., N, C)."""
        mean, _ = self.posterior(x.flatten(0, -4))
        f = rearrange((mean - self.mean) / self.std, "b c h w -> b (h w) c")
        return f.unflatten(0, x.shape[:-3])

    def decode(self, f):
        """f (..., N, C) -> x (..., 3, H, W), clamped to [-1, 1]. Square grids only."""
        side = math.isqrt(f.shape[-2])
        f_grid = rearrange(f.flatten(0, -3), "b (h w) c -> b c h w", h=side)
        x = self.decoder(f_grid * self.std + self.mean).float()
        return x.clamp(-1, 1).unflatten(0, f.shape[:-2])

    @torch.no_grad()
    def measure_statistics(self, batches):
        """Set mean and standard deviation of each channel from an iterable of x (B, T, 3, H, W)."""
        total, squares = torch.zeros(2, self.cfg.channels, dtype=torch.float64)
        count = 0
        for x in batches:
            mean = self.posterior(x.flatten(0, 1))[0].cpu().double()
            total += mean.sum((0, 2, 3))
            squares += (mean**2).sum((0, 2, 3))
            count += mean[:, 0].numel()
        mean = total / count
        std = (squares / count - mean**2).clamp(min=1e-12).sqrt()
        self.mean.copy_(mean[:, None, None].float())
        self.std.copy_(std[:, None, None].float())

    def fingerprint(self) -> str:
        """Hash weights and statistics: a model needs the tokenizer that it was trained on."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            value = value.detach().cpu().contiguous().view(torch.uint8)
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()[:16]


class Residual(nn.Module):
    """x + two convolutions of x, each after a normalisation."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(*norm_act_conv(width, width), *norm_act_conv(width, width))

    def forward(self, x):
        return x + self.body(x)


def norm_act_conv(width: int, out: int):
    """(B, width, h, w) -> (B, out, h, w), as three modules."""
    return nn.GroupNorm(math.gcd(8, width), width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)
