"""How right one sample is, in [0, 1], where lmms-eval's metric of a sample is not a number."""

LEAST_OVERLAP = 0.5  # of two boxes, for the answer to count (ACC@0.5)


def given(metric: dict) -> float:
    """The score of the sample by the harness itself. Its own sum over OCRBench's samples goes on from run to
    run of one process, so that it cannot be used for a second row."""
    return float(metric["score"])


def overlap(metric: dict) -> float:
    """1 where the box that was asked for and the answered one overlap by half of their union or more."""
    (left, top, right, bottom), (x, y, to_x, to_y) = metric["bbox"], metric["pred"]
    width, height = min(right, to_x) - max(left, x), min(bottom, to_y) - max(top, y)
    shared = max(0.0, width) * max(0.0, height)
    union = (right - left) * (bottom - top) + (to_x - x) * (to_y - y) - shared
    return float(union > 0 and shared / union >= LEAST_OVERLAP)
