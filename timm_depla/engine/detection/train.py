"""Train a detector: torchvision's losses over COCO-format data, in the loop of `training`."""

import logging
import math
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.task import TrainingTask
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from timm_depla.data import Draw, find_annotations, seed_position
from timm_depla.data.scenes import scenes_folder
from timm_depla.detection import create_detector, detector_config
from timm_depla.detection.coco import METRICS, CocoDetection
from timm_depla.detection.rcnn import split_name
from timm_depla.errors import ConfigError, as_config_error
from timm_depla.files import list_digest
from timm_depla.loading import create_model, load_weights, pretrained_file
from timm_depla.models.cost import count_cost

from .. import training
from ..config import parse_training_args, updated
from ..distributed import Interrupt, World
from ..metrics import Metric
from ..run import Run
from .flags import create_detection_parser
from .loaders import DetectionLoader, ValidationLoader, open_splits
from .validate import evaluate

_logger = logging.getLogger(__name__)

_HEADS = ('roi_heads.box_predictor', 'roi_heads.mask_predictor')  # modules that depend on the classes


class DetectionTask(TrainingTask):
    """timm's training task for a torchvision detector, with the sum of its losses."""

    def __init__(self, model: FasterRCNN, **kwargs):
        super().__init__(**kwargs)
        self.trainable_module = model

    def prepare_distributed(self, **kwargs) -> 'DetectionTask':
        self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, **kwargs)
        return self

    def forward(self, images: List[Tensor], targets: List[Dict[str, Any]]) -> Dict[str, Tensor]:
        """Map images (3, H, W) and targets to torchvision's losses and their sum, `loss`."""
        losses = self.trainable_module(images, targets)
        return {'loss': sum(losses.values()), **losses}


class DetectionRun(Run):
    """The training of a detector."""

    train_script, validate_script = 'train_detection.py', 'validate_detection.py'
    create_parser = staticmethod(create_detection_parser)

    @property
    def metrics(self) -> Tuple[Metric, ...]:
        """Average precision of boxes, and of masks where the detector has them."""
        kinds = {'': 'box AP'}
        if self.model.roi_heads.has_mask():
            kinds['mask_'] = 'mask AP'
        logged = ('AP', 'AP50')[: 3 - len(kinds)]  # that fit a line
        return tuple(
            Metric(f'{prefix}{name}', f'{kind}{name[2:]}', kind, 3 if name in logged else None)
            for prefix, kind in kinds.items()
            for name in METRICS[:6]
        )

    def evaluate(self, model: nn.Module, interrupt: Interrupt) -> Dict[str, float]:
        scores = evaluate(model, self.val_loader, self.args, self.world, interrupt).scores
        return {metric.name: scores[metric.name] for metric in self.metrics}

    def subject(self) -> Dict[str, str]:
        args, transform = self.args, self.model.transform
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        size = [32 * math.ceil(side / 32) for side in (max(transform.min_size), transform.max_size)]
        macs = count_cost(self.model.backbone, (3, *size))['macs'] / 1e9
        images, val_images = self.loader.num_images, self.val_loader.unreadable.num_images
        splits = [find_annotations(args.data_dir, split)[0] for split in (args.train_split, args.val_split)]
        return {
            'model': f'{args.model}, {parameters:.2f} M parameters, {macs:.1f} G multiply-adds in backbone and neck at '
            f'{size[0]} x {size[1]}',
            'data': f"{args.data_dir}: {images:,} training images of '{splits[0]}', {val_images:,} validation images "
            f"of '{splits[1]}', {len(self.val_loader.dataset.category_ids):,} categories",
        }


def build_model(args: Namespace, dataset: CocoDetection, world: World, is_fresh: bool) -> FasterRCNN:
    """The detector, on its device; ConfigError if there is no such detector, or initial weights do not fit."""
    seed_position(args.seed, Draw.INIT)
    is_pretrained = (args.pretrained_backbone or args.pretrained_path) and is_fresh and not args.dry_run
    options = {name: getattr(args, name) for name in ('trainable_backbone_layers', 'backbone_norm')}
    options.update(num_classes=len(dataset.category_ids) + 1, pretrained_backbone=bool(is_pretrained))
    kwargs = dict(args.model_kwargs)
    kinds = AssertionError, OSError, RuntimeError, TypeError, ValueError
    with as_config_error(f"cannot create detector '{args.model}': ", *kinds):
        if args.pretrained_path and is_fresh:
            overlay, given = pretrained_file(args), kwargs.get('backbone_kwargs', {})
            classifier = create_model(split_name(args.model)[1], **given)
            _logger.info('%s: %s', overlay['file'], load_weights(classifier, overlay['file']))
            kwargs['backbone_kwargs'] = dict(given, pretrained_cfg_overlay=overlay)
        model = create_detector(args.model, **options, **kwargs)
    if args.initial_checkpoint and is_fresh:
        _logger.info('%s: %s', args.initial_checkpoint, load_weights(model, args.initial_checkpoint, _HEADS))
    if args.grad_checkpointing:
        body = model.backbone.body
        if not hasattr(body, 'set_grad_checkpointing'):
            body = getattr(body, 'model', body)  # of timm's feature getter
        if not hasattr(body, 'set_grad_checkpointing'):
            raise ConfigError(f"--grad-checkpointing: the backbone of '{args.model}' has none, leave it out")
        body.set_grad_checkpointing()
    return model.to(world.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)


def build(args: Namespace, world: World, is_fresh: bool = True) -> DetectionRun:
    """Build the run; only a fresh one loads initial weights. ConfigError if an argument, or its file, is invalid."""
    if not args.data_dir:
        _logger.info('no data folder given: training on digits in scenes')
        args = updated(args, data_dir=str(scenes_folder()))
    norm = args.backbone_norm or ('frozen' if args.pretrained_backbone or args.pretrained_path else 'batch')
    args = updated(args, backbone_norm=norm)
    train_set, val_set = open_splits(args)
    model = build_model(args, train_set, world, is_fresh)
    if model.roi_heads.has_mask() and not (train_set.has_masks and val_set.has_masks):
        boxes = args.model.replace('maskrcnn', 'fasterrcnn', 1)
        raise ConfigError(f"'{args.model}' learns masks, which the annotations have not: give --model {boxes}")
    rebuild = dict(args.model_kwargs, backbone_norm=args.backbone_norm)
    config = detector_config(args.model, train_set.class_names, train_set.category_ids, rebuild)
    loaders = DetectionLoader(args, train_set, world), ValidationLoader(args, val_set, world)
    task = DetectionTask(model, device=world.device, verbose=False)
    files = (f'{train_set.image_ids[i]} {Path(train_set.filename(i)).name}' for i in range(len(train_set)))
    data = dict(classes=list(train_set.class_names), files=list_digest(files))
    return DetectionRun(args, world, task, config, loaders, data)


def train(args: Namespace) -> int:
    """Train a detector: see `training.train`."""
    return training.train(args, build)


def main() -> int:
    """Run the command line."""
    return train(parse_training_args(create_detection_parser(), 'coco_1x', 'scenes'))
