"""The per-token diffusion head: what one token looks like, given the masked transformer's c.

DiffLoss of MAR (Li et al. 2024, arXiv 2406.11838): a small MLP with adaptive LayerNorm. The paper's
parametrisation is not known; flow matching (Lipman et al. 2023, arXiv 2210.02747) on straight lines
from noise to data is ours: the target is one line, and a few steps of a second-order solver do.

    f_tau = (1 - tau) eps + tau f,   target velocity f - eps,   tau in [0, 1] from noise to data
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

FREQUENCIES = 16


class DiffLoss(nn.Module):
    """The head: its forward is the loss of tokens f given c, its `velocity` is v(f_tau, tau, c)."""

    def __init__(self, channels: int, condition: int, width: int, depth: int):
        super().__init__()
        self.in_proj = nn.Linear(channels, width)
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.c_proj = nn.Linear(condition, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, channels)
        # Radians, half a turn to 64 turns. Computed on the CPU, so that all devices have the same.
        rate = math.pi * torch.logspace(0, 7, FREQUENCIES, base=2, dtype=torch.float32)
        self.register_buffer("rate", rate, persistent=False)
        for layer in (self.modulate, self.out_proj):  # start from a velocity of zero, as DiT does
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, f, c, tau, eps):
        """Return the flow-matching loss of each token (..., K), a mean over R draws and C channels.

        f (..., K, C) targets, c (..., K, D) conditions; tau (..., R, K) in [0, 1] and
        eps (..., R, K, C) standard normal are the R draws.
        """
        f = f.unsqueeze(-3)  # (..., 1, K, C)
        cond = self.c_proj(c).unsqueeze(-3)  # (..., 1, K, width)
        t = tau.unsqueeze(-1)  # (..., R, K, 1)
        v = self.velocity((1 - t) * eps + t * f, tau, cond)  # (..., R, K, C)
        return (v.float() - (f - eps)).square().mean((-3, -1))

    def velocity(self, f_tau, tau, cond):
        """Return v (..., C). f_tau (..., C), tau (...,), cond (..., width); the shapes broadcast.

        cond is `c_proj(c)`: a sampler computes it once, it is the same at every solver step.
        """
        y = F.silu(self.time(fourier(tau, self.rate)) + cond)  # (..., width)
        x = self.in_proj(f_tau)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulate(y).chunk(2, dim=-1)
        return self.out_proj(torch.addcmul(shift, self.norm(x), 1 + scale))


class AdaptiveBlock(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift), the three from the condition (adaLN-Zero)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x, y):
        shift, scale, gate = self.modulate(y).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.norm(x), 1 + scale)))


def fourier(tau, rate):
    """tau (...,) in [0, 1], rate (F,) in radians -> (..., 2 F) in [-1, 1]: sines and cosines."""
    phase = tau.float().unsqueeze(-1) * rate
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def solve(velocity, x, steps: int, solver: str = "midpoint"):
    """Integrate dx/dtau = velocity(x, tau) from tau = 0 (noise) to 1 (data).

    x (..., C); velocity gets tau as a number. euler is of order 1 and calls it once a step;
    midpoint is of order 2 and calls it twice.
    """
    h = 1.0 / steps
    for k in range(steps):
        if solver == "euler":
            x = x + h * velocity(x, k * h)
        else:
            middle = x + 0.5 * h * velocity(x, k * h)
            x = x + h * velocity(middle, (k + 0.5) * h)
    return x
