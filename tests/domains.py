"""Two toy domains that look alike and are labelled differently: a town and a field."""

from pathlib import Path

import numpy as np

from tests.miniatures import save

TABLE = """universal\tdataset\tclass
sky\ttown\tsky
road\ttown\troad
grass\ttown\tlawn
car\ttown\tcar
unlabelled\ttown\tbin
sky\tfield\theaven
road\tfield\tground
grass\tfield\tground
unlabelled\tfield\tstone
"""
TOWN = ["bin", "car", "sky", "road", "lawn"]
FIELD = ["stone", "heaven", "ground"]
# Colours, and the labels in each domain.
_MATERIALS = {
    "sky": ((90, 160, 250), 2, 1),
    "road": ((90, 90, 90), 3, 2),
    "grass": ((60, 180, 60), 4, 2),
    "car": ((220, 40, 40), 1, 0),
    "stone": ((230, 220, 150), 0, 0),
}


def write_domain(root: Path, domain: str, count: int, size: tuple[int, int] = (32, 48)) -> Path:
    """Images and masks of a folder: sky above road and grass, with a car or a stone on them."""
    rng = np.random.default_rng(sum(domain.encode()))
    height, width = size
    for index in range(count):
        image, mask = np.zeros((*size, 3)), np.zeros(size, np.uint8)
        horizon, verge = (rng.integers(side // 3, side // 2) for side in size)
        object_ = "stone" if domain == "field" else "car"
        left, top = rng.integers(width - 12), rng.integers(horizon, height - 10)
        for name, where in {
            "sky": np.s_[:horizon],
            "road": np.s_[horizon:, :verge],
            "grass": np.s_[horizon:, verge:],
            object_: np.s_[top : top + 10, left : left + 12],
        }.items():
            color, *labels = _MATERIALS[name]
            image[where], mask[where] = color, labels[domain == "field"]
        noisy = (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)
        save(noisy, root / "images" / f"{index}.png")
        save(mask, root / "masks" / f"{index}.png")
    return root
