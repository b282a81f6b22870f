"""The next embedded model, which is not trained yet: its questions, its benchmark and its training.

It will replace the modules of the same names in :mod:`mini` once a checkpoint of it and its tables are there;
until then
everything that is evaluated, documented and shipped is :mod:`mini`'s.
"""
