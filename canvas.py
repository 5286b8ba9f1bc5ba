"""The temporal transformer, the canvas network, and CanvasMAR, which joins them to MAR and head.

CanvasMAR, arXiv 2510.13669. B clips of T frames of N tokens of C channels; model width D;
K masked tokens a clip; R draws of the diffusion loss a token. Sampling is in sample.py.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffloss import DiffLoss
from mar import MAR, Attention, Block, choose_masked, gather_tokens, mask_ratio, masked_count


class CanvasMAR(nn.Module):
    """Latent clips f (B, T, N, C), each channel of mean 0 and std 1, and draws -> (loss, logs)."""

    def __init__(self, cfg):
        """cfg: its `model` section, .grid, .tokenizer.channels and .train.recompute are read."""
        super().__init__()
        m, grid, channels = cfg.model, cfg.grid, cfg.tokenizer.channels
        self.cfg, self.tokens, self.channels = m, grid**2, channels
        self.start = nn.Parameter(torch.zeros(self.tokens, channels))  # stands before frame 1
        self.null = nn.Parameter(torch.zeros(m.width))  # stands for a dropped z_t
        sizes = (channels, m.width, m.heads)
        self.temporal = Temporal(*sizes, m.temporal_depth, grid, m.window)
        self.canvas = None  # the baseline: one uniform [MASK] token
        if m.canvas:
            self.canvas = Canvas(*sizes, m.canvas_depth, grid)
        self.mar = MAR(*sizes, m.mar_depth, grid)
        self.head = DiffLoss(channels, m.width, m.head_width, m.head_depth)
        self.set_recompute(cfg.train.recompute)

    def forward(self, f, draws: "Draws"):
        """Return (loss, logs) of clips f (B, T, N, C).  L = L_diff + lambda L_canvas + L_static."""
        past = torch.cat([self.start.expand(len(f), 1, -1, -1), f[:, :-1]], dim=1)
        # Reported (Eq. 11, unchecked): noise on the latest frame; ours: on every frame of the past.
        prev = add_noise(past, draws.frame_eps, draws.frame_noise)  # (B, T, N, C)  frame i-1 at i
        z_t = self.temporal(prev)
        z_s, f_hat, static, extra = self.predict_canvas(z_t, prev, f, draws)
        l_canvas, logs = self.canvas_losses(f, f_hat, static)

        if self.canvas is not None:
            z_s = add_noise(z_s, draws.canvas_eps, draws.canvas_noise)  # z_s', reported (Eq. 12)
        # For guidance a clip loses either condition. The canvas always sees z_t.
        z_t = torch.where(draws.drop_temporal, self.null.to(z_t.dtype), z_t)
        z_s = torch.where(draws.drop_canvas, torch.zeros_like(z_s), z_s)

        masked = torch.zeros(f.shape[:3], dtype=torch.bool, device=f.device)
        masked = masked.flatten(1).scatter(1, draws.index, True).view_as(masked)  # (B, T, N)
        c = self.mar(f, masked, z_t, z_s, draws.index)  # (B, K, D)  of the masked tokens
        target = gather_tokens(f.flatten(1, 2), draws.index)  # (B, K, C)
        l_diff = self.head(target, c, draws.tau, draws.eps).mean()

        loss = l_diff + l_canvas + sum(extra.values())  # extra: of subclasses
        logs = {"loss": loss, "diffusion": l_diff} | extra | logs
        return loss, {name: value.detach() for name, value in logs.items()}

    def predict_canvas(self, z_t, prev, target=None, draws=None, generators=None):
        """Return z_s (..., N, D), its picture f_hat (..., N, C), static (..., N), {name: loss}.

        z_t (..., N, D), prev (..., N, C). The rest is for subclasses: the true frames and draws in
        training, a generator a clip in sampling. Without a canvas z_s is zero, the others None.
        """
        if self.canvas is None:
            return torch.zeros_like(z_t), None, None, {}
        z_s, f_hat, static = self.canvas(z_t, prev)
        return z_s, f_hat, static, {}

    def canvas_losses(self, f, f_hat, static):
        """Return lambda L_canvas + L_static and the figures for the log."""
        if f_hat is None:
            return 0.0, {}
        error = (f_hat.float() - f).square().mean(-1)  # (B, T, N)
        l_static = (static.float() - (-error.detach()).exp()).square().mean()
        # Of frames 2..T: a canvas no better than a copy of the frame before has learned nothing.
        logs = {"canvas": error[:, 1:].mean(), "copy": (f[:, 1:] - f[:, :-1]).square().mean()}
        logs["static"] = l_static
        return self.cfg.canvas_weight * error.mean() + l_static, logs

    def draw(self, generators: list[torch.Generator], frames: int, ratio: float | None = None):
        """Draw all random numbers of a training step, with one generator a clip, on its device.

        `ratio` fixes the mask ratio of every frame; otherwise it follows `mask_ratio`, stratified
        over the frames of a clip. What a clip gets does not depend on the others of its batch.
        """
        m, N, R = self.cfg, self.tokens, self.cfg.diffusion_repeat
        K = masked_count(frames, N) if ratio is None else max(1, round(ratio * frames * N))
        rand = partial(per_clip, torch.rand, generators)
        randn = partial(per_clip, torch.randn, generators)

        u, stratum = rand(frames), rand(frames).argsort(-1)
        ratios = mask_ratio((stratum + u) / frames) if ratio is None else torch.full_like(u, ratio)
        index = choose_masked(ratios, rand(frames, N).argsort(-1), K)  # (B, K)
        drop = rand(2)[..., None, None, None]
        both = (drop[:, 0] < m.drop_temporal) & m.drop_nested
        # Drawn for every token, so that a token's noise is the same at every mask ratio.
        tau = rand(R, frames * N).gather(2, index[:, None].expand(-1, R, -1))
        eps = gather_tokens(randn(frames * N, R, self.channels).flatten(2), index)
        low, high = m.frame_noise_min, m.frame_noise_max
        return Draws(
            index=index,
            tau=tau,
            eps=eps.unflatten(2, (R, -1)).transpose(1, 2),
            canvas_noise=m.canvas_noise_max * rand(frames)[..., None, None],
            canvas_eps=randn(frames, N, m.width),
            drop_temporal=drop[:, 0] < m.drop_temporal,
            drop_canvas=(drop[:, 1] < m.drop_canvas) | both,
            frame_noise=low + (high - low) * rand(frames)[..., None, None],
            frame_eps=randn(frames, N, self.channels),
        )

    def set_recompute(self, recompute: bool) -> None:
        """Turn activation checkpointing of every block on or off."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = recompute


