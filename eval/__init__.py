"""Tables: the lmms-eval plug-in model, task files, a resumable runner and the report."""

from libra.shadow import warn_if_llava_is_another

warn_if_llava_is_another()
