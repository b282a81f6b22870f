"""Muon for a decoder's matrices and AdamW for the rest, as one optimizer that the Trainer and its schedule
can hold."""

import torch
from torch import nn


class MuonAndAdamW(torch.optim.Optimizer):
    """:class:`torch.optim.Muon` for ``matrices`` and :class:`torch.optim.AdamW` for ``others``; the groups
    are theirs."""

    def __init__(self, matrices: list, others: list, muon_lr: float, lr: float, weight_decay: float):
        self.parts = {
            "muon": torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95),
            "adamw": torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)),
        }
        super().__init__([*matrices, *others], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure=None) -> None:
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._share()


def build_optimizer(module: nn.Module, muon_lr: float, lr: float, weight_decay: float) -> MuonAndAdamW:
    """Muon for the matrices of the decoder's layers and of the projector; embeddings, heads, norms and biases
    go to AdamW."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    inner = {
        name
        for name, value in trained.items()
        if value.ndim == 2 and ("layers." in name or "mm_projector" in name)
    }
    matrices = [value for name, value in trained.items() if name in inner]
    others = [value for name, value in trained.items() if name not in inner]
    return MuonAndAdamW(matrices, others, muon_lr, lr, weight_decay)
