"""The embedded model before training: its tokenizer, its small CLIP and its sizes."""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from libra.mini.scenes import IMAGE_SIZE
from libra.mini.shapes import easy_vqa_words
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

from .captions import MOST_TOKENS
from .questions import scene_words

PATCH = 6
GRID = IMAGE_SIZE // PATCH  # 16 × 16 = 256 visual tokens
WIDTH = 128
PROMPT_WORDS = ["USER", "ASSISTANT", ":"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark; ``<s>`` in front, padding with ``<unk>`` as LLaVA does.

    ``</s>`` has the largest number, as in CLIP's own vocabulary: a CLIP text tower reads a text's embedding
    there.
    """
    words = ["<unk>", "<s>", *PROMPT_WORDS, *sorted(scene_words() | easy_vqa_words()), "</s>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with one space
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=1024,
        padding_side="right",
    )


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def save_clip(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both towers into a folder that LLaVA reads its vision tower from, as from CLIP's own folder on
    the hub."""
    clip.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_clip(tokenizer: PreTrainedTokenizerFast, seed: int) -> CLIPModel:
    """An untrained CLIP; sin-cos positions of the patches, because learning them takes too long."""
    torch.manual_seed(seed)
    size = {"hidden_size": WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    clip = CLIPModel(
        CLIPConfig(
            vision_config={
                **size,
                "intermediate_size": 4 * WIDTH,
                "num_hidden_layers": 5,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH,
            },
            text_config={
                **size,
                "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": 2,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": MOST_TOKENS,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            projection_dim=WIDTH,
            logit_scale_init_value=math.log(10),
            attn_implementation="eager",
        )
    )
    frequency = 100.0 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    y, x = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (x, y)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1) * 0.35
    with torch.no_grad():
        clip.vision_model.embeddings.position_embedding.weight[1:] = table
    return clip


def build_model(vision_tower: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaLlamaForCausalLM:
    """A LLaVA of 12 layers × 128 with the given vision tower, which is frozen; everything else is untrained
    and trainable."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        tokenizer_model_max_length=1024,
        tokenizer_padding_side="right",
        mm_vision_tower=str(vision_tower),
        mm_hidden_size=WIDTH,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        image_aspect_ratio="pad",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        use_mm_proj=True,
        conversation="mini",
    )
    model = LlavaLlamaForCausalLM(config)
    model.requires_grad_(True)
    model.get_vision_tower().load_model()  # frozen
    return model
