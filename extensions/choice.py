"""Ours, not the paper's: a canvas that chooses one future. On where `choice.latent` is above 0.

The paper's canvas averages over futures, so tokens that are drawn in one step cannot agree on one.
A latent w (B, T, L), one a frame, makes the choice:

    training   w = q(frame, frame before) + noise. The canvas is predicted from (z_t + E w, prev) by
               the same L2 loss; for some frames without w, or z_t need not predict what is likely
               and the prior has nothing to go by.
    sampling   w ~ p(w | z_t), once a frame, by a DiffLoss of its own; q is not called.

configs/choice.yaml holds the settings, docs/CHOICE.md what they are good for.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from canvas import CanvasMAR, Draws, per_clip, to_device
from diffloss import DiffLoss
from mar import Block

REPEAT = 8  # R, draws of the prior's loss a frame: one small vector where a frame has many tokens
HIDDEN = 256


class ChoosingCanvasMAR(CanvasMAR):
    """CanvasMAR whose canvas reads z_t + E w instead of z_t."""

    def __init__(self, cfg):
        super().__init__(cfg)
        m, o = cfg.model, cfg.choice
        self.choice = o
        self.posterior = Pool(2 * self.channels, self.tokens, m, o.latent)  # q
        self.embed_w = nn.Linear(o.latent, m.width)  # E
        self.read = Pool(m.width, self.tokens, m, HIDDEN)
        self.prior = DiffLoss(o.latent, HIDDEN, HIDDEN, 3)
        # The prior learns what w means while the posterior still changes it, more slowly.
        for part, lr_scale in (
            (self.posterior, 0.1),
            (self.embed_w, 0.3),
            (self.read, 0.3),
            (self.prior, 0.3),
        ):
            for p in part.parameters():
                p.lr_scale = lr_scale
        self.set_recompute(cfg.train.recompute)

    def predict_canvas(self, z_t, prev, target=None, draws=None, generators=None):
        """As of CanvasMAR; further losses: choice.weight times the KL of w (`kl`), and `prior`.

        The prior's loss trains the prior alone: its gradient stops at w and z_t.
        """
        if target is None:
            w = self.sample_prior(z_t, generators)
            return super().predict_canvas(z_t + self.embed_w(w)[:, None], prev)
        start = self.start.expand(len(target), 1, -1, -1)
        clean_prev = torch.cat([start, target[:, :-1]], dim=1)
        mu = self.posterior(torch.cat([target, target - clean_prev], dim=-1))  # (B, T, L)
        w = mu + self.choice.noise * draws.w_noise
        kept = torch.where(draws.drop_temporal, self.null.to(z_t.dtype), z_t).detach()
        extra = {
            # The KL divergence of w from a standard normal, up to a constant: nats a dimension.
            "kl": self.choice.weight * (0.5 * mu.float().square().mean()),
            "prior": self.prior(w.detach(), self.read(kept), draws.w_tau, draws.w_eps).mean(),
        }
        hint = self.embed_w(w) * draws.w_shown[..., None]  # (B, T, D)
        z_s, f_hat, static, _ = super().predict_canvas(z_t + hint.unsqueeze(-2), prev)
        return z_s, f_hat, static, extra

    def sample_prior(self, z_t, generators):
        """Draw w (B, L) given z_t (B, N, D), guided by choice.cfg."""
        o, null = self.choice, self.null.to(z_t.dtype).expand_as(z_t)
        eps = to_device([torch.randn(o.latent, generator=g) for g in generators], z_t.device)
        branches = [(weight, z) for weight, z in ((o.cfg, z_t), (1 - o.cfg, null)) if weight]
        weights, z = zip(*branches)
        c = self.read(torch.cat(z))  # (n*B, HIDDEN)
        return self.prior.sample(c, o.temperature * eps, o.solver_steps, weights=weights)

    def draw(self, generators, frames, ratio=None):
        """As of CanvasMAR, and after it what w needs: see `ChoiceDraws`."""
        draws, o = super().draw(generators, frames, ratio), self.choice
        rand = partial(per_clip, torch.rand, generators)
        randn = partial(per_clip, torch.randn, generators)
        return ChoiceDraws(
            **vars(draws),
            w_noise=randn(frames, o.latent),
            w_tau=rand(REPEAT, frames),
            w_eps=randn(REPEAT, frames, o.latent),
            w_shown=rand(frames) >= o.drop,
        )


@dataclass
class ChoiceDraws(Draws):
    """What a training step draws for w."""

    w_noise: torch.Tensor  # (B, T, L) standard normal
    w_tau: torch.Tensor  # (B, R, T) in [0, 1)
    w_eps: torch.Tensor  # (B, R, T, L) standard normal
    w_shown: torch.Tensor  # (B, T) bool, whether the canvas reads w

    def sampled(self, frame_noise, canvas_noise):
        draws = super().sampled(frame_noise, canvas_noise)
        draws.w_shown = torch.ones_like(self.w_shown)
        return draws


class Pool(nn.Module):
    """(..., N, channels) -> (..., out): a transformer block, the mean over tokens, an MLP."""

    def __init__(self, channels: int, tokens: int, m, out: int):
        super().__init__()
        self.embed = nn.Linear(channels, m.width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, m.width))
        self.block = Block(m.width, m.heads, round(tokens**0.5))
        self.out_proj = nn.Sequential(nn.Linear(m.width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, out))

    def forward(self, x):
        tokens = (self.embed(x) + self.position).flatten(0, -3)  # (frames, N, D)
        return self.out_proj(self.block(tokens).mean(-2)).unflatten(0, x.shape[:-2])
