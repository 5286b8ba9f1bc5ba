"""Scores of generated video, from uint8 arrays (clips, T, H, W, 3): Fréchet distance, KVD, precision and recall on the
features of a detector; PSNR, SSIM and LPIPS of frames against the truth.

    real, fake = Offline()(a), Offline()(b)
    set_scores(real, fake, Offline.standardise)     # {"frechet": ..., "kvd": ..., "precision": ..., "recall": ...}

Two detectors: I3D, from the usual TorchScript file, whose Fréchet distance is the FVD (Unterthiner et al. 2018, arXiv
1812.01717), and Offline, of fixed random weights, which needs no download and whose figures are never to be called FVD.
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

from support.config import UserError, warn

# ------------------------------------------------------------------------------------------------------------ detectors


class Offline(nn.Module):
    """Three 3D convolutions with fixed random weights. uint8 (B, T, H, W, 3) -> features (B, 91).

    The kernels of half of each layer's channels add up to zero over time, so that these see only what changes. The features
    are the standard deviations over space and time of every channel at each of the three scales, the means of the last, and
    the mean colour. Ours: it flags blur, noise, freezing and disorder where no pretrained detector can be had
    (`fvd.py sanity`), and compares models scored with the same number of clips, frames and pixels; nothing else.
    """

    name, label, standardise, path = (
        "offline",
        "offline detector, random weights: NOT FVD",
        True,
        "",
    )

    def __init__(self):
        super().__init__()
        draw = np.random.RandomState(0)  # the one NumPy stream that is frozen for good
        self.convs = nn.ModuleList()
        for inputs, outputs in ((3, 8), (8, 16), (16, 32)):
            conv = nn.Conv3d(
                inputs,
                outputs,
                3,
                stride=(1, 2, 2),
                padding=1,
                padding_mode="replicate",
                bias=False,
            )
            weight = draw.standard_normal(conv.weight.shape) * (2 / (27 * inputs)) ** 0.5
            weight[: outputs // 2] -= weight[: outputs // 2].mean(2, keepdims=True)
            conv.weight.data = torch.from_numpy(weight.astype(np.float32))
            self.convs.append(conv)
        self.sha256 = hashlib.sha256(
            b"".join(conv.weight.detach().numpy().tobytes() for conv in self.convs)
        ).hexdigest()
        self.requires_grad_(False)

    def forward(self, video):
        x = _channels_first(video) / 127.5 - 1  # (B, 3, T, H, W)
        features = [x.mean((2, 3, 4))]
        for conv in self.convs:
            x = F.relu(conv(x))
            features.append(x.std((2, 3, 4), correction=0))
        return torch.cat([*features, x.mean((2, 3, 4))], 1)  # (B, 91)


class I3D(nn.Module):
    """The I3D network of Carreira and Zisserman as the usual `i3d_torchscript.pt`. uint8 (B, T, H, W, 3) -> logits (B, 400).

    The file is called as model(video (B, 3, T, H, W) in 0..255, rescale=True, resize=True, return_features=True); clips need
    about 10 frames. Raises UserError for a file that is missing, no TorchScript, or does not answer that call.
    """

    name, label, standardise = "i3d", "FVD", False

    def __init__(self, path):
        super().__init__()
        try:
            self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            self.net = torch.jit.load(path, map_location="cpu").eval()
        except OSError as error:
            raise UserError(f"cannot read the detector {path}: {error.strerror}") from None
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{path} is not a TorchScript file: {str(error).splitlines()[0]}"
            ) from None
        self.path = path

    def forward(self, video):
        """uint8 (B, T, H, W, 3) -> (B, 400) float32. Raises UserError where the file does not answer so."""
        x = _channels_first(video)
        try:
            features = self.net(x, rescale=True, resize=True, return_features=True)
        except torch.OutOfMemoryError:
            raise UserError(
                f"not enough memory for I3D on {len(x)} clips of shape {tuple(x.shape[1:])}; a smaller --batch helps"
            ) from None
        except (RuntimeError, torch.jit.Error) as error:
            raise UserError(
                f"{self.path} does not work as I3D on clips of shape {tuple(x.shape[1:])} (it needs about 10 frames): "
                f"{str(error).strip().splitlines()[-1]}"
            ) from None
        if not torch.is_tensor(features) or features.shape != (len(x), 400):
            got = tuple(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise UserError(
                f"{self.path} is not the I3D detector: it returns {got} where ({len(x)}, 400) is expected"
            )
        return features.float()


def _channels_first(video):
    return torch.as_tensor(video).movedim(-1, 1).float()


def detect_features(detector, video, batch=64) -> torch.Tensor:
    """Features of uint8 (clips, T, H, W, 3), float64 (clips, F) on the CPU, `batch` clips at a time."""
    device = next(
        (t.device for t in [*detector.parameters(), *detector.buffers()]), torch.device("cpu")
    )
    with torch.no_grad():
        parts = [torch.as_tensor(video[i : i + batch]) for i in range(0, len(video), batch)]
        return torch.cat([detector(part.to(device)).cpu().double() for part in parts])


# ------------------------------------------------------------------------------------------------- scores of two sets


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features (n, F), (m, F); covariances divide by n - 1.

    With C = R'R, R triangular, the last trace is the sum of the singular values of R_a R_b': no square root of a matrix,
    never negative, exact where there are fewer clips than features. Grows as there are fewer clips: compare equal numbers.
    """
    check_counts(len(a), len(b))
    root = lambda x: torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R
    a, b = a.double(), b.double()
    r_a, r_b = root(a), root(b)
    cross = torch.linalg.svdvals(r_a @ r_b.T).sum()
    return max(
        0.0,
        float(
            (a.mean(0) - b.mean(0)).square().sum()
            + r_a.square().sum()
            + r_b.square().sum()
            - 2 * cross
        ),
    )


