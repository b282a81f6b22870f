"""The tensor operations of a compression step: torch definitions, and Triton kernels of the same names."""
