"""The embedded model's benchmark: held-out questions about scenes of handwritten digits, drawn and not
stored.

How the model is trained is in mini/ of the repository; its checkpoint is installed next to these modules.
"""
