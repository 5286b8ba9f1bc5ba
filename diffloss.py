"""The per-token diffusion head: what one token looks like, given the masked transformer's c.

DiffLoss of MAR (Li et al. 2024, arXiv 2406.11838): a small MLP with adaptive LayerNorm. The paper's
parametrisation is not known; flow matching (Lipman et al. 2023, arXiv 2210.02747) on straight lines
from noise to data is ours: the target is one subtraction, and a few midpoint steps suffice.

    f_tau = (1 - tau) eps + tau f,   target velocity f - eps,   tau in [0, 1] from noise to data
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

FREQUENCIES = 16


class DiffLoss(nn.Module):
    """The head: forward is the loss of tokens f given c, `sample` draws them."""

    def __init__(self, channels: int, condition_width: int, width: int, depth: int):
        super().__init__()
        self.in_proj = nn.Linear(channels, width)
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.c_proj = nn.Linear(condition_width, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, channels)
        # Radians, half a turn to 64 turns. Computed on the CPU, so that all devices have the same.
        frequency = math.pi * torch.logspace(0, 7, FREQUENCIES, base=2, dtype=torch.float32)
        self.register_buffer("frequency", frequency, persistent=False)
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
        y = F.silu(self.time(fourier(tau, self.frequency)) + cond)  # (..., width)
        x = self.in_proj(f_tau)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulate(y).chunk(2, dim=-1)
        return self.out_proj(torch.addcmul(shift, self.norm(x), 1 + scale))

    def sample(self, c, eps, steps: int, solver: str = "midpoint", weights=(1.0,)):
        """Draw tokens (B, k, C) from noise eps (B, k, C), given c (n*B, k, D), branch after branch.

        The velocity is the sum of the n branches' velocities, each times its weight.
        """
        cond = self.c_proj(c).unflatten(0, (len(weights), -1))  # (n, B, k, width)

        def velocity(x, tau):
            v = self.velocity(x, x.new_full((1,), tau), cond).float()  # (n, B, k, C)
            return sum(weight * branch for weight, branch in zip(weights, v))

        return solve(velocity, eps, steps, solver)


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
        """x (..., width), y (..., width) time and condition -> (..., width)."""
        shift, scale, gate = self.modulate(y).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.norm(x), 1 + scale)))


def fourier(tau, frequency):
    """tau (...,) in [0, 1], frequency (F,) radians -> (..., 2 F) in [-1, 1]: sines, cosines."""
    phase = tau.float().unsqueeze(-1) * frequency
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
