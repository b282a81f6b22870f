"""Tables: the lmms-eval plug-in model, task files, a resumable runner and the report."""
