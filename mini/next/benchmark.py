"""How the next benchmark draws a question. All else will be :mod:`libra.mini.benchmark`'s, which takes this
over at the switch,
with a new FORMAT and the types of :mod:`mini.next.questions`.
"""

import numpy as np
from PIL import Image

from libra.mini.benchmark import SEED, Sample

from .questions import SCENE_TYPES, TYPES
from .scenes import draw_scene


def scene_sample(kind: str, index: int) -> Sample:
    """Question ``index`` of a scene type, about a scene of its own drawn with glyphs that training never
    shows."""
    make, small = SCENE_TYPES[kind]
    rng = np.random.default_rng([SEED, TYPES.index(kind), index])
    while True:  # a scene may not allow the type: two digits in no common line have no relation
        scene = draw_scene(rng, "test", small=small)
        pair = make(rng, scene.digits)
        if pair is not None:
            return Sample(Image.fromarray(scene.image), *pair, scene)
