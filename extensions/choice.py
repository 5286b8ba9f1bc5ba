"""Ours, not the paper's: a canvas that chooses one future. Off unless `model.canvas_latent` is above 0.

The paper's canvas is the mean over futures, so it cannot tell tokens that are drawn in one step which future to show. A latent w (B, T, L) tells it:

    training   w = q(frame, the frame before) + noise, and the canvas is predicted from (z_t + E w, p) by the same L2 loss, of some
               frames without w: else z_t need not tell what is likely, and the prior finds nothing there
    sampling   w ~ p(w | z_t), once a frame, by a DiffLoss of its own (`sample.choose`); q is never called
"""

import torch
from torch import nn

from support import config
from diffloss import DiffLoss
from mar import Block

REPEAT = 8  # draws of the prior's loss a frame: one small vector where a frame has dozens of tokens


class Choice(nn.Module):
    """Posterior q, entrance E and prior of w."""

    def __init__(self, channels: int, tokens: int, m: config.Model, hidden: int = 256):
        super().__init__()
        self.m, latent = m, m.canvas_latent
        self.posterior, self.enter = (
            Pool(2 * channels, tokens, m, hidden, latent),
            nn.Linear(latent, m.width),
        )
        self.read, self.prior = (
            Pool(m.width, tokens, m, hidden, hidden, m.choice_reads == "tokens"),
            DiffLoss(latent, hidden, hidden, 3),
        )
        for part, scale in (
            (self, 0.3),
            (self.posterior, 0.1),
        ):  # the prior learns what w means while the posterior still changes that
            for p in part.parameters():
                p.lr_scale = scale

    def forward(self, f, before, z_t, told, draws):
        """(what the canvas reads instead of z_t (B, T, N, D), loss, logs). f, before (B, T, N, C): the frames and those before them; told:
        z_t, or the null vector where it is dropped, for the prior. The prior's loss trains the prior alone: its gradient stops at w and z_t."""
        mu = self.posterior(torch.cat([f, f - before], -1))
        w = mu + self.m.choice_noise * draws.w_noise
        prior = self.prior.loss(
            w.detach(), self.read(told.detach()), draws.w_tau, draws.w_eps
        ).mean()
        small = smallness(mu.flatten(0, 1), self.m.choice_noise, self.m.choice_loss)
        read = z_t + (self.enter(w) * draws.w_told.unsqueeze(-1)).unsqueeze(-2)
        return (
            read,
            self.m.choice_weight * small + prior,
            {"prior": prior.detach(), "smallness": small.detach()},
        )


class Pool(nn.Module):
    """(..., N, channels) -> (..., out): one transformer block, or none, then the mean over tokens and an MLP."""

    def __init__(
        self, channels: int, tokens: int, m: config.Model, hidden: int, out: int, mix: bool = True
    ):
        super().__init__()
        self.embed, self.position = (
            nn.Linear(channels, m.width),
            nn.Parameter(0.02 * torch.randn(tokens, m.width)),
        )
        self.block = Block(m.width, m.heads, round(tokens**0.5)) if mix else nn.Identity()
        self.leave = nn.Sequential(nn.Linear(m.width, hidden), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, x):
        return self.leave(
            self.block((self.embed(x) + self.position).flatten(0, -3)).mean(-2)
        ).unflatten(0, x.shape[:-2])


def smallness(mu, noise: float, of: str):
    """What keeps w = mu + noise * eps small, in nats a dimension; mu (n, L). kl: the divergence of each w from a standard normal, but for a
    constant: a dimension that does not pay stays near zero. moments: that of a normal with the mean and covariance of w over the batch."""
    if of == "kl":
        return 0.5 * mu.float().square().mean()
    with torch.autocast(mu.device.type, enabled=False):  # a determinant needs every digit
        apart = mu.float() - (mean := mu.float().mean(0))
        cov = apart.T @ apart / len(mu) + noise**2 * torch.eye(mu.shape[1], device=mu.device)
        return (
            0.5
            * (
                cov.diagonal().sum()
                + mean.square().sum()
                - mu.shape[1]
                - torch.linalg.slogdet(cov).logabsdet
            )
            / mu.shape[1]
        )
