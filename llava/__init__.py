"""LLaVA rewritten for libra-merging: the original's public names, prompts and checkpoints, with visual-token
compression."""

from libra.utils.cli import only_commands
from libra.utils.lazy import lazily

# As in the original, but only when asked for: `import llava.constants` need not load torch.
__getattr__ = lazily(__name__, {"LlavaLlamaForCausalLM": "model.language_model.llava_llama"})

only_commands("llava", "convert", "eval.run_llava", "serve.cli", "serve.web", "train.train")
