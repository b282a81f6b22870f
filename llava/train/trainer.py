"""What training here adds to transformers' Trainer: learning rates, batches of one kind, counts, LLaVA's files."""

from pathlib import Path

import torch
from transformers import Trainer

from ..model.weights import NON_LORA, PROJECTOR
from .data import ModalityLengthSampler

TOWER_KEY = "model.vision_tower."
COUNTS = {"skipped": "skipped_images", "mismatched": "mismatched_conversations"}  # in a batch → in the logs


class LlavaTrainer(Trainer):
    """Trains a LLaVA model, whole, its projector alone, or LoRA adapters, and saves it in the published layouts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.counts = dict.fromkeys(COUNTS, 0)  # of this process

    def _get_train_sampler(self, train_dataset=None):
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        data = self.train_dataset if train_dataset is None else train_dataset
        return ModalityLengthSampler(data.modality_lengths, step, self.args.seed)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            parameters = list((self.model if model is None else model).named_parameters())
            for part, rate in (("mm_projector", self.args.mm_projector_lr), ("vision_tower", self.args.mm_vision_tower_lr)):
                if rate is not None:
                    _set_rate(optimizer, {id(value) for name, value in parameters if part in name}, rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        for name in COUNTS:
            self.counts[name] += inputs.pop(name, 0)
        if num_items_in_batch is not None:  # 0 where every sample was skipped
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def total_counts(self) -> dict[str, int]:
        """How many samples were skipped and mismatched until now, by all processes together."""
        mine = torch.tensor(list(self.counts.values()), device=self.args.device)
        totals = self.accelerator.reduce(mine, "sum").tolist()
        return dict(zip(COUNTS.values(), totals))

    def log(self, logs, start_time=None):
        super().log({**logs, **{name: n for name, n in self.total_counts().items() if n}}, start_time)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        trained = {name: state[name] for name, value in self.model.named_parameters() if value.requires_grad and name in state}
        if self.args.lora_enable:
            _save_adapter(self.model, state, trained, folder)
        elif _has_projector_alone(self.model):
            self.model.config.save_pretrained(folder)
            torch.save({name: value.detach().cpu() for name, value in trained.items()}, folder / PROJECTOR)
        else:
            save_llava(self.model, self.processing_class, folder, state=state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder, model = Path(resume_from_checkpoint), self.model if model is None else model
        if not (folder / PROJECTOR).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name in (PROJECTOR, NON_LORA):
            if (folder / name).is_file():
                model.load_state_dict(torch.load(folder / name, map_location="cpu", weights_only=True), strict=False)

    def _issue_warnings_after_load(self, load_result):
        missing = load_result.missing_keys  # a tower that is not trained lies in its own folder
        missing[:] = [name for name in missing if not name.startswith(TOWER_KEY)]
        super()._issue_warnings_after_load(load_result)


def _set_rate(optimizer, chosen: set[int], rate: float) -> None:
    """Give the parameters with these ids a learning rate of their own."""
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        for theirs in (False, True):
            part = [value for value in group["params"] if (id(value) in chosen) == theirs]
            if part:
                optimizer.param_groups.append({**group, "params": part, **({"lr": rate} if theirs else {})})


def _has_projector_alone(model) -> bool:
    """Whether the language model is frozen whole, head and decoder."""
    language = ("lm_head", "model.layers")
    return not any(value.requires_grad for name, value in model.named_parameters() if name.startswith(language))


def _save_adapter(model, state: dict, trained: dict, folder: Path) -> None:
    model.save_pretrained(folder, state_dict=state)
    model.config.save_pretrained(folder)
    others = {name: value.detach().cpu() for name, value in trained.items() if "lora_" not in name}
    torch.save(others, folder / NON_LORA)


def save_llava(model, tokenizer, folder: Path, tower_folder: str = "vision_tower", state: dict | None = None) -> None:
    """Write a checkpoint in the original's layout: language model and projector in ``folder``.

    A vision tower that came from a folder goes into a folder inside it, and ``mm_vision_tower`` in the written configuration
    is that one's relative name; one from the hub keeps its name. A tuned tower's weights are in the checkpoint as well.

    Args:
        state: the weights, where they are not the model's own (ZeRO-3 has them in pieces).
    """
    tower = model.get_vision_tower()
    state = model.state_dict() if state is None else state
    tuned = getattr(model.config, "unfreeze_mm_vision_tower", False)
    named = model.config.mm_vision_tower
    if Path(named).is_dir():
        inner = f"{TOWER_KEY}vision_tower."
        weights = {name.removeprefix(inner): value for name, value in state.items() if name.startswith(inner)}
        tower.vision_tower.save_pretrained(folder / tower_folder, state_dict=weights)
        tower.image_processor.save_pretrained(folder / tower_folder)
        model.config.mm_vision_tower = tower_folder
    kept = {key: value for key, value in state.items() if tuned or not key.startswith(TOWER_KEY)}
    try:
        model.save_pretrained(folder, state_dict=kept)
    finally:
        model.config.mm_vision_tower = named
    tokenizer.save_pretrained(folder)


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint of an interrupted run that was written to its end, which its ``trainer_state.json`` marks."""
    whole = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