def check_counts(*counts: int) -> None:
    """Raises UserError where a set has too few clips for a covariance."""
    if min(counts) < 2:
        given = " and ".join(map(str, counts))
        raise UserError(f"a Fréchet distance needs at least two clips in each set, not {given}")


def kvd(real: torch.Tensor, fake: torch.Tensor, subsets=100) -> dict[str, float]:
    """Mean and standard deviation over random subsets of the squared MMD of features (n, F).

    Unbiased, with the kernel (x.y / F + 1)^3 (Bińkowski et al. 2018, arXiv 1801.01401); subsets are
    of half a set, at most 1,000 clips, drawn as torch-fidelity draws them.
    """
    size, draw = min(1000, len(real) // 2, len(fake) // 2), np.random.RandomState(2020)
    values = []
    for _ in range(subsets):
        x, y = (s.numpy()[draw.choice(len(s), size, replace=False)] for s in (fake, real))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(within / (size * (size - 1)) - 2 * xy.mean())
    return {"kvd": float(np.mean(values)), "kvd_std": float(np.std(values))}


def coverage(a: torch.Tensor, b: torch.Tensor, neighbours=3) -> float:
    """Share of a (n, F) that is as near to a point of b (m, F) as that is to its third neighbour.

    Precision is that of fake in real, recall that of real in fake (Kynkäänniemi et al. 2019).
    """
    kth = lambda x: torch.cdist(x, b).kthvalue(neighbours + 1).values
    near = torch.cat([kth(part) for part in b.split(1000)])
    inside = [(torch.cdist(part, b) <= near).any(1) for part in a.split(1000)]
    return float(torch.cat(inside).float().mean())


HALF_LEVEL = 0.5 / 127.5  # half of one of 255 grey levels: what rounding moves a pixel in [-1, 1]


def set_scores(real, fake, standardise=False, slow=True) -> dict[str, float]:
    """`frechet` (0 is best); if `slow`, of 8 clips or more, `kvd` (0), `precision`, `recall` (1).

    Features (n, F), (m, F). `standardise`: by mean and standard deviation of the real set, the
    latter at least HALF_LEVEL: what hardly varies there must not make much of what nobody sees.
    """
    check_counts(len(real), len(fake))
    if standardise:
        mean, std = real.mean(0), real.std(0).clamp(min=HALF_LEVEL)
        real, fake = (real - mean) / std, (fake - mean) / std
    scores = {"frechet": frechet(real, fake)}
    if slow and min(len(real), len(fake)) >= 8:
        r, f = real.float(), fake.float()
        scores |= kvd(real, fake) | {"precision": coverage(f, r), "recall": coverage(r, f)}
    return scores


@functools.lru_cache(maxsize=None)
def torch_fidelity():
    """The package torch_fidelity, or None, with a warning, where it cannot be imported.

    It imports torchvision, which raises errors of many types where it was built for another torch.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_fidelity as package
        return package
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"[:200]
        warn(
            f"no LPIPS, as torch-fidelity cannot be imported ({cause}); it needs a torchvision that"
            f" was built for torch {torch.__version__}, from where that came:"
            " pip install torch-fidelity torchvision"
        )


def register(detector) -> str:
    """Make a detector a feature extractor of torch-fidelity, whose `calculate_metrics(feature_extractor=name)` then scores data
    sets of uint8 tensors (T, H, W, 3). Returns the name. For scores of your own; `set_scores` gives the same."""
    package, name = torch_fidelity(), f"{detector.name}-{detector.sha256[:12]}"
    if package is None:
        raise UserError("this needs torch-fidelity, which cannot be imported")

    class Extractor(package.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.detector = detector

        def forward(self, video):
            return (self.detector(video),)

        get_provided_features_list = staticmethod(lambda: ("features",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "features")
        can_be_compiled = staticmethod(lambda: False)

    if name not in package.registry.FEATURE_EXTRACTORS_REGISTRY:
        package.register_feature_extractor(name, Extractor)
    return name


# ----------------------------------------------------------------------------------------- scores of frames with a truth


def psnr(a, b) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of uint8 images (..., H, W, 3): (...,). Higher is better; 100 for equal images."""
    a, b = (torch.as_tensor(x).cpu().double() for x in (a, b))
    error = (a - b).square().mean((-3, -2, -1))
    return 10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))


