"""Train and validate an image classifier: timm's data, optimizer, schedule, loss and weight average, and one loop."""

import logging
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
import yaml
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy, dispatch_clip_grad, random_seed, update_summary
from tqdm import tqdm

from timm_depla.data import digits_folder

from .checkpoint import create_model, load_model, load_weights, save_checkpoint
from .config import ConfigError

__all__ = ['evaluate', 'train', 'train_one_epoch', 'validate']

_logger = logging.getLogger(__name__)


def find_data(args: Namespace) -> str:
    """The data folder of a training run: the one given, or the embedded digits.

    Raises:
        ConfigError: If the digits cannot be written.
    """
    if args.data or args.data_dir:
        return str(args.data or args.data_dir)
    _logger.info('no data folder given: training on the embedded handwritten digits')
    try:
        return str(digits_folder())
    except (ModuleNotFoundError, OSError, RuntimeError) as error:
        raise ConfigError(str(error)) from error


def check_device(args: Namespace) -> None:
    """Raise ConfigError unless `args.device` is there."""
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"cannot use device '{args.device}': {str(error).splitlines()[0]}") from error


def open_split(args: Namespace, split: str) -> Any:
    """One split of the data folder.

    Raises:
        ConfigError: If the folder is missing, or has no class folders with images.
    """
    root = Path(args.data_dir)
    if not root.is_dir():
        raise ConfigError(f"no data folder '{root}'")
    try:
        return create_dataset('', root=str(root), split=split, class_map=args.class_map)
    except RuntimeError as error:
        raise ConfigError(
            f"no classes with images for the split '{split}' in '{root}': expected {root / split}/CLASS/IMAGE"
        ) from error


def open_splits(args: Namespace) -> Tuple[Any, Any]:
    """The training and the validation split.

    Raises:
        ConfigError: If one cannot be opened, both are the same folder, or their classes differ.
    """
    train_set, val_set = open_split(args, args.train_split), open_split(args, args.val_split)
    if train_set.reader.root == val_set.reader.root:
        raise ConfigError(
            f"training and validation would both read '{val_set.reader.root}': expected the folders "
            f"'{args.train_split}' and '{args.val_split}' in '{args.data_dir}'"
        )
    if train_set.reader.class_to_idx != val_set.reader.class_to_idx:
        differing = sorted(train_set.reader.class_to_idx.keys() ^ val_set.reader.class_to_idx.keys())
        raise ConfigError(f"the splits of '{args.data_dir}' differ in the classes {', '.join(differing[:5])}")
    return train_set, val_set


def create_loaders(args: Namespace, train_set: Any, val_set: Any, data_config: Dict[str, Any]) -> Tuple[Any, Any]:
    """Training and validation loaders, on the run's device.

    Raises:
        ConfigError: If a batch is larger than the training set, or timm does not know an augmentation.
    """
    if len(train_set) < args.batch_size:
        raise ConfigError(
            f'a batch of {args.batch_size} is larger than the training set of {len(train_set)} images: '
            'lower --batch-size'
        )
    kwargs: Dict[str, Any] = {key: data_config[key] for key in ('interpolation', 'mean', 'std')}
    kwargs.update(scale=args.scale, ratio=args.ratio, hflip=args.hflip, color_jitter=args.color_jitter)
    kwargs.update(auto_augment=args.aa, re_prob=args.reprob)
    if args.mixup > 0 or args.cutmix > 0:
        kwargs['collate_fn'] = FastCollateMixup(
            args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=args.num_classes
        )
    try:
        train_loader = create_loader(
            train_set,
            data_config['input_size'],
            args.batch_size,
            is_training=True,
            num_workers=args.workers,
            device=torch.device(args.device),
            **kwargs,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f'timm cannot augment as asked: {error!r}') from error
    return train_loader, create_val_loader(args, val_set, data_config)


def create_val_loader(args: Namespace, dataset: Any, data_config: Dict[str, Any]) -> Any:
    """The loader that validation reads, here and in validate.py."""
    kwargs = {key: data_config[key] for key in ('interpolation', 'mean', 'std', 'crop_pct')}
    device = torch.device(args.device)
    try:
        return create_loader(
            dataset, data_config['input_size'], args.batch_size, num_workers=args.workers, device=device, **kwargs
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f'timm cannot prepare the images as asked: {error!r}') from error


