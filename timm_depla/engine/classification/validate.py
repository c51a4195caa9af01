"""Validate one classifier or a table of many; implements `validate.py`."""

import csv
import io
import logging
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
from timm.data import RealLabelsImagenet
from timm.layers import apply_test_time_pool
from timm.utils import reparameterize_model
from timm.utils.decay_batch import check_batch_size_retry, decay_batch_step

from timm_depla.errors import ConfigError, TrainingError, UserError, as_config_error, require
from timm_depla.files import escape, format_json
from timm_depla.loading import load_model, run_arguments, trained_data

from ..batches import max_unreadable
from ..config import parse_args, updated
from ..device import autocast, check_compile, compile_depla
from ..distributed import Interrupt, World, explain_lost_peers, setup_world
from ..metrics import check_results, write_results
from ..progress import progress
from .datasets import class_names, count_classes, open_counted, split_name
from .flags import create_validate_parser
from .loaders import create_val_loader, resolve_data

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    args: Namespace,
    world: World,
    interrupt: Optional[Interrupt] = None,
    observe: Any = None,
    confusion: Optional[torch.Tensor] = None,
) -> Dict[str, float]:
    """Mean cross-entropy, and top-1 and top-5 accuracy in percent, over all processes' images.

    Args:
        model: The classifier, on the run's device.
        loader: From `create_val_loader`: batches of images (B, C, H, W) and targets (B,); -1 leaves an image out.
        args: Arguments: `device`, `amp`, `amp_dtype`, `channels_last`.
        world: The processes that share the images.
        interrupt: Ends the evaluation early, by Interrupted.
        observe: Maps each batch's logits to those to be scored.
        confusion: int64 (classes, classes), to count this process's images by class and prediction.

    Returns:
        `loss`, `top1`, `top5`, and `count`, the number of images: a TrainingError if too many are missing.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, top-1, top-5, images
    for images, targets in progress('validation', 'batches', iterable=loader) if world.is_primary else loader:
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(args):
            logits = model(images)
        logits = (logits if observe is None else observe(logits)).float()
        correct = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        loss = nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')
        sums += torch.stack([loss, correct[:, 0].sum(), correct.any(1).sum(), (targets >= 0).sum()]).cpu()
        if confusion is not None:
            pairs = torch.stack([targets, logits.argmax(1)])[:, targets >= 0].cpu()
            confusion.index_put_(tuple(pairs), torch.ones_like(pairs[0]), accumulate=True)
        loader.unreadable.collect()
        if interrupt is not None and interrupt.signal:
            break
    if interrupt is not None:
        interrupt.check()
    loss, top1, top5, count = world.all_reduce(*sums.tolist())
    expected = loader.unreadable.num_images
    if expected - count > max_unreadable(expected) or not count:
        raise TrainingError(
            f'validation got {count:.0f} images with a class that can be read, of {expected}: check the split'
        )
    return {'loss': loss / count, 'top1': 100 * top1 / count, 'top5': 100 * top5 / count, 'count': count}


def find_targets(args: Namespace) -> Tuple[List[str], Optional[str]]:
    """The targets to validate, with wildcards expanded, and the data folder; ConfigError if there is no target."""
    targets, data_dir = list(args.targets), args.data_dir
    if (args.model or args.checkpoint) and len(targets) == 1 and not data_dir:
        path = Path(targets[0])  # perhaps of timm's `validate.py DIR --model NAME --checkpoint FILE`
        if path.is_dir() and not run_arguments(targets[0]) and not (path / 'config.json').is_file():
            data_dir = targets.pop()
    targets += [args.checkpoint] if args.checkpoint else []
    if not targets and args.model:
        targets = [args.model]
    if not targets:
        raise ConfigError('name what to validate: a run, a checkpoint or a model with pretrained weights')
    found: List[str] = []
    for target in targets:
        is_pattern = any(character in target for character in '*?') and not Path(target).exists()
        names = timm.list_models(target, pretrained=True) if is_pattern else [target]
        if not names:
            raise ConfigError(f"no model with pretrained weights fits '{target}'")
        found += names
    return found, data_dir


def _scoring(args: Namespace, dataset: Any) -> Tuple[Optional[Callable], Optional[RealLabelsImagenet]]:
    """The `observe` function of `evaluate`, and the scorer by ImageNet's reassessed labels; None if not needed."""
    if args.valid_labels:
        with as_config_error(f"cannot read --valid-labels '{args.valid_labels}': ", OSError, ValueError):
            valid = [int(line) for line in Path(args.valid_labels).read_text().split()]
        return (lambda logits: logits[:, valid]), None
    if not args.real_labels:
        return None, None
    try:
        real = RealLabelsImagenet(dataset.filenames(basename=True), real_json=args.real_labels)
    except (AssertionError, AttributeError, OSError, ValueError) as error:
        message = f"--real-labels '{args.real_labels}' does not fit the images: {error or 'another number of them'}"
        raise ConfigError(message) from error

    def observe(logits: torch.Tensor) -> torch.Tensor:
        real.add_result(logits)
        return logits

    return observe, real


