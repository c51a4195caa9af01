"""timm's random resized crop by PyTorch's resizing of bytes, which takes less time than Pillow's."""

import random
from typing import Any

from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image

__all__ = ['TensorResizedCrop']


class TensorResizedCrop(RandomResizedCropAndInterpolation):
    """The same boxes and interpolations from the same random numbers; pixels may be rounded differently.

    Args:
        crop: timm's transform to do as.

    Raises:
        ValueError: If it is no random resized crop, or interpolates otherwise than bilinearly or bicubically.
    """

    def __init__(self, crop: Any):
        if not isinstance(crop, RandomResizedCropAndInterpolation):
            raise ValueError(f'{type(crop).__name__} is no random resized crop')
        modes = crop.interpolation if isinstance(crop.interpolation, (tuple, list)) else [crop.interpolation]
        if unknown := set(modes) - {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}:
            raise ValueError(f'PyTorch resizes bilinearly and bicubically, not by {unknown.pop().value}')
        self.__dict__.update(crop.__dict__)

    def __call__(self, img: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        modes = self.interpolation
        mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
        pixels = pil_to_tensor(img.crop((left, top, left + width, top + height)))
        return to_pil_image(resize(pixels, list(self.size), mode, antialias=True))