def _autocast(args: Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def _progress(loader: Any, description: str) -> tqdm:
    """A progress bar on a terminal, nothing in a log."""
    return tqdm(loader, desc=description, leave=False, disable=not sys.stderr.isatty())


def train_one_epoch(
    epoch: int,
    model: nn.Module,
    loader: Any,
    loss_fn: nn.Module,
    optimizer: torch.optim.Optimizer,
    args: Namespace,
    scheduler: Any,
    scaler: Optional[NativeScaler] = None,
    ema: Optional[ModelEmaV3] = None,
) -> Dict[str, float]:
    """Train for one epoch and return its mean loss.

    Raises:
        ConfigError: If the loss is not finite.
    """
    model.train()
    losses = AverageMeter()
    num_steps = len(loader)
    start = time.perf_counter()
    bar = _progress(loader, f'epoch {epoch}')
    for step, (images, targets) in enumerate(bar):
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with _autocast(args):
            loss = loss_fn(model(images), targets)
        if not torch.isfinite(loss):
            raise ConfigError(
                f'the loss is {loss.item()} at epoch {epoch}, step {step}, learning rate '
                f'{optimizer.param_groups[0]["lr"]:.3g}: lower --lr or set --clip-grad'
            )
        optimizer.zero_grad()
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=args.clip_grad, parameters=model.parameters())
        else:
            loss.backward()
            if args.clip_grad is not None:
                dispatch_clip_grad(model.parameters(), args.clip_grad)
            optimizer.step()
        update = epoch * num_steps + step + 1
        if ema is not None:
            ema.update(model, step=update)
        scheduler.step_update(num_updates=update, metric=losses.avg)
        losses.update(loss.item(), len(images))
        bar.set_postfix(loss=f'{losses.avg:.3f}', lr=f'{optimizer.param_groups[0]["lr"]:.3g}', refresh=False)
        if bar.disable and (step + 1) % args.log_interval == 0:
            rate = losses.count / (time.perf_counter() - start)
            _logger.info('epoch %d  step %d/%d  loss %.3f  %.0f images/s', epoch, step + 1, num_steps, losses.avg, rate)
    return {'loss': losses.avg}


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, args: Namespace) -> Dict[str, float]:
    """Mean cross-entropy and top-1 and top-5 accuracy in percent over a loader."""
    model.eval()
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    for images, targets in _progress(loader, 'validation'):
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with _autocast(args):
            logits = model(images)
        losses.update(nn.functional.cross_entropy(logits.float(), targets).item(), len(images))
        for meter, value in zip((top1, top5), accuracy(logits, targets, topk=(1, 5)), strict=True):
            meter.update(value.item(), len(images))
    return {'loss': losses.avg, 'top1': top1.avg, 'top5': top5.avg}


def rebuild_args(args: Namespace) -> Dict[str, Any]:
    """Model arguments that a checkpoint must remember to be loaded as it was trained."""
    return {**({'global_pool': args.gp} if args.gp else {}), **args.model_kwargs}


def build(args: Namespace) -> Tuple[nn.Module, Any, Any]:
    """The model, on its device and with the run's data configuration in its `pretrained_cfg`, and its loaders."""
    check_device(args)
    train_set, val_set = open_splits(args)
    args.num_classes = args.num_classes or len(train_set.reader.class_to_idx)
    kwargs = dict(pretrained=args.pretrained, num_classes=args.num_classes, drop_rate=args.drop)
    model = create_model(args.model, **{**kwargs, 'drop_path_rate': args.drop_path, **rebuild_args(args)})
    if args.initial_checkpoint:
        _logger.info('%s: %s', args.initial_checkpoint, load_weights(model, args.initial_checkpoint))
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    data_config = resolve_data_config(vars(args), model=model)
    model.pretrained_cfg = {**model.pretrained_cfg, **data_config, 'pool_size': None}
    model.to(args.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    return model, *create_loaders(args, train_set, val_set, data_config)


def create_optimizer(args: Namespace, model: nn.Module, num_steps: int) -> Tuple[torch.optim.Optimizer, Any, int]:
    """Optimizer, schedule, and the number of epochs, for `num_steps` steps an epoch.

    Raises:
        ConfigError: If there is no such optimizer or schedule, or it does not take an argument.
    """
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot create optimizer '{args.opt}': {error}") from error
    try:
        scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=num_steps)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"cannot create schedule '{args.sched}': {error}") from error
    if scheduler is None:
        raise ConfigError(f"cannot create schedule '{args.sched}': use one of timm's, such as cosine or step")
    return optimizer, scheduler, num_epochs


