"""Flags that the scripts share: timm's, with timm's names and meanings, and a few of our own."""

import argparse
import os
from typing import Any, Callable, Sequence

import torch

from timm_depla import schema

from .config import FlagParser, KeyValues, list_recipes

OWN_FLAGS = {
    '--recipe', '--dry-run', '--checkpoint-minutes', '--deterministic', '--resume-with-changes', '--log-tensorboard',
    '--evaluator', '--pretrained-backbone', '--trainable-backbone-layers', '--backbone-norm', '--classes',
    '--resize-backend', '--backbone-lr-scale', '--save-epochs', '--stop-epoch', '--val-fraction',
    '--torchcompile-blocks',
}  # fmt: skip
"""Flags that timm's scripts do not have."""


def group(parser: FlagParser, title: str) -> Callable[..., Any]:
    """Create an argument group and return its `add_argument`, which skips the flags in `parser.left_out`.

    Without a `type`, it adds a switch that is off by default and has a --no- form to override a recipe.
    """
    group = parser.add_argument_group(title)

    def add(*names: str, **kwargs: Any) -> None:
        if parser.left_out.keys() & set(names):
            return
        if isinstance(kind := kwargs.get('type'), schema.Kind):
            kwargs.setdefault('metavar', 'N' if kind.parse is int else 'X')
        elif not kwargs.keys() & {'type', 'action', 'choices'}:
            kwargs = {'action': argparse.BooleanOptionalAction, 'default': False, **kwargs}
        group.add_argument(*names, **kwargs)

    return add


def add_loading_args(add: Callable[..., Any], data_dir: str) -> None:
    """The flags of reading data; `data_dir` says what the data folder is."""
    add('--data-dir', type=str, metavar='DIR', help=data_dir)
    add('-j', '--workers', type=schema.workers, default=min(4, os.cpu_count() or 1), help='loading processes')
    add('--pin-mem', help='pin host memory for faster copies to the device')


