"""Matplotlib, where it is installed."""


def figure_class():
    """Matplotlib's figure, without pyplot, which would choose a window system. Raises ValueError where it is
    missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib; pip install matplotlib") from None
    return Figure