def create_run_folder(args: Namespace) -> Path:
    """Make the run's folder and write its configuration, args.yaml.

    Raises:
        ConfigError: If it exists, or cannot be written.
    """
    folder = Path(args.output) / (args.experiment or f'{time.strftime("%Y%m%d-%H%M%S")}-{args.model}')
    try:
        folder.mkdir(parents=True)
        (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args), sort_keys=False))
    except FileExistsError as error:
        raise ConfigError(f"run folder '{folder}' exists: choose another --experiment or --output") from error
    except OSError as error:
        raise ConfigError(f"cannot write run folder '{folder}': {error}") from error
    return folder


def train(args: Namespace) -> Dict[str, Any]:
    """Train a classifier and return the record of its best epoch.

    Writes to `args.output`/`args.experiment`: args.yaml (the effective configuration), summary.csv (a row an epoch),
    and the checkpoints best/ and last/.
    """
    args.data_dir = find_data(args)
    del args.data  # args.yaml keeps data_dir
    random_seed(args.seed)
    model, train_loader, val_loader = build(args)
    optimizer, scheduler, num_epochs = create_optimizer(args, model, len(train_loader))
    mixed = args.mixup > 0 or args.cutmix > 0
    loss_fn = SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(args.smoothing)
    ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    scaler = NativeScaler(torch.device(args.device).type) if args.amp and args.amp_dtype == 'float16' else None
    folder = create_run_folder(args)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    _logger.info('%s, %.2f M parameters; run folder %s', args.model, parameters, folder)
    images = len(train_loader.dataset), len(val_loader.dataset), args.num_classes
    _logger.info('%s: %d training and %d validation images of %d classes', args.data_dir, *images)

    best: Dict[str, Any] = {}
    for epoch in range(num_epochs):
        start = time.perf_counter()
        train_metrics = train_one_epoch(epoch, model, train_loader, loss_fn, optimizer, args, scheduler, scaler, ema)
        lr = optimizer.param_groups[0]['lr']
        evaluated = model if ema is None else ema.module
        metrics = evaluate(evaluated, val_loader, args)
        scheduler.step(epoch + 1, metrics['top1'])
        update_summary(epoch, train_metrics, metrics, folder / 'summary.csv', lr=lr)
        record = {'epoch': epoch, **metrics}
        save_checkpoint(folder / 'last', evaluated, rebuild_args(args), record)
        if not best or metrics['top1'] > best['top1']:
            best = record
            save_checkpoint(folder / 'best', evaluated, rebuild_args(args), record)
        losses = train_metrics['loss'], metrics['loss']
        line = 'epoch %d/%d  train loss %.3f  validation loss %.3f  top-1 %.2f  best %.2f  lr %.3g  %.1f s'
        seconds = time.perf_counter() - start
        _logger.info(line, epoch, num_epochs - 1, *losses, metrics['top1'], best['top1'], lr, seconds)
    _logger.info('best top-1 %.2f at epoch %d: python validate.py %s', best['top1'], best['epoch'], folder)
    return best


def validate(args: Namespace) -> Dict[str, float]:
    """Validate `args.checkpoint` on `args.data_dir`, by default on the data that its run was trained with.

    Raises:
        ConfigError: If the checkpoint does not load, the data is not to be found, or their classes do not match.
    """
    run = Path(args.checkpoint)
    run_args = next((f for f in (run / 'args.yaml', run.parent / 'args.yaml') if f.is_file()), None)
    if args.data_dir is None:
        if run_args is None:
            raise ConfigError(
                f"'{args.checkpoint}' is no run folder, which would tell its data: check the path, or "
                'name the data with --data-dir'
            )
        args.data_dir = yaml.safe_load(run_args.read_text())['data_dir']
    check_device(args)
    dataset = open_split(args, args.val_split)
    num_classes = len(dataset.reader.class_to_idx)
    kwargs = dict(num_classes=num_classes) if args.model and run.is_file() else {}  # other checkpoints know theirs
    model = load_model(args.checkpoint, args.model, **{**kwargs, **args.model_kwargs})
    if model.num_classes != num_classes:
        raise ConfigError(f"'{args.checkpoint}' has {model.num_classes} classes, '{args.data_dir}' has {num_classes}")
    model.to(args.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    metrics = evaluate(model, create_val_loader(args, dataset, resolve_data_config(vars(args), model=model)), args)
    _logger.info(
        '%s on %s, %d images: top-1 %.2f  top-5 %.2f  loss %.3f',
        args.checkpoint,
        args.data_dir,
        len(dataset),
        metrics['top1'],
        metrics['top5'],
        metrics['loss'],
    )
    return metrics