def _average(confusion: torch.Tensor, kind: str, world: World) -> Dict[str, float]:
    """timm's columns of precision, recall and F1 (percent) from all processes' `confusion` of `evaluate`."""
    from sklearn.metrics import precision_recall_fscore_support

    counts = torch.tensor(world.all_reduce(*confusion.flatten().tolist())).view_as(confusion)
    true, predicted = counts.nonzero(as_tuple=True)
    weights = counts[true, predicted]
    scores = precision_recall_fscore_support(true, predicted, average=kind, sample_weight=weights, zero_division=0)
    names = ('precision', 'recall', 'f1_score')
    return {f'{kind}_{name}': round(100 * float(score), 4) for name, score in zip(names, scores[:3], strict=True)}


def _load(args: Namespace, target: str, dataset: Any) -> nn.Module:
    """Load the model of a data set's classes."""
    options = dict(num_classes=args.num_classes, in_chans=args.in_chans, global_pool=args.gp or None)
    options = {key: value for key, value in options.items() if value is not None}
    if args.model and Path(target).is_file() and 'num_classes' not in options:
        options['num_classes'] = count_classes(args, dataset)
    model = load_model(target, args.model, **{**options, **args.model_kwargs})
    classes = class_names(dataset)
    if classes and len(classes) != model.num_classes and not args.valid_labels:
        raise ConfigError(
            f"'{target}' has {model.num_classes} classes, '{args.data_dir or args.dataset}' has {len(classes)}"
        )
    trained = list(model.pretrained_cfg.get('label_names') or ())
    if changed := [pair for pair in zip(trained, map(str, classes), strict=False) if pair[0] != pair[1]]:
        pairs = ', '.join(f'{old!r} is {new!r} here' for old, new in changed[:3])
        _logger.warning("'%s' was trained on other classes, or in another order: %s", target, pairs)
    return model


