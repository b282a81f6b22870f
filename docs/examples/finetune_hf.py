"""Fine-tune a Hugging Face vision-language model while its visual tokens are compressed, with LoRA.

    export PYTHONPATH=.     # in a clone, where the package is not installed
    python docs/examples/finetune_hf.py --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --data samples.json --output_dir runs/try
    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 docs/examples/finetune_hf.py … \\
        --deepspeed scripts/zero2.json

samples.json is a list of {"image": FILE, "question": TEXT, "answer": TEXT}; files are found from its folder.
All other flags are transformers' TrainingArguments.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import libra
from libra.media import open_image


@dataclass
class Options:
    model: str
    data: Path
    compression: str = "libra"  # a method, a shipped row or a YAML file
    ratio: float | None = 0.5  # of a method; None for a row, which has its own


def collator(processor, folder: Path):
    """Batches with labels on the answers only, padded on the right as the loss wants it."""
    processor.tokenizer.padding_side = "right"

    def collate(samples: list[dict]) -> dict:
        asked = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s["question"]}]}]
            for s in samples
        ]
        prompts = processor.apply_chat_template(asked, add_generation_prompt=True)
        texts = [prompt + s["answer"] + processor.tokenizer.eos_token for prompt, s in zip(prompts, samples)]
        images = [[open_image(str(folder / s["image"]))] for s in samples]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        for row, (prompt, text) in enumerate(zip(prompts, texts)):
            before, whole = (len(ids) for ids in processor.tokenizer([prompt, text])["input_ids"])
            answer, end = whole - before, int(batch["attention_mask"][row].sum())
            labels[row, : end - answer] = -100
            labels[row, end:] = -100
        return {**batch, "labels": labels}

    return collate


def main() -> None:
    if os.environ.get("DS_ACCELERATOR") == "cpu" and "RANK" in os.environ:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")  # before the Trainer does, which would ask for NCCL
    options, training = HfArgumentParser((Options, TrainingArguments)).parse_args_into_dataclasses()
    training.remove_unused_columns = False
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    decoder = r".*language_model.*\.(q|k|v|o)_proj"  # the vision tower has layers of the same names
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=decoder))
    with libra.attach(model, options.compression, ratio=options.ratio) as handle:
        collate = collator(processor, options.data.parent)
        trainer = Trainer(
            model, training, data_collator=collate, train_dataset=json.loads(options.data.read_text())
        )
        trainer.train()
        print(handle.summary())
    trainer.save_model()


if __name__ == "__main__":
    main()
