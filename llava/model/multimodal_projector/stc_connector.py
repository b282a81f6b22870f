"""VideoLLaMA-2's spatial-temporal connector: the frames of a video to fewer visual tokens."""

import math

import torch
from torch import nn

# How many empty places the sampler puts around the video's three axes, by ``mm_projector_type``.
PADDING = {"stc_connector": 1, "stc_connector_v35": 0}


class STCConnector(nn.Module):
    """A RegNet stage on each frame, a 3D convolution that halves time, height and width, another stage, and
    an MLP.

    (B, T, P, ``width``) features of T frames with P (a square number) patches each become (B, T'·P',
    ``hidden_size``), time first and then row by row: an axis of n becomes ⌊n/2⌋ + 1 with padding 1 and ⌊n/2⌋
    without.

    Args:
        width: of the vision tower's features.
        hidden_size: of the language model.
        padding: of the 3D convolution.
        depth: blocks of a stage.

    Raises:
        ValueError: if timm, whose RegNet stage it is, is not installed.
    """

    def __init__(self, width: int, hidden_size: int, padding: int, depth: int = 4):
        super().__init__()
        try:
            from timm.layers import LayerNorm2d
            from timm.models.regnet import RegStage
        except ImportError as error:
            raise ValueError(
                f"VideoLLaMA-2's connector needs timm ({error}); install it: pip install timm"
            ) from error
        settings = dict(
            depth=depth, out_chs=hidden_size, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d
        )
        self.padding = padding
        self.s1 = RegStage(in_chs=width, **settings)
        self.sampler = nn.Sequential(
            nn.Conv3d(hidden_size, hidden_size, kernel_size=2, stride=2, padding=padding), nn.SiLU()
        )
        self.s2 = RegStage(in_chs=hidden_size, **settings)
        self.readout = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def length(self, frames: int, patches: int) -> int:
        """How many visual tokens that many frames of ``patches`` features become."""
        times, side = ((n + 2 * self.padding) // 2 for n in (frames, math.isqrt(patches)))
        return times * side**2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, T, P, width) to (B, N, hidden_size).

        Raises:
            ValueError: for a single frame where there is no padding.
        """
        frames, side = features.shape[1], math.isqrt(features.shape[2])
        if frames + 2 * self.padding < 2:
            raise ValueError(
                "this connector joins frames in pairs and got a single one; give at least two frames"
            )
        maps = features.unflatten(2, (side, side)).permute(0, 1, 4, 2, 3)  # (B, T, C, H, W)
        maps = _per_frame(self.s1, maps)
        maps = self.sampler(maps.transpose(1, 2)).transpose(1, 2)
        maps = _per_frame(self.s2, maps)
        return self.readout(maps.permute(0, 1, 3, 4, 2).flatten(1, 3))


def _per_frame(stage: nn.Module, maps: torch.Tensor) -> torch.Tensor:
    """A module of images (B·T, C, H, W) on videos (B, T, C, H, W)."""
    return stage(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
