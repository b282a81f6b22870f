"""The embedded model before training: its tokenizer, its vision tower and its sizes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from libra.mini.scenes import IMAGE_SIZE
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

from .questions import every_word

PATCH = 6
GRID = IMAGE_SIZE // PATCH  # 16 × 16 = 256 visual tokens
WIDTH = 128
SPECIAL = ["<unk>", "<s>", "</s>"]
PROMPT_WORDS = ["USER", "ASSISTANT", ":"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark; ``<s>`` in front, padding with ``<unk>`` as LLaVA does."""
    words = [*SPECIAL, *PROMPT_WORDS, *every_word()]
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


def build_vision_tower(folder: Path, seed: int) -> None:
    """Write an untrained CLIP tower and its image processor; sin-cos positions, because learning them takes
    too long."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=WIDTH,
        )
    )
    frequency = 100.0 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    y, x = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (x, y)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1) * 0.35
    positions = next(p for name, p in tower.named_parameters() if name.endswith("position_embedding.weight"))
    with torch.no_grad():
        positions[1:] = table
    tower.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(folder)


def build_model(vision_tower: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaLlamaForCausalLM:
    """A LLaVA of 12 layers × 128 with the given vision tower, everything trainable."""
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
        mm_vision_select_layer=-1,
        mm_vision_select_feature="patch",
        mm_patch_merge_type="flat",
        image_aspect_ratio="pad",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        use_mm_proj=True,
        conversation="mini",
    )
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    return model.requires_grad_(True)
