"""The tokenizer: a convolutional KL-VAE that turns each frame into a grid of continuous tokens, one frame at a time.

Kingma & Welling 2014 (arXiv 1312.6114), as used for latents by Rombach et al. 2022 (arXiv 2112.10752). The paper takes
a pretrained VAE; this small one, trained by `train.py` on the user's own frames, is our choice.
"""

import hashlib
import math
from dataclasses import asdict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from support import config
from support import storage
from support.config import UserError


class Tokenizer(nn.Module):
    """x (..., 3, H, W) in [-1, 1]  <->  f (..., N, C), N = (H/stride) * (W/stride), each channel of mean 0 and std 1."""

    def __init__(self, cfg: config.Tokenizer):
        super().__init__()
        self.cfg, levels = cfg, int(math.log2(cfg.stride))
        widths = [min(cfg.width * 2**i, 8 * cfg.width) for i in range(levels)]
        encoder = [
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, widths[0], 3, padding=1),
            Residual(widths[0]),
        ]
        for before, after in zip(widths, widths[1:]):
            encoder += [nn.Conv2d(before, after, 4, stride=2, padding=1), Residual(after)]
        encoder += [Residual(widths[-1]), *_out(widths[-1], 2 * cfg.channels)]
        decoder = [
            nn.Conv2d(cfg.channels, widths[-1], 3, padding=1),
            Residual(widths[-1]),
            Residual(widths[-1]),
        ]
        for before, after in zip(widths[::-1], widths[-2::-1]):
            decoder += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(before, after, 3, padding=1),
                Residual(after),
            ]
        decoder += [Residual(widths[0]), *_out(widths[0], 12), nn.PixelShuffle(2)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.register_buffer("mean", torch.zeros(cfg.channels, 1, 1))
        self.register_buffer("std", torch.ones(cfg.channels, 1, 1))

    def posterior(self, x):
        """x (B, 3, H, W) -> mean and log-variance of q(latent | x), each (B, C, h, w), before standardisation."""
        mean, log_variance = self.encoder(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def forward(self, x, noise):
        """The training loss. x (B, 3, H, W) in [-1, 1], noise (B, C, h, w) standard normal -> (loss, logs).

        loss = mean squared error + kl_weight * KL(q || standard normal), the KL in nats per latent number.
        """
        mean, log_variance = self.posterior(x)
        again = self.decoder(mean + noise * (0.5 * log_variance).exp()).float()
        mse = F.mse_loss(again, x)
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
        latent = rearrange(f.flatten(0, -3), "b (h w) c -> b c h w", h=side) * self.std + self.mean
        return self.decoder(latent).float().clamp(-1, 1).unflatten(0, f.shape[:-2])

    @torch.no_grad()
    def measure_statistics(self, batches):
        """Set the per-channel mean and standard deviation from an iterable of x (B, T, 3, H, W)."""
        sums = torch.zeros(3, self.cfg.channels, dtype=torch.float64)
        for x in batches:
            mean = self.posterior(x.flatten(0, 1))[0].cpu().double()
            sums += torch.stack(
                [
                    mean.sum((0, 2, 3)),
                    (mean**2).sum((0, 2, 3)),
                    torch.full((len(self.mean),), mean[:, 0].numel()),
                ]
            )
        mean = sums[0] / sums[2]
        std = (sums[1] / sums[2] - mean**2).clamp(min=1e-12).sqrt()
        self.mean.copy_(mean[:, None, None].float())
        self.std.copy_(std[:, None, None].float())

    def fingerprint(self) -> str:
        """A hash of the weights and statistics: a model is only good with the tokenizer it was trained on."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(*_out(width, width), *_out(width, width))

    def forward(self, x):
        return x + self.body(x)


def _out(width, out):
    return nn.GroupNorm(math.gcd(8, width), width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)


def save(tokenizer: Tokenizer, path) -> None:
    """Write weights, statistics and settings; `load` reads them."""
    storage.write(pack(tokenizer), path)


def load(path, device="cpu", expect: config.Tokenizer | None = None) -> Tokenizer:
    """Read a tokenizer.pt. Raises UserError if it is missing, damaged, something else, or not of the expected sizes."""
    tokenizer = unpack(storage.read(path, "tokenizer", ("config", "state")), path, device)
    for key in ("stride", "channels", "width") if expect else ():
        if getattr(tokenizer.cfg, key) != getattr(expect, key):
            raise UserError(
                f"{path} has tokenizer.{key}={getattr(tokenizer.cfg, key)}, the configuration says {getattr(expect, key)}"
            )
    return tokenizer


def pack(tokenizer: Tokenizer) -> dict:
    """The tokenizer as tensors and plain values: a tokenizer.pt, and a part of every checkpoint of a model on its latents."""
    return {"kind": "tokenizer", "config": asdict(tokenizer.cfg), "state": tokenizer.state_dict()}


def unpack(stored: dict, path, device="cpu") -> Tokenizer:
    """The tokenizer of what `pack` gave, frozen, on the device. Raises UserError that names the file it is from."""
    try:
        settings, state = stored["config"], stored["state"]
    except (TypeError, LookupError):
        raise UserError(f"{path} holds no whole tokenizer") from None
    tokenizer = Tokenizer(config.build(config.Tokenizer, settings, "tokenizer.", str(path)))
    storage.load_state(tokenizer, state, path)
    return tokenizer.to(device).eval().requires_grad_(False)
