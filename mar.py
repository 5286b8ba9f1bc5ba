"""The masked transformer, and pure functions: which tokens are masked, and when each is drawn.

Masked autoregression on continuous tokens after MAR (Li et al. 2024, arXiv 2406.11838).
B clips of T frames of N tokens of C channels; model width D; K tokens of each clip are asked for:
in training the masked ones, in sampling those of one step.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint


class MAR(nn.Module):
    """c = MAR(u), bidirectional in a frame; the canvas makes MAR's uniform [MASK] non-uniform."""

    def __init__(self, channels: int, width: int, heads: int, depth: int, grid: int):
        super().__init__()
        self.embed = nn.Linear(channels, width)  # E
        self.z_t_proj = nn.Linear(width, width)  # P
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.position = nn.Parameter(0.02 * torch.randn(grid**2, width))
        self.blocks = nn.ModuleList(Block(width, heads, grid) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, f, masked, z_t, z_s, index):
        """Return c (B, K, D) of the tokens `index` (B, K), counted within the T*N of their clip.

        f (B, T, N, C), finite but without meaning where masked (B, T, N); z_t, z_s (B, T, N, D).
        """
        # The canvas is said to replace the mask token. Ours: it is added to it, so that a dropped
        # canvas, which is zero, leaves MAR's uniform [MASK].
        u = torch.where(masked[..., None], self.mask_token + z_s, self.embed(f))  # (B, T, N, D)
        u = u + self.position + self.z_t_proj(z_t)  # (B, T, N, D)
        u = u.flatten(0, 1)  # (B*T, N, D)
        *blocks, last = self.blocks
        for block in blocks:
            u = block(u)
        return self.norm(last(u, index=index))  # (B, K, D)


class Block(nn.Module):
    """Pre-norm transformer block on frames of grid * grid tokens, x (B, L, D) -> (B, L, D).

    It begins with a depthwise 3x3 convolution inside each frame, a conditional position encoding
    (Chu et al. 2021, arXiv 2102.10882): ours. With `recompute` only its input is kept for the
    backward pass, which computes the rest again.
    """

    def __init__(self, width: int, heads: int, grid: int, attention=None):
        super().__init__()
        self.grid, self.recompute = grid, False
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        channels_last = self.local.weight.detach().to(memory_format=torch.channels_last)
        self.local.weight = nn.Parameter(channels_last)  # its gradient's strides, or DDP warns
        self.norm1 = nn.LayerNorm(width)
        self.attention = (attention or Attention)(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, *args, index=None):
        """Return (B, L, D), or with `index` (G, K) only those tokens, (G, K, D).

        `args` go to the attention. `index` is for the last block: x holds the frames of G clips,
        B / G rows each; the MLP runs on K tokens of each clip, counted over its frames.
        """
        if self.recompute and torch.is_grad_enabled():
            options = dict(use_reentrant=False, preserve_rng_state=False)
            return checkpoint(self._forward, x, index, *args, **options)
        return self._forward(x, index, *args)

    def _forward(self, x, index, *args):
        images = rearrange(x, "b (t h w) d -> (b t) d h w", h=self.grid, w=self.grid)
        x = x + rearrange(self.local(images), "(b t) d h w -> b (t h w) d", b=len(x))
        x = x + self.attention(self.norm1(x), *args)
        if index is not None:
            x = gather_tokens(x.reshape(len(index), -1, x.shape[-1]), index)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head attention, x (B, L, D) -> (B, L, D): every token attends to every other."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, *args):
        qkv = rearrange(self.qkv(x), "b l (n heads d) -> n b heads l d", n=3, heads=self.heads)
        return self.out(rearrange(self.attend(*qkv, *args), "b heads l d -> b l (heads d)"))

    def attend(self, q, k, v):
        """q, k, v (B, heads, L, d) -> (B, heads, L, d)."""
        return F.scaled_dot_product_attention(q, k, v)


def gather_tokens(x, index):
    """Return the rows `index` (B, K) of x (B, L, D), as (B, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# ------------------------------------------------------------- training: which tokens are masked


def mask_ratio(u):
    """u in [0, 1] -> share of masked tokens in [0, 1], cos(pi/2 u).

    Ours, the paper's law is not known. For uniform u it covers every ratio that sampling visits;
    MAR's own law (at least 0.7) never trains the last steps of a frame. What a frame gets in the
    end also depends on its clip: see `choose_masked`.
    """
    return torch.cos(math.pi / 2 * u)


def masked_count(frames: int, tokens: int) -> int:
    """Return K, the masked tokens a clip: 2/pi of all, the mean of `mask_ratio`.

    It is the same for every clip, so that all shapes are static.
    """
    return round(frames * tokens * 2 / math.pi)


def choose_masked(ratio, rank, count: int):
    """Pick exactly `count` masked tokens of each clip, about ratio * N in each frame.

    ratio (B, T) in [0, 1]; rank (B, T, N), each frame's random order of its tokens, 0..N-1.
    Returns indices (B, count) into T*N. A token is masked when its rank lies below ratio * N, up to
    a shift common to the clip that makes the count exact. A clip of two frames would never have one
    with few masked tokens (2/pi of all leave at least 27 % each); one of three or more has.
    """
    score = ratio[..., None] - (rank + 0.5) / rank.shape[-1]
    return score.flatten(1).topk(count, dim=1).indices


# ------------------------------------------------- sampling: which tokens are drawn, and when


def reveal_schedule(tokens: int, steps: int, order: str) -> list[int]:
    """Return the tokens known after each of S steps: strictly rising, the last is N. 1 <= S <= N.

    random: N (1 - cos(pi/2 s/S)), few first, as in MAR. motion: N sin(pi/2 s/S), the many still
    tokens first and the few moving ones in the small last steps. The second is ours: the cosine
    would draw all moving tokens at once.
    """
    known, schedule = 0, []
    for s in range(1, steps + 1):
        angle = math.pi / 2 * s / steps
        fraction = 1 - math.cos(angle) if order == "random" else math.sin(angle)
        known = min(max(known + 1, round(tokens * fraction)), tokens - (steps - s))
        schedule.append(known)
    return schedule


def random_order(noise):
    """noise (B, N) of distinct numbers -> (B, N), a permutation: token order[0] is drawn first."""
    return noise.argsort(dim=-1)


def motion_order(static, noise, schedule):
    """Put confident tokens first, annealed to a random order: reported, of the later version.

    static (B, N), the higher the surer of its canvas a token is; noise (B, N) uniform in [0, 1);
    schedule: `reveal_schedule` -> (B, N), a permutation. Step s of S draws the tokens that are
    first by (1 - a) rank + a noise, a = (s - 1) / (S - 1), the last what is left: that is ours.
    """
    rank = static.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) / static.shape[-1]
    taken, parts, done = torch.zeros_like(static, dtype=torch.bool), [], 0
    for s, count in enumerate(schedule):
        a = s / max(1, len(schedule) - 1)
        score = torch.where(taken, math.inf, torch.lerp(rank, noise, a))
        parts.append(score.argsort(dim=-1)[:, : count - done])
        taken, done = taken.scatter(1, parts[-1], True), count
    return torch.cat(parts, dim=-1)
