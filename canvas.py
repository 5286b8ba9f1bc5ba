"""The temporal transformer, the canvas network, the noise on the canvas, and CanvasMAR, which joins them to MAR.

CanvasMAR, arXiv 2510.13669. B clips, T frames, N tokens a frame, C channels a token, D model width.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from support import config
from extensions.choice import REPEAT, Choice
from diffloss import DiffLoss
from mar import MAR, Block, choose_masked, mask_ratio, masked_count, rotate, take


class CanvasMAR(nn.Module):
    """Latent clips f (B, T, N, C) and random draws -> (loss, logs). Sampling is in `sample.py`."""

    def __init__(self, cfg: config.Config):
        super().__init__()
        m, grid, channels = cfg.model, cfg.grid, cfg.tokenizer.channels
        self.cfg, self.tokens, self.channels = m, grid**2, channels
        self.start = nn.Parameter(
            torch.zeros(self.tokens, channels)
        )  # stands before the first frame
        self.null = nn.Parameter(torch.zeros(m.width))  # stands for a dropped z_t
        self.temporal = Temporal(channels, m.width, m.heads, m.temporal_depth, grid, m.window)
        self.canvas = (
            Canvas(channels, m.width, m.heads, m.canvas_depth, grid, m.canvas_change)
            if m.canvas
            else None
        )
        self.choice = Choice(channels, self.tokens, m) if m.canvas_latent else None
        self.mar = MAR(channels, m.width, m.heads, m.mar_depth, grid, m.canvas_under)
        self.head = DiffLoss(channels, m.width, m.head_width, m.head_depth)
        for block in (part for part in self.modules() if isinstance(part, Block)):
            block.recompute = cfg.train.recompute

    def forward(self, f, draws: "Draws"):
        """L = L_diff + lambda L_canvas. Logs: loss, diffusion and, with a canvas, canvas and copy (the mean squared
        error of the canvas and of the frame before, over frames that have one)."""
        z_t, z_s, others, logs = self.conditions(f, draws)
        masked = (
            torch.zeros(f.shape[:3], dtype=torch.bool, device=f.device)
            .flatten(1)
            .scatter(1, draws.masked, True)
        )
        frames = partial(rearrange, pattern="b t n d -> (b t) n d")
        # The last MLP and the head run on the masked tokens only, always K of them.
        c = self.mar(
            frames(f), masked.view(-1, self.tokens), frames(z_t), frames(z_s), draws.masked
        )  # (B, K, D)
        diffusion = self.head.loss(
            take(f.flatten(1, 2), draws.masked), c, draws.tau, draws.eps
        ).mean()
        loss = diffusion + others
        return loss, {"loss": loss.detach(), "diffusion": diffusion.detach(), **logs}

    def conditions(self, f, draws: "Draws"):
        """What the masked transformer is told: z_t and z_s (B, T, N, D), noisy and dropped as the draws say; lambda L_canvas (and what `Choice` adds) and its logs."""
        past = f[:, :-1] + draws.past if self.cfg.past_noise else f[:, :-1]
        p = torch.cat(
            [self.start.expand(len(f), 1, -1, -1), past], dim=1
        )  # (B, T, N, C) the frame before each
        z_t = self.temporal(p)  # (B, T, N, D)
        logs, others, kept = {}, f.new_zeros(()), ~draws.drop_temporal[:, None, None, None]
        told = torch.where(kept, z_t, self.null.to(z_t.dtype))
        if self.canvas is None:
            z_s = torch.zeros_like(z_t)  # the plain [MASK] token: the baseline
        else:
            read = z_t
            if self.choice:
                read, others, logs = self.choice(
                    f, torch.cat([p[:, :1], f[:, :-1]], dim=1), z_t, told, draws
                )  # before, without noise
                told = (
                    torch.where(kept, read, self.null.to(z_t.dtype))
                    if self.cfg.choice_tells == "both"
                    else told
                )
            z_s, f_hat = self.canvas(read, p)  # (B, T, N, D), (B, T, N, C)
            error = (f_hat.float() - f).square()
            others = self.cfg.canvas_weight * error.mean() + others
            logs |= {
                "canvas": error[:, 1:].mean().detach(),
                "copy": (f[:, 1:] - f[:, :-1]).square().mean(),
            }
            z_s = z_s if self.cfg.canvas_gradient else z_s.detach()
            z_s = self.seen(z_s, f_hat, draws.sigma, draws.noise)
            z_s = torch.where(draws.drop_canvas[:, None, None, None], torch.zeros_like(z_s), z_s)
        return told, z_s, others, logs

    def seen(self, z_s, f_hat, sigma=None, noise=None):
        """What the masked transformer sees of the canvas (z_s, f_hat), with canvas augmentation if sigma and noise are given."""
        if self.cfg.canvas_as == "features":
            return z_s if sigma is None else perturb(z_s, sigma, noise)
        f_hat = f_hat if self.cfg.canvas_gradient else f_hat.detach()
        return self.mar.embed(
            f_hat if sigma is None else perturb(f_hat, sigma, noise[..., : self.channels])
        )

    def draw(
        self, generators: list[torch.Generator], frames: int, ratio: float | None = None
    ) -> "Draws":
        """All randomness of one training step, one generator per clip, on the generators' device: a CPU and a GPU draw other numbers.

        `ratio` fixes the mask ratio of every frame, otherwise it follows `mask_ratio`, stratified over a clip's frames.
        """
        m, n = self.cfg, self.tokens
        k = masked_count(frames, n) if ratio is None else max(1, round(ratio * frames * n))

        def each(kind, *shape):
            return torch.stack([kind(*shape, generator=g, device=g.device) for g in generators])

        u, order = each(torch.rand, frames), each(torch.rand, frames).argsort(-1)
        share = mask_ratio((order + u) / frames) if ratio is None else torch.full_like(u, ratio)
        rank = each(torch.rand, frames, n).argsort(-1)
        drop, masked = each(torch.rand, 2), choose_masked(share, rank, k)
        # Drawn for every token, so that a token's noise is the same at every mask ratio.
        rows = torch.arange(len(masked), device=masked.device)[:, None]
        return Draws(
            masked=masked,
            tau=each(torch.rand, m.diffusion_repeat, frames * n).gather(
                2, masked[:, None].expand(-1, m.diffusion_repeat, -1)
            ),
            eps=each(torch.randn, frames * n, m.diffusion_repeat, self.channels)[
                rows, masked
            ].transpose(1, 2),
            sigma=m.canvas_noise * each(torch.rand, frames),
            noise=each(torch.randn, frames, n, m.width),
            drop_temporal=drop[:, 0] < m.drop_temporal,
            drop_canvas=drop[:, 1] < m.drop_canvas,
            past=m.past_noise
            * each(torch.rand, frames - 1)[..., None, None]
            * each(torch.randn, frames - 1, n, self.channels),
            w_noise=each(torch.randn, frames, m.canvas_latent),
            w_tau=each(torch.rand, REPEAT * bool(m.canvas_latent), frames),
            w_eps=each(torch.randn, REPEAT * bool(m.canvas_latent), frames, m.canvas_latent),
            w_told=each(torch.rand, frames * bool(m.canvas_latent)) >= m.drop_choice,
        )


@dataclass
class Draws:
    """The random numbers of one training step, R = diffusion_repeat, K masked tokens a clip."""

    masked: torch.Tensor  # (B, K) places in T*N, no two alike in a clip
    tau: torch.Tensor  # (B, R, K) in [0, 1)
    eps: torch.Tensor  # (B, R, K, C) standard normal
    sigma: torch.Tensor  # (B, T) level of the noise on the canvas, in [0, canvas_noise)
    noise: torch.Tensor  # (B, T, N, D) standard normal
    drop_temporal: torch.Tensor  # (B,) bool
    drop_canvas: torch.Tensor  # (B,) bool
    past: torch.Tensor  # (B, T-1, N, C) noise on the frames that are looked back at, its level uniform in [0, past_noise) a frame
    w_noise: (
        torch.Tensor
    )  # (B, T, L) standard normal, the noise of `Choice`; L = canvas_latent, 0 without
    w_tau: torch.Tensor  # (B, R, T) in [0, 1) and
    w_eps: torch.Tensor  # (B, R, T, L) standard normal, of its prior's loss
    w_told: torch.Tensor  # (B, T) bool, whether the canvas is told w

    def undropped(self) -> "Draws":
        """The same draws with both conditions kept and no noise: what sampling sees."""
        keep = torch.zeros_like(self.drop_temporal)
        return replace(
            self,
            sigma=torch.zeros_like(self.sigma),
            drop_temporal=keep,
            drop_canvas=keep,
            past=torch.zeros_like(self.past),
            w_told=torch.ones_like(self.w_told),
        )


def perturb(z_s, sigma, noise):
    """Noise-based canvas augmentation: z_s' = z_s + sigma * noise. z_s, noise (B, T, N, D), sigma (B, T).

    z_s leaves the canvas with unit variance per token, so sigma is relative to it: our choice.
    """
    return z_s + sigma[..., None, None] * noise


class Temporal(nn.Module):
    """The temporal transformer: p (B, T, N, C) -> z_t (B, T, N, D), causal across frames, bidirectional inside one.

    Each frame attends to the latest `window` frames. Training and sampling share that window, so that a long rollout looks
    back as far as training did (our choice, as are the rotary time positions and the difference to the frame before).
    """

    def __init__(self, channels: int, width: int, heads: int, depth: int, grid: int, window: int):
        super().__init__()
        self.window, self.tokens = window, grid**2
        self.enter = nn.Linear(2 * channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(grid**2, width))
        self.blocks = nn.ModuleList(Block(width, heads, grid) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        half = width // heads // 2
        self.register_buffer(
            "frequency", 100 ** (-torch.arange(half) / half), persistent=False
        )  # radians per frame

    def forward(self, p, cache: "Cache | None" = None):
        """All frames at once, or with a cache those that follow the frames it holds: the result is the same."""
        frames, first = p.shape[1], cache.index if cache else 0
        number = torch.arange(first, first + frames, device=p.device)
        before = torch.cat([cache.previous if first else p[:, :1], p[:, :-1]], dim=1)
        before = torch.where(
            number[:, None, None] < 2, p, before
        )  # the start frame has no velocity to tell
        turn = number.repeat_interleave(self.tokens)[:, None] * self.frequency  # (T*N, d/2) radians
        x = (self.enter(torch.cat([p, p - before], dim=-1)) + self.position).flatten(
            1, 2
        )  # (B, T*N, D)
        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                partial(
                    self._attend, turn=turn, held=partial(cache.store, layer) if cache else None
                ),
            )
        if cache:
            cache.index, cache.previous = first + frames, p[:, -1:]
        return self.norm(x).unflatten(1, p.shape[1:3])

    def _attend(self, q, k, v, turn, held):
        """Each frame's queries read the window that ends with it: of causal attention no masked half is computed."""
        q, k = rotate(torch.stack([q, k]), turn)
        out = []
        for i, frame in enumerate(q.split(self.tokens, dim=2)):
            begin, end = (max(0, i + 1 - self.window) * self.tokens, (i + 1) * self.tokens)
            if held:
                keys = held(i, k[:, :, end - self.tokens : end], v[:, :, end - self.tokens : end])
            else:
                keys = k[:, :, begin:end], v[:, :, begin:end]
            out.append(F.scaled_dot_product_attention(frame, *keys))
        return torch.cat(out, dim=2)


