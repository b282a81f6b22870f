"""How lmms-eval finds our model: the entry point of group ``lmms_eval.models`` names :func:`manifest`."""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest

    from libra.utils.other_llava import warn_if_llava_is_another

    warn_if_llava_is_another()
    return ModelManifest(model_id="libra", simple_class_path="libra.lmms.lmms_libra.LibraModel")


def register() -> None:
    """Make ``--model libra`` known to this process where the package, and so its entry point, is not
    installed."""
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