def _measure(args: Namespace, target: str, world: World) -> Dict[str, Any]:
    """A target's row of `validate`."""
    if args.data_dir is None and not args.dataset:
        args = updated(args, **{key: getattr(args, key) or value for key, value in trained_data(target).items()})
    args = updated(args, in_chans=args.in_chans or (args.input_size or [None])[0])
    args, dataset = open_counted(args, 'val')
    model = _load(args, target, dataset)
    data_config = resolve_data(args, model, use_test_size=not args.use_train_size)
    if args.reparam:
        model = reparameterize_model(model.eval())
    parameters = sum(p.numel() for p in model.parameters())
    if args.test_pool:
        model, pools = apply_test_time_pool(model, data_config)
        data_config['crop_pct'] = 1.0 if pools else data_config['crop_pct']
    model.to(world.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    compile_depla(args, model)
    if compiled := check_compile(args):
        model = torch.compile(model, **compiled)
    observe, real = _scoring(args, dataset)
    loader = create_val_loader(args, dataset, data_config, world)
    start = time.perf_counter()
    confusion = torch.zeros(2 * [model.num_classes], dtype=torch.int64) if args.metrics_avg else None
    metrics = evaluate(model, loader, args, world, observe=observe, confusion=confusion)
    rate = metrics['count'] / (time.perf_counter() - start)
    loader.unreadable.collect(wait=True)
    if real is not None:
        metrics.update(top1=real.get_accuracy(k=1), top5=real.get_accuracy(k=5))
    top1, top5, loss, images = (metrics[key] for key in ('top1', 'top5', 'loss', 'count'))
    if not math.isfinite(loss):
        raise ConfigError(f"'{target}': the loss is {loss}: its weights, or mean and std, do not fit the data")
    scores = f'top-1 {top1:.2f}  top-5 {top5:.2f}  loss {loss:.3f}'
    split = args.val_split if args.val_fraction else split_name(args, args.val_split)
    data = f'{args.data_dir or args.dataset} {split}'
    _logger.info('%s on %s, %d images: %s  %.0f images/s', target, data, images, scores, rate)
    accuracies = {'top1': top1, 'top1_err': 100 - top1, 'top5': top5, 'top5_err': 100 - top5}
    row = {'model': target, **{key: round(value, 4) for key, value in accuracies.items()}}
    if confusion is not None:
        row.update(_average(confusion, args.metrics_avg, world))
    row.update(param_count=round(parameters / 1e6, 2), img_size=data_config['input_size'][-1])
    row.update({key: data_config[key] for key in ('crop_pct', 'interpolation')}, images_per_second=round(rate, 1))
    return {**row, 'loss': loss, 'images': int(images)}


def _validate_target(args: Namespace, target: str, world: World) -> Dict[str, Any]:
    """A target's row; tries a smaller batch if memory runs out and `args.retry` is set."""
    args = updated(args, train_num_samples=None, seed=0)
    while True:
        try:
            return _measure(args, target, world)
        except torch.OutOfMemoryError as error:
            size, smaller = args.batch_size, decay_batch_step(args.batch_size)
            if not (args.retry and smaller and check_batch_size_retry(str(error))):
                message = f"'{target}': memory ran out with --batch-size {size}; lower it or add --retry"
                raise ConfigError(message) from error
            _logger.warning("'%s': memory ran out with a batch of %d, trying %d", target, size, smaller)
            args = updated(args, batch_size=smaller)


def validate(args: Namespace) -> List[Dict[str, Any]]:
    """Validate every target and print a table, best first, if there are several; a failed one does not stop the rest.

    Without `args.data_dir`, each is validated on the data that its run was trained with. Returns a row of timm's table
    of results for each (percent, millions of parameters), and `loss` and `images`. ConfigError, at the end, if a target
    failed: it does not load, its data is missing, or the classes differ.
    """
    (targets, data_dir), world, rows = find_targets(args), setup_world(args.device), []
    args = updated(args, data_dir=data_dir)
    check_results(args.results_file)
    if args.metrics_avg:
        require('sklearn', 'digits')
    for target in targets:
        try:
            with explain_lost_peers(world):
                rows.append(_validate_target(args, target, world))
        except UserError as error:
            if len(targets) == 1:
                raise
            _logger.error('%s: %s', target, error)
    rows.sort(key=lambda row: row['top1'], reverse=True)
    table = [{key: value for key, value in row.items() if key not in ('loss', 'images')} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0] if table else (), lineterminator='\n')
    writer.writeheader()
    writer.writerows(table)
    if len(targets) > 1:
        print('\n'.join(map(escape, text.getvalue().split('\n'))), end='', flush=True)
    if args.results_file:
        content = text.getvalue() if args.results_format == 'csv' else f'{format_json(table)}\n'
        write_results(args.results_file, content)
    if len(rows) < len(targets):
        raise ConfigError(f'{len(targets) - len(rows)} of the {len(targets)} models could not be validated')
    return rows


def main() -> None:
    """Run the command line."""
    validate(parse_args(create_validate_parser()))