@dataclass
class Draws:
    """The random numbers of one training step."""

    index: torch.Tensor  # (B, K) masked tokens, into T*N, no two alike in a clip
    tau: torch.Tensor  # (B, R, K) diffusion times in [0, 1)
    eps: torch.Tensor  # (B, R, K, C) diffusion noise, standard normal
    canvas_noise: torch.Tensor  # (B, T, 1, 1) r' in [0, 1], the level of the noise on the canvas
    canvas_eps: torch.Tensor  # (B, T, N, D) standard normal
    drop_temporal: torch.Tensor  # (B, 1, 1, 1) bool
    drop_canvas: torch.Tensor  # (B, 1, 1, 1) bool
    frame_noise: torch.Tensor  # (B, T, 1, 1) r in [0, 1], the level of the noise on past frames
    frame_eps: torch.Tensor  # (B, T, N, C) standard normal

    def sampled(self, frame_noise: float, canvas_noise: float) -> "Draws":
        """Return the same draws as in sampling: both conditions kept, fixed levels of noise."""
        levels = {"frame_noise": frame_noise, "canvas_noise": canvas_noise}
        levels |= {"drop_temporal": False, "drop_canvas": False}
        return replace(self, **{k: torch.full_like(getattr(self, k), v) for k, v in levels.items()})


def add_noise(x, eps, level):
    """Return x (1 - level) + eps level, level in [0, 1]: reported as Eq. 11 and 12, unchecked."""
    return x * (1 - level) + eps * level


def per_clip(kind, generators, *shape):
    """Stack kind(*shape), torch.rand or torch.randn, of each clip's generator: (B, *shape)."""
    return torch.stack([kind(*shape, generator=g, device=g.device) for g in generators])