class Cache:
    """Keys and values of the latest `window` frames, layer by layer, in a ring of fixed size."""

    def __init__(self, temporal: Temporal):
        self.window, self.tokens, self.index, self.previous = (
            temporal.window,
            temporal.tokens,
            0,
            None,
        )
        self.rings = [None] * len(temporal.blocks)

    def store(self, layer, ahead, k, v):
        """Put k, v (B, heads, N, d) of frame index + ahead over the oldest; return all that are held (their order is no matter)."""
        if self.rings[layer] is None:
            self.rings[layer] = k.new_empty(2, *k.shape[:2], self.window * self.tokens, k.shape[-1])
        ring, frame = self.rings[layer], self.index + ahead
        slot, held = frame % self.window * self.tokens, min(frame + 1, self.window) * self.tokens
        ring[0, :, :, slot : slot + self.tokens], ring[1, :, :, slot : slot + self.tokens] = k, v
        return ring[0, :, :, :held], ring[1, :, :, :held]


class Canvas(nn.Module):
    """The canvas network: z_t and the frame before, p -> the canvas z_s (..., N, D) and its picture W z_s, or p + W z_s, (..., N, C).

    Frame by frame, one shot, trained with L2: the mean over possible futures, so it is blurred. The output is normalised
    to unit variance per token, so that the noise of `perturb` has a known relative level.
    """

    def __init__(self, channels: int, width: int, heads: int, depth: int, grid: int, change: bool):
        super().__init__()
        self.change, self.embed = change, nn.Linear(channels, width)
        self.blocks = nn.ModuleList(Block(width, heads, grid) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = nn.Linear(width, channels)  # W

    def forward(self, z_t, p):
        x = (z_t + self.embed(p)).flatten(0, -3)  # (frames, N, D)
        for block in self.blocks:
            x = block(x)
        z_s = self.norm(x).view_as(z_t)
        return z_s, p + self.leave(z_s) if self.change else self.leave(z_s)


def clip_generator(seed: int, clip: int, device="cpu") -> torch.Generator:
    """The stream of random numbers of one clip: (seed, clip index) and the kind of device decide it, never the batch. Sampling
    draws on the CPU for every device; training draws on its own, so that a run on a GPU sees other noise than one on a CPU."""
    return torch.Generator(device).manual_seed(
        int(np.random.SeedSequence([seed, clip]).generate_state(1)[0])
    )


@torch.no_grad()
def validate(model: CanvasMAR, f, seed: int, ratios=(0.1, 0.3, 0.7, 1.0)) -> dict[str, float]:
    """Losses on held-out latents f (B, T, N, C), nothing dropped, no noise on canvas or past, the same draws every time on one
    kind of device. A model with a latent is told that of the true frame (its posterior): its `diffusion@r` is not to be
    compared with that of a model without one.

    `diffusion@r` is the diffusion loss at mask ratio r: it must fall with r, or the masked transformer ignores the tokens
    it is given. `canvas` and `copy` are the mean squared errors of the canvas and of repeating the frame before.
    """
    result = {}
    for ratio in ratios:
        generators = [clip_generator(seed, clip, f.device) for clip in range(len(f))]
        _, logs = model(f, model.draw(generators, f.shape[1], ratio).undropped())
        result[f"diffusion@{ratio}"] = logs["diffusion"].item()
    return result | {name: logs[name].item() for name in ("canvas", "copy") if name in logs}
