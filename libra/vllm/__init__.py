"""A plug-in for vLLM: pictures' tokens compressed before the language model, in vLLM's own engine.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` of this package, in each of its
processes. ``LIBRA_COMPRESSION=ROW vllm serve MODEL`` is all that a user writes; docs/serving.md says which
methods qualify. Nothing here is imported by the rest of the package, and only the modules that name vLLM's
classes (plugin, processing, llava, qwen) need vLLM.
"""


def register() -> None:
    """What vLLM calls when it loads its plug-ins; calling it again changes nothing.

    Raises:
        ImportError: without vLLM, in one sentence.
    """
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "libra.vllm is a plug-in for vLLM, and vLLM is not installed in this environment:"
            " bash scripts/serve_vllm.sh MODEL makes one that has it"
        ) from error
    from .plugin import register_models

    register_models()
