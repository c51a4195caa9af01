"""timm's image data sets, with a report of unreadable images."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Callable, Iterable, Iterator, List, Sequence, Tuple

import torch.multiprocessing
from PIL import EpsImagePlugin, ExifTags, Image
from timm.data import ImageDataset, IterableImageDataset
from torch.utils.data import IterableDataset, get_worker_info

from timm_depla.files import FORMATS, open_image

__all__ = [
    'UNREADABLE', 'CheckedImages', 'CheckedStream', 'UnreadableError', 'inspect_images', 'read_or_next', 'read_stream',
]  # fmt: skip

UNREADABLE = 'cannot be read'
_MAX_ATTEMPTS = 10  # unreadable images in a row
EpsImagePlugin.gs_binary = False  # timm decodes streams in any format: none may run Ghostscript


class UnreadableError(RuntimeError):
    """Too many images in a row cannot be read."""


def inspect_images(files: Sequence[str], threads: int) -> List[Tuple[str, str, str]]:
    """Read images in threads, and return (file, what is to be said of it, its cause) where there is something."""

    def inspect(file: str) -> List[Tuple[str, str, str]]:
        try:
            open_image(file, 'RGB')
            with Image.open(file, formats=FORMATS) as image:
                found = []
                if getattr(image, 'is_animated', False):
                    found.append((file, 'have several frames, of which the first is read', ''))
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    found.append((file, 'are turned by EXIF alone, which is not applied, as in timm', ''))
                return found
        except Exception as error:  # a damaged file can make Pillow raise anything
            return [(file, UNREADABLE, f': {str(error).replace(repr(file), "it") or repr(error)}')]

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        return [finding for findings in pool.map(inspect, files) for finding in findings]


def read_or_next(
    read: Callable[[int], Any],
    index: int,
    count: int,
    name: Callable[[int], Any],
    unreadable: Any,
    attempts: int = _MAX_ATTEMPTS,
) -> Any:
    """Return `read(index)`, or the result for the next readable index; the first index follows the last.

    `name` gives the file name of an index; the queue takes (file name, cause) of each unreadable sample.

    Raises:
        UnreadableError: If none of so many `attempts` can be read.
    """
    for _ in range(attempts):
        try:
            return read(index)
        except Exception as error:  # a damaged file can make Pillow raise anything
            unreadable.put((str(name(index)), str(error) or repr(error)))
        index = (index + 1) % count
    raise UnreadableError(f'{attempts} images in a row cannot be read, up to {name(index - 1)}')


class _Skipped(logging.Handler):
    """Queues each sample that timm's WebDataset reader logs as skipped; numbering starts anew in each epoch."""

    def __init__(self, unreadable: Any):
        super().__init__(logging.WARNING)
        info = get_worker_info()
        self.worker = 0 if info is None else info.id
        self.unreadable = unreadable
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        self.unreadable.put((f'sample {self.count} of those that worker {self.worker} skipped', record.getMessage()))


def read_stream(reader: Iterable[Any], unreadable: Any) -> Iterator[Any]:
    """Yield the samples of timm's stream reader; the queue gets (number, cause) of unreadable ones, which it skips."""
    logger, handler = logging.getLogger('timm.data.readers.reader_wds'), _Skipped(unreadable)
    logger.addHandler(handler)
    try:
        yield from reader
    finally:
        logger.removeHandler(handler)


class CheckedStream(IterableDataset):
    """timm's stream with its transform; its queue `unreadable` gets (number, cause) of samples that it skips."""

    def __init__(self, dataset: IterableImageDataset):
        self.dataset = dataset
        self.unreadable = torch.multiprocessing.Queue()

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        for image, target in read_stream(self.dataset.reader, self.unreadable):
            yield self.dataset.transform(image), target


class CheckedImages(ImageDataset):
    """Image data set that reports unreadable images, also from worker processes.

    In training, the next readable image replaces an unreadable one. In validation, a blank image with target -1 does,
    which the metrics ignore.

    Args:
        dataset: timm's data set to read from.
        is_training: Whether to replace unreadable images.
        decode: Decodes a file in an image mode to the transform's input.

    Attributes:
        unreadable: Queue of (file name, cause).

    Raises:
        UnreadableError: From indexing, if ten images in a row cannot be read.
    """

    def __init__(self, dataset: ImageDataset, is_training: bool, decode: Callable[[BinaryIO, str], Any] = open_image):
        super().__init__(
            '',
            reader=dataset.reader,
            input_img_mode=dataset.input_img_mode or 'RGB',
            transform=dataset.transform,
            target_transform=dataset.target_transform,
        )
        self.is_training = is_training
        self.decode = decode
        self.unreadable = torch.multiprocessing.Queue()

    def _read(self, index: int) -> Tuple[Any, int]:
        file, target, *_ = self.reader[index]
        return self.decode(file, self.input_img_mode), target

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        attempts = _MAX_ATTEMPTS if self.is_training else 1
        try:
            image, target = read_or_next(self._read, index, len(self), self.filename, self.unreadable, attempts)
        except UnreadableError:
            if self.is_training:
                raise
            return self.transform(Image.new(self.input_img_mode, (256, 256))), -1
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, -1 if target is None else target
