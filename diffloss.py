"""The per-token diffusion head: what one token looks like, given the masked transformer's vector for it.

DiffLoss of MAR (Li et al. 2024, arXiv 2406.11838): a small MLP with adaptive LayerNorm. The paper leaves the
parametrisation open; flow matching (Lipman et al. 2023, arXiv 2210.02747) on straight lines from noise to data is our
choice, since the target is one line and a few steps of a second-order solver are enough.

    f_tau = (1 - tau) eps + tau f,   target velocity f - eps,   tau in [0, 1] from noise to data
"""

import math

import torch
from torch import nn


class DiffLoss(nn.Module):
    """v_theta(f_tau, tau, c): f_tau (..., C), tau (...,), c (..., D) -> velocity (..., C)."""

    def __init__(self, channels: int, condition: int, width: int, depth: int):
        super().__init__()
        self.enter = nn.Linear(channels, width)
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.condition = nn.Linear(condition, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels)
        # Radians, half a turn up to 64 turns. Made on the CPU: Apple GPUs have no logspace, and every device gets the same bits.
        rate = math.pi * torch.logspace(0, 7, FREQUENCIES, base=2, dtype=torch.float32)
        self.register_buffer("rate", rate, persistent=False)
        for layer in (self.modulate, self.leave):  # start from a velocity of zero, as DiT does
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, f_tau, tau, c):
        return self.velocity(f_tau, tau, self.condition(c))

    def velocity(self, f_tau, tau, condition):
        """As `forward`, with `self.condition(c)` already computed: it is the same at every solver step. The shapes broadcast."""
        y = nn.functional.silu(self.time(fourier(tau, self.rate)) + condition)  # (..., width)
        x = self.enter(f_tau)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulate(y).chunk(2, dim=-1)
        return self.leave(torch.addcmul(shift, self.norm(x), 1 + scale))

    def loss(self, f, c, tau, eps):
        """Flow-matching loss per token, averaged over R repeats and C channels.

        f (..., K, C) targets, c (..., K, D) conditions; tau (..., R, K) in [0, 1] and eps (..., R, K, C) standard normal
        are the fresh draws of the R repeats. Returns (..., K).
        """
        f, condition = (
            f.unsqueeze(-3),
            self.condition(c).unsqueeze(-3),
        )  # (..., 1, K, C), (..., 1, K, width)
        t = tau.unsqueeze(-1)
        v = self.velocity((1 - t) * eps + t * f, tau, condition)  # (..., R, K, C)
        return (v.float() - (f - eps)).square().mean((-3, -1))


class AdaptiveBlock(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift), the three from the condition (adaLN-Zero)."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x, y):
        shift, scale, gate = self.modulate(y).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.norm(x), 1 + scale)))


FREQUENCIES = 16


def fourier(tau, rate):
    """tau (...,) in [0, 1], rate (F,) in radians -> (..., 2 F) in [-1, 1]: sines and cosines."""
    phase = tau.float().unsqueeze(-1) * rate
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def solve(velocity, x, steps: int, solver: str = "midpoint"):
    """Integrate dx/dtau = velocity(x, tau) from tau = 0 (noise) to 1 (data).

    x (..., C); velocity gets tau as a number. euler is of order 1 and calls it once a step; midpoint, of order 2, twice.
    """
    h = 1.0 / steps
    for k in range(steps):
        if solver == "euler":
            x = x + h * velocity(x, k * h)
        else:
            middle = x + 0.5 * h * velocity(x, k * h)
            x = x + h * velocity(middle, (k + 0.5) * h)
    return x
