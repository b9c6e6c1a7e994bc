"""Draws README's picture: what DualU-Net makes of one tile.

    python benchmarks/overview.py example.png benchmarks/overview.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules are no package

from images import read_image
from infer import predict_maps
from dualunet import load_model
from outputs import outlined, titled_panel
from postprocess import reconstruct

CHECKPOINT = Path(__file__).resolve().parents[1] / "weights" / "consep.pt"
SIDE = 384  # pixels of the tile that are shown


def main(source, target):
    # the maps of the middle of the tile
    image = read_image(source).pixels
    y, x = (image.shape[0] - SIDE) // 2, (image.shape[1] - SIDE) // 2
    image = image[y:y + SIDE, x:x + SIDE]
    model = load_model(CHECKPOINT)
    class_probability, density = (maps[0] for maps in predict_maps(model, image[None]))
    nuclei = reconstruct(class_probability, density, **model.config["reconstruct"])

    # classes as colours, white where the background is more probable
    colors = np.array([(255, 255, 255), *model.config["colors"]])  # (K + 1, 3)
    types = np.where(class_probability[0] < 0.5, class_probability[1:].argmax(axis=0) + 1, 0)
    peaks = np.repeat((255 * density.clip(0, 1))[..., None], 3, axis=2)
    outlines = outlined(image, nuclei.inst_map, nuclei.classes, model.config["colors"], scale=2)
    maps = []
    for picture in (image, colors[types], peaks):
        picture = Image.fromarray(picture.astype(np.uint8))
        maps.append(np.asarray(picture.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BILINEAR)))

    titles = [["input", "decoder 1: classes", "decoder 2: density", "nuclei"]]
    panel = titled_panel([[*maps, outlines]], titles, model.config["class_names"],
                         model.config["colors"])
    panel.resize((panel.width // 2, panel.height // 2), Image.Resampling.LANCZOS).save(
        target, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
