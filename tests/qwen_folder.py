"""A tiny Qwen2-VL of random weights in a folder as the hub has it, with its processor, for tests."""

from pathlib import Path

import families
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %} {{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %} answer"
)


def write_qwen(folder: Path, template: str = TEMPLATE) -> None:
    """Words are `w7`, `w8`, … and a few of a question; they stand between spaces."""
    made = families.own_model("Qwen2VLForConditionalGeneration")
    made.generation_config.eos_token_id, made.generation_config.suppress_tokens = 2, [0, 1, 90, 91, 92, 93]
    made.save_pretrained(folder)
    write_processor(folder, template)


def write_processor(folder: Path, template: str = TEMPLATE) -> None:
    """Of a Qwen2-VL or Qwen2.5-VL whose vocabulary has 100 tokens."""
    marks = {
        "<|image_pad|>": families.IMAGE,
        "<|video_pad|>": families.VIDEO,
        "<|vision_start|>": families.START,
        "<|vision_end|>": families.END,
    }
    words = {"<pad>": 0, "<unk>": 1, "<end>": 2, "what": 3, "is": 4, "this": 5, "answer": 6}
    words |= {f"w{i}": i for i in range(7, 90)} | marks | {f"w{i}": i for i in range(94, families.VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=list(marks),
        clean_up_tokenization_spaces=False,
    )
    sizes = dict(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 32768}
    )
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=template
    ).save_pretrained(folder)
