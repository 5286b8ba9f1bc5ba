"""Detectors, which turn clips into features for scores of sets, and scores of frames with a truth.

features = detect_features(Offline(), clips)  # uint8 (clips, T, H, W, 3) -> (clips, 91)
frame_scores(truth, clips)                    # {"psnr": (clips,), "ssim": (clips,), ...}
"""

import functools
import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support import options
from support.config import UserError, warn

# --------------------------------------------------------------------------------------- detectors


class Offline(nn.Module):
    """Three 3D convolutions with fixed random weights. uint8 (B, T, H, W, 3) -> features (B, 91).

    Ours, for where no pretrained detector can be had; its figures are never to be called FVD. The
    features are the mean colour, the standard deviations over space and time of every channel at
    each of three scales, and the means of the last. Half of each layer's kernels add up to zero
    over time, so that they react to changes only.
    """

    name, label, path = "offline", "offline detector, random weights: NOT FVD", ""
    standardise = True  # see fvd.set_scores

    def __init__(self):
        super().__init__()
        draw = np.random.RandomState(0)  # the one NumPy stream that is frozen for good
        self.convs = nn.ModuleList()
        for inputs, outputs in ((3, 8), (8, 16), (16, 32)):
            conv = nn.Conv3d(inputs, outputs, 3, (1, 2, 2), 1, bias=False, padding_mode="replicate")
            weight = draw.standard_normal(conv.weight.shape) * (2 / (27 * inputs)) ** 0.5
            weight[: outputs // 2] -= weight[: outputs // 2].mean(2, keepdims=True)
            conv.weight.data = torch.from_numpy(weight.astype(np.float32))
            self.convs.append(conv)
        weights = b"".join(conv.weight.detach().numpy().tobytes() for conv in self.convs)
        self.sha256 = hashlib.sha256(weights).hexdigest()
        self.requires_grad_(False)

    def forward(self, video):
        """Return the features (B, 91) of uint8 (B, T, H, W, 3)."""
        x = video.movedim(-1, 1).float() / 127.5 - 1  # (B, 3, T, H, W)
        features = [x.mean((2, 3, 4))]
        for conv in self.convs:
            x = F.relu(conv(x))
            features.append(x.std((2, 3, 4), correction=0))
        return torch.cat([*features, x.mean((2, 3, 4))], 1)  # (B, 91)


class I3D(nn.Module):
    """The I3D network of Carreira and Zisserman. uint8 (B, T, H, W, 3) -> logits (B, 400).

    path: the usual `i3d_torchscript.pt`; with it the Fréchet distance is the FVD. Raises UserError
    for a file that is missing, no TorchScript, or does not answer I3D's call.
    """

    name, label, standardise = "i3d", "FVD", False

    def __init__(self, path):
        super().__init__()
        try:
            self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls TorchScript deprecated, at length
                self.net = torch.jit.load(path, map_location="cpu").eval()
        except (OSError, RuntimeError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise UserError(f"cannot read {path} as a TorchScript file: {cause}") from None
        self.path = path

    def forward(self, video):
        """Return the logits (B, 400) of uint8 (B, T, H, W, 3), T >= 9 or so. Raises UserError."""
        x, expected = video.movedim(-1, 1).float(), (len(video), 400)
        try:
            features = self.net(x, rescale=True, resize=True, return_features=True)
            got = tuple(getattr(features, "shape", ()))
            if got != expected:
                raise ValueError(f"it returns {got} where {expected} is expected")
        except torch.OutOfMemoryError:
            raise  # `config.user_message` says what helps
        except (RuntimeError, ValueError, torch.jit.Error) as error:
            why, of = str(error).strip().splitlines()[-1], f"clips of shape {tuple(x.shape[1:])}"
            what = f"{self.path} does not work as I3D on {of} (it needs about 10 frames)"
            raise UserError(f"{what}: {why}") from None
        return features.float()


def open_detectors(i3d: str | None, device) -> list[nn.Module]:
    """Return the offline detector, and I3D where its file is given. Raises UserError."""
    detectors = [Offline()] + ([I3D(i3d)] if i3d else [])
    return [detector.to(device).eval() for detector in detectors]


def describe(detector) -> dict:
    """Return which detector it is: its label, file and hash."""
    return {"is": detector.label, "file": str(detector.path), "sha256": detector.sha256}


def detect_features(detector, video, batch=64) -> torch.Tensor:
    """Return features of uint8 (clips, T, H, W, 3), float64 (clips, F) on the CPU.

    `batch` clips are on the detector's device at a time.
    """
    device = (*detector.parameters(), *detector.buffers(), torch.zeros(0))[0].device
    with torch.no_grad():
        parts = torch.as_tensor(video).split(batch)
        return torch.cat([detector(part.to(device)).cpu().double() for part in parts])


def add_options(parser):
    """Add the options of all that scores: detector, clips at once, device."""
    parser.add_argument("--i3d", help="i3d_torchscript.pt: also FVD, KVD, precision, recall on I3D")
    options.add_device(parser)


def check_counts(*counts: int) -> None:
    """Raise UserError where a set has too few clips for a covariance."""
    if min(counts) < 2:
        given = " and ".join(map(str, counts))
        raise UserError(f"a Fréchet distance needs at least two clips in each set, not {given}")


# ------------------------------------------------------------------- scores of frames with a truth


def frame_scores(real, fake, device="cpu", chunk=256) -> dict[str, np.ndarray]:
    """Return {score: (clips,)}, means over the frames of uint8 (clips, T, H, W, 3).

    SSIM is left out below 11 pixels, LPIPS where its weights are missing; `chunk` images at a time.
    """
    a, b = (torch.as_tensor(video).flatten(0, 1) for video in (real, fake))
    kinds = {"psnr": psnr}
    if min(a.shape[1:3]) >= 11:
        kinds["ssim"] = ssim
    if lpips(device):
        kinds["lpips"] = lpips(device)
    scores = {}
    for name, score in kinds.items():
        of_images = torch.cat([score(x, y) for x, y in zip(a.split(chunk), b.split(chunk))])
        scores[name] = of_images.unflatten(0, (len(real), -1)).mean(1).numpy()
    return scores


BEST = {"psnr": max, "ssim": max, "lpips": min}  # chooses the best of several samples of a clip


def psnr(a, b) -> torch.Tensor:
    """Return the peak signal-to-noise ratio in dB, at most 100, of uint8 (..., H, W, 3): (...,)."""
    a, b = (torch.as_tensor(x).cpu().double() for x in (a, b))
    error = (a - b).square().mean((-3, -2, -1))
    return 10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))