class Temporal(nn.Module):
    """The temporal transformer: prev (B, T, N, C) -> z_t (B, T, N, D).

    It is causal across frames and bidirectional within one. Each frame attends to the latest
    `window` frames in training and in sampling alike, so that a long rollout looks back as far as
    training did. The window, rotary time positions and the difference to the frame before are ours.
    """

    def __init__(self, channels, width, heads, depth, grid, window):
        super().__init__()
        self.window, self.tokens = window, grid**2
        self.in_proj = nn.Linear(2 * channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(grid**2, width))
        attention = partial(CausalAttention, self.tokens, window)
        self.blocks = nn.ModuleList(Block(width, heads, grid, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        half = width // heads // 2
        frequency = 100 ** (-torch.arange(half) / half)  # radians per frame
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, prev, cache: "Cache | None" = None):
        """Return z_t of all frames; with a cache, prev are those after its frames: the same z_t."""
        first = cache.frames if cache else 0
        index = torch.arange(first, first + prev.shape[1], device=prev.device)
        earlier = torch.cat([cache.latest if first else prev[:, :1], prev[:, :-1]], dim=1)
        # The start and the frame after it have no frame before: their difference is zero.
        earlier = torch.where(index[:, None, None] < 2, prev, earlier)
        x = self.in_proj(torch.cat([prev, prev - earlier], dim=-1)) + self.position
        x = x.flatten(1, 2)  # (B, T*N, D)
        angle = index.repeat_interleave(self.tokens)[:, None] * self.frequency  # (T*N, d/2)
        for i, block in enumerate(self.blocks):
            x = block(x, angle, cache and cache.layers[i])
        if cache:
            cache.frames, cache.latest = first + prev.shape[1], prev[:, -1:]
        return self.norm(x).unflatten(1, prev.shape[1:3])


class CausalAttention(Attention):
    """Each frame of N tokens attends to itself and the window - 1 before it; rotary in time."""

    def __init__(self, tokens: int, window: int, width: int, heads: int):
        super().__init__(width, heads)
        self.tokens, self.window = tokens, window

    def attend(self, q, k, v, angle, cache=None):
        """q, k, v (B, heads, T*N, d), angle (T*N, d/2) radians: frame by frame, no masked half."""
        q, k = rotate(torch.stack([q, k]), angle)
        frames = zip(*(x.split(self.tokens, dim=2) for x in (q, k, v)))
        out = []
        for i, (queries, new_keys, new_values) in enumerate(frames):
            if cache:
                keys, values = cache.append(new_keys, new_values)
            else:
                window = slice(max(0, i + 1 - self.window) * self.tokens, (i + 1) * self.tokens)
                keys, values = k[:, :, window], v[:, :, window]
            out.append(F.scaled_dot_product_attention(queries, keys, values))
        return torch.cat(out, dim=2)


def rotate(x, angle):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    x (..., L, d), angle (L, d/2) in radians -> (..., L, d).
    """
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Cache:
    """What `Temporal` keeps of earlier frames: each layer's keys and values, and the last frame."""

    def __init__(self, temporal: Temporal):
        self.frames, self.latest = 0, None
        self.layers = [LayerCache(temporal.window) for _ in temporal.blocks]


class LayerCache:
    """Keys and values of the latest `window` frames, in a ring of fixed size."""

    def __init__(self, window: int):
        self.window, self.frames, self.ring = window, 0, None

    def append(self, k, v):
        """Put a frame's k, v (B, heads, N, d) over the oldest; return all that are kept.

        Their order does not matter: time is in the rotation of the keys.
        """
        N = k.shape[2]
        if self.ring is None:
            self.ring = k.new_empty(2, *k.shape[:2], self.window * N, k.shape[-1])
        slot = self.frames % self.window * N
        self.ring[0, :, :, slot : slot + N] = k
        self.ring[1, :, :, slot : slot + N] = v
        self.frames += 1
        kept = self.ring[:, :, :, : min(self.frames, self.window) * N]
        return kept[0], kept[1]


class Canvas(nn.Module):
    """The canvas network: z_t (..., N, D) and the frame before, prev (..., N, C) -> the canvas.

    Returns z_s (..., N, D), its picture f_hat = W z_s (..., N, C), and for each
    token a guess of exp(- its squared error) (..., N), the staticness. Frame by frame, in one shot,
    trained with L2: the mean over possible futures, so it is blurred. z_s has unit variance per
    token, so that the level of its noise is relative: ours.
    """

    def __init__(self, channels: int, width: int, heads: int, depth: int, grid: int):
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(Block(width, heads, grid) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out_proj = nn.Linear(width, channels)  # W
        self.staticness = nn.Linear(width, 1)

    def forward(self, z_t, prev):
        """Return (z_s, f_hat, staticness in (0, 1))."""
        x = (z_t + self.embed(prev)).flatten(0, -3)  # (frames, N, D)
        for block in self.blocks:
            x = block(x)
        z_s = self.norm(x).view_as(z_t)
        static = self.staticness(z_s.detach()).squeeze(-1).sigmoid()  # trains itself alone: ours
        return z_s, self.out_proj(z_s), static


def clip_generator(seed: int, clip: int, device="cpu") -> torch.Generator:
    """Return the random stream of one clip, a function of (seed, clip index), never of the batch.

    Sampling draws on the CPU for every device. Training draws on its own, and devices of another
    kind draw other numbers.
    """
    state = np.random.SeedSequence([seed, clip]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def to_device(rows, device):
    """Stack rows drawn on the CPU, for the same numbers on all devices; a GPU does not wait."""
    stacked = torch.stack(rows)
    if device.type == "cuda":
        return stacked.pin_memory().to(device, non_blocking=True)
    return stacked.to(device)


@torch.no_grad()
def validate(model: CanvasMAR, f, seed: int, opts, ratios=(0.1, 0.3, 0.7, 1.0)) -> dict[str, float]:
    """Return losses on held-out latents f (B, T, N, C), nothing dropped, noise as in sampling.

    opts: the `sample` section. The draws are the same every time on one kind of device.
    `diffusion@r` is the diffusion loss at mask ratio r: it must be smaller at smaller r, or the
    tokens that are known are ignored. `canvas` and `copy` are the mean squared errors of the canvas
    and of repeating the last frame.
    """
    result = {}
    for ratio in ratios:
        generators = [clip_generator(seed, clip, f.device) for clip in range(len(f))]
        draws = model.draw(generators, f.shape[1], ratio)
        _, logs = model(f, draws.sampled(opts.frame_noise, opts.canvas_noise))
        result[f"diffusion@{ratio}"] = logs["diffusion"].item()
    return result | {name: logs[name].item() for name in ("canvas", "copy") if name in logs}
