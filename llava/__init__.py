"""LLaVA rewritten for libra-merging: the original's public names, prompts and checkpoints, with visual-token compression."""


def __getattr__(name: str):
    # As in the original, but only when asked for: `import llava.constants` need not load torch.
    if name == "LlavaLlamaForCausalLM":
        from .model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