def ssim(a, b) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of uint8 images (n, H, W, 3), at least 11x11: (n,), at most 1, higher is better.

    Gaussian window of 11 pixels and sigma 1.5, without padding; per channel, then the mean: what scikit-image gives with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1.
    """
    a, b = (torch.as_tensor(x).cpu().double().movedim(-1, -3) for x in (a, b))  # (n, 3, H, W)
    if min(a.shape[-2:]) < 11:
        raise UserError(
            f"SSIM needs images of at least 11x11 pixels, not {a.shape[-2]}x{a.shape[-1]}"
        )
    down, across = (_windows(side) for side in a.shape[-2:])
    smooth = lambda x: down @ x @ across.T  # (n, 3, H - 10, W - 10)
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b, cov = (
        smooth(a * a) - mean_a**2,
        smooth(b * b) - mean_b**2,
        smooth(a * b) - mean_a * mean_b,
    )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (
        (2 * mean_a * mean_b + c1)
        * (2 * cov + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return value.mean((1, 2, 3))


def _windows(side: int) -> torch.Tensor:
    """(side - 10, side): a row of Gaussian weights for each place of the window."""
    offset = torch.arange(side)[None, :] - torch.arange(side - 10)[:, None] - 5
    weights = torch.where(offset.abs() <= 5, torch.exp(-(offset.double() ** 2) / (2 * 1.5**2)), 0)
    return weights / weights.sum(1, keepdim=True)


@functools.lru_cache(maxsize=None)
def lpips(device="cpu"):
    """torch-fidelity's LPIPS (VGG-16) as a function of uint8 images (n, H, W, 3), (n, H, W, 3) -> (n,), lower is better; None
    where its weights are not in torch's hub folder: nothing is downloaded."""
    if not torch_fidelity():
        return None
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS
    from torchvision.models import VGG16_Weights

    files = [os.path.basename(url) for url in (URL_VGG16_LPIPS, VGG16_Weights.IMAGENET1K_V1.url)]
    if not all(
        os.path.exists(os.path.join(torch.hub.get_dir(), "checkpoints", file)) for file in files
    ):
        return None
    net = SampleSimilarityLPIPS("lpips-vgg16").to(device)
    images = lambda x: torch.as_tensor(x).to(device).movedim(-1, -3)
    return torch.no_grad()(lambda a, b: net(images(a), images(b)).cpu())


BEST = {
    "psnr": max,
    "ssim": max,
    "lpips": min,
}  # which of several samples of a clip is the best one


def frame_scores(real, fake, device="cpu", chunk=256) -> dict[str, np.ndarray]:
    """{score: (clips,)}, means over the frames of uint8 (clips, T, H, W, 3), of each score whose weights are there; `chunk`
    images at a time."""
    a, b = (torch.as_tensor(video).flatten(0, 1) for video in (real, fake))
    kinds = (
        {"psnr": psnr}
        | ({"ssim": ssim} if min(a.shape[1:3]) >= 11 else {})
        | ({"lpips": lpips(device)} if lpips(device) else {})
    )
    parts = [[of(x, y) for x, y in zip(a.split(chunk), b.split(chunk))] for of in kinds.values()]
    return {
        name: torch.cat(part).unflatten(0, (len(real), -1)).mean(1).numpy()
        for name, part in zip(kinds, parts)
    }
