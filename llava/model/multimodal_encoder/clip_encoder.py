"""The CLIP vision tower: pixels in, the features of one hidden layer out."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from libra.engine.shrunk import Shrunk
from libra.engine.tower import View, Wants, look
from libra.rows import patches_across

from ..settings import tower_config
from ..weights import quiet_loading
from .memory import FeatureMemory


class CLIPVisionTower(nn.Module):
    """A CLIP ViT whose hidden layer ``mm_vision_select_layer`` gives the visual tokens.

    With ``delay_load`` only the configuration is read; :meth:`load_model` brings the weights. Where the
    configuration says that the tower was tuned (``unfreeze_mm_vision_tower``), its parameters are there at
    once and the model's checkpoint fills them. :meth:`load_model` freezes them;
    ``vision_tower.requires_grad_(True)`` makes them trainable. ``memory``, None unless somebody sets it,
    keeps the features of batches that come again.
    """

    memory: FeatureMemory | None = None

    def __init__(self, vision_tower: str, args, delay_load: bool = False):
        super().__init__()
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"mm_vision_select_feature {self.select_feature!r} is unknown; use 'patch' or 'cls_patch'"
            )
        self.is_loaded = False
        if not delay_load:
            self.load_model()
        elif getattr(args, "unfreeze_mm_vision_tower", False):
            self._hold(CLIPVisionModel(self._read_config()))
        else:
            self.cfg_only = self._read_config()

    def _read_config(self) -> CLIPVisionConfig:
        """Of a folder, after a look at its values; of a name on the hub, as transformers finds it."""
        folder = Path(self.vision_tower_name)
        return (
            tower_config(folder)
            if folder.is_dir()
            else CLIPVisionConfig.from_pretrained(self.vision_tower_name)
        )

    def load_model(self, device_map=None) -> None:
        """Read image processor and weights from ``vision_tower_name`` (folder or hub name) unless they are
        there; freeze.

        Raises:
            ValueError: if weights are missing, which transformers would make up.
        """
        if not self.is_loaded:
            with quiet_loading():  # a whole CLIP also has a text tower; what is missing is asked for below
                tower, info = CLIPVisionModel.from_pretrained(
                    self.vision_tower_name,
                    config=self._read_config(),
                    device_map=device_map,
                    output_loading_info=True,
                )
            if missing := sorted(info["missing_keys"]):
                raise ValueError(
                    f"the vision tower {self.vision_tower_name} lacks {len(missing)} weights, {missing[0]!r} "
                    "among them; download it again"
                )
            self._hold(tower)
        self.vision_tower.requires_grad_(False)

    def _hold(self, vision_tower: CLIPVisionModel) -> None:
        self.image_processor = CLIPImageProcessor.from_pretrained(self.vision_tower_name)
        self.vision_tower = vision_tower
        self.is_loaded = True

    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """(B, 3, H, W) pixels to (B, N, mm_hidden_size) features in their dtype; a list of (3, H, W) to a
        list of (1, N, ·)."""
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        return self._features(images) if self.memory is None else self.memory.get(images, self._features)

    def view(self, images: torch.Tensor, wants: Wants, shrunk: Shrunk | None = None) -> View:
        """What the tower says about (B, 3, H, W) pixels; ``hidden`` (B, N, mm_hidden_size) are
        :meth:`forward`'s features.

        shrunk: let it see the pictures smaller; ``hidden`` has at each place the feature that covers it.

        Raises:
            ValueError: where the [CLS] token is a visual token, or the features are not a layer's.
        """
        if self.select_feature != "patch":
            raise ValueError(
                "mm_vision_select_feature 'cls_patch' makes the [CLS] token a visual token, which methods "
                "that read the vision tower do not expect; choose one that reads the embeddings only"
            )

        def compute(pixels):
            states = self._states(pixels, shrunk)
            used = self.select_layer % len(states) - 1
            if used < 0:
                raise ValueError(
                    "mm_vision_select_layer 0 is not a layer's output: there is no attention to read"
                )
            tower = getattr(self.vision_tower, "vision_model", self.vision_tower)  # around it until 5.19
            found = look(tower.encoder.layers, states, used, wants, has_cls=True)
            hidden = found.hidden if shrunk is None else shrunk.spread(found.hidden)
            return replace(found, hidden=hidden.to(pixels.dtype))

        if self.memory is None:
            return compute(images)
        return self.memory.get(images, compute, (wants, shrunk))

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self._states(images)[self.select_layer]
        return (hidden[:, 1:] if self.select_feature == "patch" else hidden).to(images.dtype)

    def _states(self, images: torch.Tensor, shrunk: Shrunk | None = None) -> list[torch.Tensor]:
        """What goes into the first layer, and the output of each layer."""
        images, smaller = images.to(self.device, self.dtype), {}
        if shrunk is not None:
            images, smaller = shrunk.pixels(images), {"interpolate_pos_encoding": True}
        states = self.vision_tower(images, output_hidden_states=True, **smaller).hidden_states
        # Once the decoder around it has recorded its hidden states, transformers records each of the tower's
        # twice.
        return [state for state, before in zip(states, (None, *states)) if state is not before]

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return patches_across(self.config)

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2
