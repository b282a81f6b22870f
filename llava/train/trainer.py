"""What training here adds to transformers' Trainer: learning rates, batches of one kind, counts, LLaVA's
files."""

from pathlib import Path

import torch
from transformers import Trainer

from ..model.weights import NON_LORA, PROJECTOR
from .data import ModalityLengthSampler
from .outcomes import Tally
from .runs import Run

TOWER_KEY = "model.vision_tower."


class LlavaTrainer(Trainer):
    """Trains a LLaVA model, whole, only its projector, or LoRA adapters, and saves it in the published
    layouts.

    Args:
        run: whose checkpoints are sealed when they are whole.
        tally: what becomes of the samples.
    """

    def __init__(self, *args, run: Run, tally: Tally, **kwargs):
        super().__init__(*args, **kwargs)
        self.run, self.tally = run, tally

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
            for part, rate in (
                ("mm_projector", self.args.mm_projector_lr),
                ("vision_tower", self.args.mm_vision_tower_lr),
            ):
                if rate is not None:
                    _set_rate(optimizer, {id(value) for name, value in parameters if part in name}, rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.tally.add(inputs.pop("outcomes"))
        if num_items_in_batch is not None:  # 0 where every sample was skipped
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        super().log({**logs, **self.tally.counts()}, start_time)

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model, trial):
        """Older checkpoints go only when this one is whole: every process has written its part, and it has
        its seal."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.tally.share()
        self.wait()
        if self.args.should_save:
            checkpoint = self.run.folder / f"checkpoint-{self.state.global_step}"
            self.tally.save(checkpoint)
            self.run.seal(checkpoint)
            self.run.keep(limit)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        trained = {
            name: state[name]
            for name, value in self.model.named_parameters()
            if value.requires_grad and name in state
        }
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
                model.load_state_dict(
                    torch.load(folder / name, map_location="cpu", weights_only=True), strict=False
                )

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
    return not any(
        value.requires_grad for name, value in model.named_parameters() if name.startswith(language)
    )


def _save_adapter(model, state: dict, trained: dict, folder: Path) -> None:
    model.save_pretrained(folder, state_dict=state)
    model.config.save_pretrained(folder)
    others = {name: value.detach().cpu() for name, value in trained.items() if "lora_" not in name}
    torch.save(others, folder / NON_LORA)


def save_llava(
    model, tokenizer, folder: Path, tower_folder: str = "vision_tower", state: dict | None = None
) -> None:
    """Write a checkpoint in the original's layout: language model and projector in ``folder``.

    A vision tower that came from a folder goes into a folder inside it, and ``mm_vision_tower`` in the
    written configuration is that one's relative name; one from the hub keeps its name. A tuned tower's
    weights are in the checkpoint as well.

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
