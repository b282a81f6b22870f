"""Compression inside a decoder: layers after a compression get a shorter sequence, so they append fewer keys;
nothing ever trims a cache."""