def ssim(a, b) -> torch.Tensor:
    """Return the structural similarity of uint8 images (n, H, W, 3): (n,), at most 1.

    Wang et al. 2004: a Gaussian window of 11 pixels and sigma 1.5, without padding; per channel,
    then the mean. Raises UserError below 11x11 pixels.
    """
    a, b = (torch.as_tensor(x).cpu().double().movedim(-1, -3) for x in (a, b))  # (n, 3, H, W)
    height, width = a.shape[-2:]
    if min(height, width) < 11:
        raise UserError(f"SSIM needs images of at least 11x11 pixels, not {height}x{width}")
    down, across = _windows(height), _windows(width)

    def smooth(x):
        return down @ x @ across.T  # (n, 3, H - 10, W - 10)

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    cov = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (above / below).mean((1, 2, 3))


def _windows(side: int) -> torch.Tensor:
    """Return (side - 10, side): a row of Gaussian weights for each place of the window."""
    offset = torch.arange(side)[None, :] - torch.arange(side - 10)[:, None] - 5
    weights = torch.where(offset.abs() <= 5, torch.exp(-(offset.double() ** 2) / (2 * 1.5**2)), 0)
    return weights / weights.sum(1, keepdim=True)


@functools.lru_cache(maxsize=None)
def lpips(device="cpu"):
    """Return torch-fidelity's LPIPS (VGG-16) as a function of two uint8 (n, H, W, 3) -> (n,).

    Lower is better. None where its weights are not in torch's hub folder: nothing is downloaded.
    """
    if not torch_fidelity():
        return None
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS
    from torchvision.models import VGG16_Weights

    folder = Path(torch.hub.get_dir(), "checkpoints")
    urls = (URL_VGG16_LPIPS, VGG16_Weights.IMAGENET1K_V1.url)
    if not all((folder / os.path.basename(url)).exists() for url in urls):
        return None
    net = SampleSimilarityLPIPS("lpips-vgg16").to(device)

    @torch.no_grad()
    def score(a, b):
        return net(*(x.to(device).movedim(-1, -3) for x in (a, b))).cpu()

    return score


@functools.lru_cache(maxsize=None)
def torch_fidelity():
    """Return the package torch_fidelity, or None, with a warning, where it cannot be imported.

    It imports torchvision, which raises errors of many types where it was built for another torch.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_fidelity as package
        return package
    except Exception as error:
        warn(
            f"no LPIPS, as torch-fidelity cannot be imported ({type(error).__name__}: "
            f"{str(error)[:200]}); it needs a torchvision that was built for torch "
            f"{torch.__version__}, from where that came: pip install torch-fidelity torchvision"
        )
