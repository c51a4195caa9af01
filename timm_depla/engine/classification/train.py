"""Train an image classifier: timm's data, loss and task, in the loop of `training`."""

import logging
import math
from argparse import Namespace
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask

from timm_depla.data import Draw, digits_folder, seed_position
from timm_depla.errors import ConfigError
from timm_depla.files import list_digest
from timm_depla.loading import create_model, load_model, load_weights, model_config, pretrained_file
from timm_depla.models.cost import count_cost

from .. import training
from ..config import parse_training_args, updated
from ..distributed import Interrupt, World
from ..metrics import Metric
from ..run import Run
from .datasets import check_images, class_names, count_classes, file_names, open_splits, split_name
from .flags import create_train_parser
from .loaders import TrainLoader, create_val_loader, mixes, resolve_data
from .validate import evaluate

_logger = logging.getLogger(__name__)


def rebuild_args(args: Namespace) -> Dict[str, Any]:
    """Model arguments that a checkpoint stores, to rebuild the trained model."""
    return {**({'global_pool': args.gp} if args.gp else {}), **args.model_kwargs}


def build_model(args: Namespace, world: World, is_fresh: bool) -> Tuple[nn.Module, Dict[str, Any]]:
    """Build the model, on its device, and the data configuration, which its `pretrained_cfg` holds too."""
    seed_position(args.seed, Draw.INIT)
    is_pretrained = args.pretrained and is_fresh and not args.dry_run  # which downloads nothing
    kwargs = dict(pretrained=is_pretrained, num_classes=args.num_classes, drop_rate=args.drop)
    kwargs.update(drop_path_rate=args.drop_path, in_chans=args.in_chans)
    if args.drop_block:
        kwargs['drop_block_rate'] = args.drop_block
    if args.pretrained_path and is_fresh:
        kwargs.update(pretrained=True, pretrained_cfg_overlay=pretrained_file(args))
    model = create_model(args.model, **{k: v for k, v in kwargs.items() if v is not None}, **rebuild_args(args))
    if args.initial_checkpoint and is_fresh:
        _logger.info('%s: %s', args.initial_checkpoint, load_weights(model, args.initial_checkpoint))
    with torch.no_grad():
        if args.head_init_scale is not None:
            for parameter in model.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    data_config = resolve_data(args, model)
    changes = dict(data_config, pool_size=None, test_input_size=None, test_crop_pct=None)
    if getattr(model, 'feature_info', None):
        reduction = model.feature_info[-1]['reduction']
        changes['pool_size'] = tuple(math.ceil(size / reduction) for size in data_config['input_size'][1:])
    model.pretrained_cfg = {**model.pretrained_cfg, **changes}
    model.to(world.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    return model, data_config


def create_loss(args: Namespace) -> nn.Module:
    """Create the training loss; with mixing, the targets are already soft and smoothed."""
    if args.jsd_loss:
        if args.aug_splits < 2:
            raise ConfigError('--jsd-loss compares augmentation splits: give --aug-splits 2 or more')
        return JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    smoothing = 0.0 if mixes(args) else args.smoothing
    if args.bce_loss:
        kwargs = dict(sum_classes=args.bce_sum, pos_weight=args.bce_pos_weight)
        return BinaryCrossEntropy(smoothing, args.bce_target_thresh, **kwargs)
    if mixes(args):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def create_task(args: Namespace, model: nn.Module, world: World) -> nn.Module:
    """timm's task: classification, or distillation from a teacher, of which a ConfigError says if it does not fit."""
    kwargs: Dict[str, Any] = dict(criterion=create_loss(args).to(world.device), device=world.device, verbose=False)
    if args.kd_model_name is None:
        return ClassificationTask(model, **kwargs)
    teacher = load_model(args.kd_model_name).to(world.device)
    if teacher.num_classes != args.num_classes:
        raise ConfigError(f"teacher '{args.kd_model_name}' has {teacher.num_classes} classes, not {args.num_classes}")
    teacher.requires_grad_(False)
    kwargs.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(model, teacher, **kwargs).to(world.device)
    return LogitDistillationTask(model, teacher, temperature=args.kd_temperature, **kwargs)


class ClassificationRun(Run):
    """The training of a classifier, with the data configuration in the model's `pretrained_cfg`."""

    metrics = (
        Metric('loss', 'val loss', 'loss', 3),
        Metric('top1', 'top-1', 'accuracy (%)', 2),
        Metric('top5', 'top-5', 'accuracy (%)'),
    )
    train_script, validate_script = 'train.py', 'validate.py'
    create_parser = staticmethod(create_train_parser)

    def evaluate(self, model: nn.Module, interrupt: Interrupt) -> Dict[str, float]:
        return evaluate(model, self.val_loader, self.args, self.world, interrupt)

    def subject(self) -> Dict[str, str]:
        args, size = self.args, self.model.pretrained_cfg['input_size']
        try:
            cost = count_cost(self.model, size)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
            cause = (str(error).splitlines() or [''])[0]
            raise ConfigError(f"'{args.model}' takes no images of {size[1]} x {size[2]}: {cause}") from error
        parameters, macs = cost['parameters'] / 1e6, cost['macs'] / 1e9
        images, val_images = f'{self.loader.num_images:,}', f'{self.val_loader.unreadable.num_images:,}'
        splits = [split_name(args, split) for split in (args.train_split, args.val_split)]
        data = f'{args.dataset} {args.data_dir or ""}'.strip()
        return {
            'model': f'{args.model}, {parameters:.2f} M parameters, '
            f'{macs:.2f} G multiply-adds at {size[1]} x {size[2]}',
            'data': f"{data}: {images} training images of '{splits[0]}', {val_images} validation images of "
            f"'{splits[1]}', {args.num_classes:,} classes",
        }


def build(args: Namespace, world: World, is_fresh: bool = True) -> ClassificationRun:
    """Build the run; only a fresh one loads initial weights. ConfigError if an argument, or its file, is invalid."""
    if not (args.data_dir or args.dataset):
        _logger.info('no data folder given: training on the embedded handwritten digits')
        args = updated(args, data_dir=str(digits_folder()))
    args = updated(args, in_chans=args.in_chans or (args.input_size or [None])[0])
    args, train_set, val_set = open_splits(args)
    if is_fresh:
        check_images(args, world, train_set, val_set)
    args = updated(args, num_classes=count_classes(args, train_set))
    model, data_config = build_model(args, world, is_fresh)
    classes = [str(name) for name in class_names(train_set)]
    config = model_config(model, rebuild_args(args), classes)
    loaders = TrainLoader(args, train_set, data_config, world), create_val_loader(args, val_set, data_config, world)
    data = dict(classes=classes, files=list_digest(file_names(train_set)))
    return ClassificationRun(args, world, create_task(args, model, world), config, loaders, data)


def train(args: Namespace) -> int:
    """Train a classifier: see `training.train`."""
    return training.train(args, build)


def main() -> int:
    """Run the command line."""
    return train(parse_training_args(create_train_parser(), 'better', 'digits'))
