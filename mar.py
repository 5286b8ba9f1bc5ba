"""The masked transformer of one frame, and the pure functions that say which tokens are masked, and when each is drawn.

Masked autoregression on continuous tokens after MAR (Li et al. 2024, arXiv 2406.11838).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint


class MAR(nn.Module):
    """c = MAR(u): every token of a frame sees every other. The canvas stands where MAR has a uniform [MASK] token."""

    def __init__(self, channels: int, width: int, heads: int, depth: int, grid: int, under: bool):
        super().__init__()
        self.under, self.embed = under, nn.Linear(channels, width)  # E
        self.temporal = nn.Linear(width, width)  # P
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.position = nn.Parameter(0.02 * torch.randn(grid**2, width))
        self.blocks = nn.ModuleList(Block(width, heads, grid) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, f, masked, z_t, z_s, at):
        """f (B, N, C), masked (B, N) bool, z_t (B, N, D), z_s (B, N, D) -> c of the tokens asked for. f is not read where masked.

        at (G, k) says which: their places among all tokens of each of G groups of B / G frames. Returns c (G, k, D).
        """
        known = self.embed(f.masked_fill(masked[..., None], 0))
        known = known + z_s if self.under else known
        u = torch.where(
            masked[..., None], self.mask_token + z_s, known
        )  # the canvas as a non-uniform mask
        u = u + self.position + self.temporal(z_t)  # (B, N, D)
        *blocks, last = self.blocks
        for block in blocks:
            u = block(u)
        return self.norm(last(u, at=at))  # (G, k, D)


class Block(nn.Module):
    """Pre-norm transformer block on frames of grid * grid tokens, x (B, T*N, D) -> (B, T*N, D).

    It begins with a depthwise 3x3 convolution inside each frame, a conditional position encoding (Chu et al. 2021, arXiv
    2102.10882): our choice. With `recompute` only its input is kept for the backward pass, which computes the rest again.
    """

    def __init__(self, width: int, heads: int, grid: int):
        super().__init__()
        self.grid, self.recompute = grid, False
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.local.weight = nn.Parameter(
            self.local.weight.detach().to(memory_format=torch.channels_last)
        )  # as x lies
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, attend=F.scaled_dot_product_attention, at=None):
        """attend as in `Attention`. at (G, k): the MLP runs, and x (G, k, D) is given back, for these tokens only (see `MAR`)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._forward, x, attend, at, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(x, attend, at)

    def _forward(self, x, attend, at):
        images = rearrange(x, "b (t h w) d -> (b t) d h w", h=self.grid, w=self.grid)
        x = x + rearrange(self.local(images), "(b t) d h w -> b (t h w) d", b=len(x))
        x = x + self.attention(self.norm1(x), attend)
        if at is not None:
            x = take(x.reshape(len(at), -1, x.shape[-1]), at)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head attention, x (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, attend=F.scaled_dot_product_attention):
        """attend(q, k, v), each (B, heads, L, d), gives what the queries read, (B, heads, L, d): who sees whom is its business."""
        q, k, v = rearrange(
            self.qkv(x), "b l (three heads d) -> three b heads l d", three=3, heads=self.heads
        )
        return self.out(rearrange(attend(q, k, v), "b heads l d -> b l (heads d)"))


def take(x, at):
    """Rows `at` (G, k) of x (G, L, D): (G, k, D)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def rotate(x, turn):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): x (..., L, d), turn (L, d/2) in radians."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


# -------------------------------------------------------------------------------- training: which tokens are masked


def mask_ratio(u):
    """u in [0, 1] -> share of masked tokens in [0, 1], cos(pi/2 u).

    Our choice. Of a uniform u it reaches every share that sampling visits; MAR's own law (at least 0.7) never trains the
    last steps of a frame. What a frame gets in the end also depends on its clip: see `choose_masked`.
    """
    return torch.cos(math.pi / 2 * u)


def masked_count(frames: int, tokens: int) -> int:
    """Masked tokens a clip: the mean of `mask_ratio`, 2/pi. The same for every clip, so that all shapes are static."""
    return max(1, round(frames * tokens * 2 / math.pi))


def choose_masked(ratio, rank, count: int):
    """Pick exactly `count` masked tokens of each clip, about ratio * N in each frame: indices (B, count) into T*N.

    ratio (B, T) in [0, 1]; rank (B, T, N), each frame's random order of its tokens, 0..N-1. A token is masked when its
    rank lies below ratio * N, up to a shift common to the clip that makes the count exact. So a clip of T frames and
    2/pi T N masked tokens has at least 1 - (1 - 2/pi) T of any frame masked: 27 % for T = 2, nothing from T = 3 on.
    """
    score = ratio[..., None] - (rank + 0.5) / rank.shape[-1]
    return score.flatten(1).topk(count, dim=1).indices


# --------------------------------------------------------------------------- sampling: which tokens are drawn, and when


def reveal_schedule(tokens: int, steps: int, order: str) -> list[int]:
    """Tokens known after each of S steps: strictly rising, the last is N. Needs 1 <= S <= N.

    random: N (1 - cos(pi/2 s/S)), few first, as in MAR. motion: N sin(pi/2 s/S), the many still tokens first and the few
    moving ones in the small last steps. The second is our choice: the cosine would draw all moving tokens at once.
    """
    share = {"random": lambda a: 1 - math.cos(a), "motion": math.sin}[order]
    known, schedule = 0, []
    for s in range(1, steps + 1):
        known = max(known + 1, round(tokens * share(math.pi / 2 * s / steps)))
        known = tokens if s == steps else min(known, tokens - (steps - s))
        schedule.append(known)
    return schedule


def random_order(noise):
    """noise (B, N) of distinct numbers -> (B, N): a permutation, token order[0] is revealed first."""
    return noise.argsort(dim=-1)


def motion_order(canvas, previous, noise, mix=0.25):
    """Tokens whose canvas differs least from the previous frame first (the later version's easy-to-hard order).

    canvas, previous (B, N, C) standardised latents; noise (B, N) uniform in [0, 1) -> (B, N), a permutation. The rank
    of the change is blended with `mix` of noise so that neighbours are not all drawn together: our choice.
    """
    change = (canvas - previous).square().mean(-1)
    rank = change.argsort(dim=-1).argsort(dim=-1) / change.shape[-1]
    return (rank + mix * noise).argsort(dim=-1)