def add_device_args(parser: FlagParser) -> None:
    """The flags of the device and its precision."""
    add = group(parser, 'device')
    add('--device', type=str, default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME', help='device')
    add('--channels-last', help='channels-last memory format')
    add('--amp', help='automatic mixed precision')
    add('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='its lower precision')
    add('--torchcompile', type=str, nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', type=str, metavar='MODE', help="mode of torch.compile, such as 'max-autotune'")
    blocks = 'compile the blocks with DEPLA alone'
    add('--torchcompile-blocks', type=str, nargs='?', const='inductor', metavar='BACKEND', help=blocks)


def add_training_args(parser: FlagParser, metrics: Sequence[str], val_split: str) -> None:
    """The flags of model, optimizer, schedule and run."""
    _add_model_args(parser)
    _add_optimizer_args(parser)
    _add_schedule_args(parser)
    _add_run_args(parser, metrics, val_split)


def _add_model_args(parser: FlagParser) -> None:
    add = group(parser, 'model')
    weights = dict(type=str, default='', metavar='FILE|RUN|MODEL')
    add('--pretrained', help='start from the weights published for the model')
    add('--pretrained-path', type=str, metavar='FILE', help='start from these weights as if published')
    add('--initial-checkpoint', **weights, help="start from these weights, or the backbone's")
    add('--num-classes', type=schema.count, help='number of classes (default: those of the data)')
    add('--gp', type=str, metavar='POOL', help='global pooling: avg, max, avgmax or catavgmax')
    add('--drop', type=schema.share, default=0.0, help='dropout before the classifier')
    add('--drop-path', type=schema.fraction, help='stochastic depth')
    add('--drop-block', type=schema.share, help='DropBlock')
    add('--head-init-scale', type=schema.finite, help="scale the classifier's initial weights")
    add('--head-init-bias', type=schema.finite, help="the classifier's initial bias")
    add('--grad-checkpointing', help='recompute activations in the backward pass to save memory')
    add('--sync-bn', help='normalise over the batches of all processes')
    add('--dist-bn', default='reduce', choices=['reduce', 'broadcast', ''], help='share batch statistics each epoch')
    add('--no-ddp-bb', action='store_true', default=False, help='do not broadcast buffers at each step')
    add('--model-ema', help='validate and keep an exponential moving average of the weights')
    add('--model-ema-decay', type=schema.share, default=0.9998, help='decay of the average')
    add('--model-ema-warmup', help='start the average at a lower decay')


def _add_optimizer_args(parser: FlagParser) -> None:
    add = group(parser, 'optimizer')
    add('--opt', type=str, default='sgd', metavar='NAME', help='any optimizer of timm')
    add('--opt-eps', type=schema.positive, help='optimizer epsilon')
    add('--opt-betas', type=schema.fraction, nargs='+', help='optimizer betas')
    add('--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE', help='more optimizer arguments')
    add('--momentum', type=schema.share, default=0.9, help='momentum')
    add('--weight-decay', type=schema.non_negative, default=2e-5, help='weight decay')
    add('--clip-grad', type=schema.positive, help='clip gradients')
    add('--clip-mode', default='norm', choices=['norm', 'value', 'agc'], help='to a norm, a value, or adaptively')
    add('--layer-decay', type=schema.decay, help='learning rate decay from layer to layer')
    add('--layer-decay-min-scale', type=schema.share, default=0.0, help='lowest scale of the layer decay')
    add('--layer-decay-no-opt-scale', type=schema.share, help='layers below this scale are not trained')
    names = '--backbone-lr-scale', '--trunk-lr-scale'
    add(*names, type=schema.non_negative, help='scale of the learning rate of all but DEPLA and the classifier')
    add('--grad-accum-steps', type=schema.count, default=1, help='steps whose gradients make one update')


def _add_schedule_args(parser: FlagParser) -> None:
    add = group(parser, 'schedule')
    add('--epochs', type=schema.count, default=300, help='epochs, warm-up included')
    add('--stop-epoch', type=schema.count, help='end after this many epochs of the schedule')
    add('--epoch-repeats', type=schema.non_negative, default=0.0, help='passes an epoch over a hfids/ data set')
    add('--train-num-samples', type=schema.count, help='images an epoch of a streaming data set (default: its count)')
    add('--val-num-samples', type=schema.count, help='images of a streaming validation set')
    add('--sched', type=str, default='cosine', metavar='NAME', help='any schedule of timm')
    add('--sched-on-updates', help='update the learning rate at each step instead of each epoch')
    add('--lr', type=schema.non_negative, help='learning rate; overrides --lr-base')
    add('--lr-base', type=schema.non_negative, default=0.1, help='learning rate for a global batch of --lr-base-size')
    add('--lr-base-size', type=schema.count, default=256, help='global batch that --lr-base is meant for')
    add('--lr-base-scale', default='', choices=['', 'linear', 'sqrt'], help='how it grows (default: by optimizer)')
    add('--lr-noise', type=schema.finite, nargs='+', help='start and end of learning rate noise, share of the epochs')
    add('--lr-noise-pct', type=schema.non_negative, default=0.67, help='limit of the noise')
    add('--lr-noise-std', type=schema.non_negative, default=1.0, help='deviation of the noise')
    add('--lr-cycle-mul', type=schema.decay, default=1.0, help='growth of the cycles')
    add('--lr-cycle-decay', type=schema.non_negative, default=0.5, help='decay from cycle to cycle')
    add('--lr-cycle-limit', type=schema.count, default=1, help='cycles')
    add('--lr-k-decay', type=schema.decay, default=1.0, help='k-decay of cosine and poly')
    add('--warmup-lr', type=schema.non_negative, default=1e-5, help='learning rate at the start of the warm-up')
    add('--min-lr', type=schema.non_negative, default=0.0, help='lowest learning rate')
    add('--warmup-epochs', type=schema.epochs, default=5, help='epochs of warm-up')
    add('--warmup-prefix', help='put the warm-up before the epochs instead of within them')
    add('--decay-epochs', type=schema.positive, default=90, help='epochs between decays (step)')
    milestones = dict(type=schema.whole, nargs='+', default=[90, 180, 270])
    add('--decay-milestones', **milestones, help='epochs of the decays (multistep)')
    add('--cooldown-epochs', type=schema.whole, default=0, help='epochs at the lowest rate after the schedule')
    add('--patience-epochs', type=schema.whole, default=10, help='epochs without progress before a decay (plateau)')
    names = '--decay-rate', '--dr'
    add(*names, type=schema.non_negative, default=0.1, help='decay (step, multistep, plateau), power (poly)')


def _add_run_args(parser: FlagParser, metrics: Sequence[str], val_split: str) -> None:
    add = group(parser, 'run')
    recipes = ', '.join(list_recipes(parser.recipes))
    add('-c', '--config', '--recipe', dest='recipe', type=str, metavar='NAME|FILE', help=f'{recipes}, or a file')
    add('--train-split', type=str, default='train', metavar='NAME', help='training split')
    add('--val-split', type=str, default=val_split, metavar='NAME', help='validation split')
    add('-vb', '--validation-batch-size', type=schema.count, help='images a validation step')
    add('--output', type=str, default='output', metavar='DIR', help='folder of the runs')
    add('--experiment', type=str, default='', metavar='NAME', help='folder of this run (default: time and model)')
    add('--seed', type=schema.seed, default=42, help='random seed')
    add('--deterministic', default=True, help='exact on GPUs too; --no-deterministic lets cuDNN choose faster kernels')
    add('--dry-run', help='print the plan and exit')
    add('--resume', type=str, default='', metavar='auto|RUN', help="resume a run: 'auto', a run or a checkpoint")
    add('--resume-with-changes', help='resume although arguments that change the training differ')
    add('--no-resume-opt', action='store_true', default=False, help='resume without the state of the optimizer')
    add('--checkpoint-minutes', type=schema.non_negative, default=1.0, help='minutes between checkpoints (0: none)')
    add('--recovery-interval', type=schema.whole, default=0, help='steps between checkpoints (0: none)')
    add('--checkpoint-hist', type=schema.whole, default=10, help="epochs' checkpoints to keep, the best ones")
    add('--save-epochs', type=schema.count, nargs='+', default=[], help="keep these epochs' checkpoints too")
    add('--val-interval', type=schema.count, default=1, help='epochs between validations')
    add('--eval-metric', default=metrics[0], choices=metrics, help='metric of the best checkpoint')
    add('--log-interval', type=schema.count, default=50, help='steps between lines of a log')
    add('--log-tensorboard', help='write event files for TensorBoard')
    add('--log-wandb', help='log to Weights & Biases')
    add('--wandb-project', type=str, metavar='NAME', help='its project')
    add('--wandb-tags', type=str, nargs='+', default=[], metavar='TAG', help='its tags')
    add('--wandb-resume-id', type=str, default='', metavar='ID', help='its run to resume')
