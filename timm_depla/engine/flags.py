"""The flags of train.py and validate.py: timm's, under timm's names and with timm's meaning, and a few of our own."""

import argparse
import os
from functools import partial
from typing import Any, Callable, Dict, Sequence

import torch
from timm.utils import ParseKwargs

from .config import FlagParser, list_recipes

__all__ = [
    'LEFT_OUT',
    'LEFT_OUT_OF_VALIDATION',
    'OWN_FLAGS',
    'add_device_args',
    'add_loading_args',
    'add_model_args',
    'add_optimizer_args',
    'add_run_args',
    'add_schedule_args',
    'create_train_parser',
    'create_validate_parser',
    'group',
]

OWN_FLAGS = {
    '--recipe', '--dry-run', '--checkpoint-minutes', '--deterministic', '--resume-with-changes', '--log-tensorboard',
    '--evaluator', '--pretrained-backbone', '--trainable-backbone-layers', '--backbone-norm', '--classes',
    '--resize-backend', '--trunk-lr-scale',
}  # fmt: skip
"""Flags that timm's scripts do not have."""

_JIT = 'TorchScript is deprecated: use --torchcompile'
_LEFT_OUT_OF_BOTH = {
    '--amp-impl': 'Apex is no longer kept up: --amp is torch.amp',
    '--device-modules': 'no other accelerator than those that torch knows has been tried',
    '--fast-norm': 'it is for layer and group norms, which these networks have not',
    '--fuser': _JIT,
    '--model-dtype': 'the weights stay in float32: use --amp --amp-dtype bfloat16',
    '--no-prefetcher': "there is one way of loading, timm's prefetcher",
    '--task': 'one label an image only',
    '--target-format': 'one label an image only',
    '--torchscript': _JIT,
}
LEFT_OUT = {
    **_LEFT_OUT_OF_BOTH,
    '--bn-eps': "an argument of EfficientNet's: use --model-kwargs",
    '--bn-momentum': "an argument of EfficientNet's: use --model-kwargs",
    '--drop-connect': 'timm deprecates it: use --drop-path',
    '--kd-loss-type': "timm has one, 'kl'",
    '--kd-student-feature-dim': 'timm finds it from the model',
    '--kd-teacher-feature-dim': 'timm finds it from the model',
    '--kd-token-distill-type': 'for transformers with a distillation token',
    '--local_rank': 'torchrun and Slurm tell it through the environment',
    '--loss': 'the loss follows from --smoothing, --mixup, --cutmix, --bce-loss and --jsd-loss',
    '--model-ema-force-cpu': 'the average is validated each epoch, on the device',
    '--naflex-loader': 'for transformers that take sequences of any length',
    '--pretrained-cfg-overlay': 'use --pretrained-path, --num-classes and the data flags',
    '--save-images': 'every batch can be made again from its position: see docs/training.md',
    '--split-bn': 'its second set of norms is in no model that timm loads',
    '--start-epoch': 'a checkpoint knows its position: use --resume',
    '--synchronize-step': "reading each step's loss synchronises already, one step late",
    '--train-size-schedule': 'one image size a run',
    '--tta': 'it needs a loader that timm no longer has',
    '--use-multi-epochs-loader': 'workers live for the whole run',
    '--worker-seeding': 'random numbers follow from the position, not the worker',
}
"""Flags of timm's train.py that ours lacks, each with the reason."""
LEFT_OUT_OF_VALIDATION = {
    **_LEFT_OUT_OF_BOTH,
    '--log-freq': 'a bar on a terminal, and the result in a log',
    '--aot-autograd': 'use --torchcompile',
    '--num-gpu': 'DataParallel is not kept up: validate one model on each device',
    '--tf-preprocessing': 'it needs TensorFlow, for the first ports of its models',
    '--use-ema': 'a checkpoint of ours holds the weights that were validated; files of weights load the average first',
}
"""Flags of timm's validate.py that ours lacks, each with the reason."""


def group(parser: FlagParser, title: str) -> Callable[..., Any]:
    """A group's `add_argument`; without a `type` it adds a switch, off, whose --no- form overrides a recipe.

    Flags that the parser leaves out are not added.
    """
    group = parser.add_argument_group(title)

    def add(*names: str, **kwargs: Any) -> None:
        if parser.left_out.keys() & set(names):
            return
        if not kwargs.keys() & {'type', 'action', 'choices'}:
            kwargs = {'action': argparse.BooleanOptionalAction, 'default': False, **kwargs}
        group.add_argument(*names, **kwargs)

    return add


def add_loading_args(add: Callable[..., Any]) -> None:
    add('-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N', help='loading processes')
    add('--pin-mem', help='pin host memory for faster copies to the device')


def _add_data_args(parser: FlagParser) -> None:
    add = group(parser, 'data')
    text = partial(add, type=str, default='')
    text('--data-dir', default=None, metavar='DIR', help='data folder, or cache of a Hugging Face data set')
    text('--dataset', metavar='NAME', help='wds/, hfds/NAME, hfids/NAME or torch/NAME (default: folder or tar)')
    text('--class-map', metavar='FILE', help='file that maps class names to indices')
    add('--dataset-download', help='download torch/ and hfids/ data sets')
    add('--dataset-trust-remote-code', help='let Hugging Face data sets run their own code')
    text('--input-img-mode', default=None, metavar='MODE', help='image mode (default: L for one channel, else RGB)')
    text('--input-key', default=None, metavar='KEY', help='key of the image (wds/, hfds/, hfids/)')
    text('--target-key', default=None, metavar='KEY', help='key of the class (wds/, hfds/, hfids/)')
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='images a step in each process')
    add_loading_args(add)
    add('--img-size', type=int, metavar='N', help="image size in pixels (default: the model's)")
    add('--in-chans', type=int, metavar='N', help="image channels (default: the model's)")
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width')
    add('--crop-pct', type=float, metavar='X', help='centre crop for validation, share of the image')
    add('--crop-mode', type=str, metavar='MODE', help='crop for validation: center, squash or border')
    add('--mean', type=float, nargs='+', metavar='X', help="pixel mean (default: the model's)")
    add('--std', type=float, nargs='+', metavar='X', help="pixel deviation (default: the model's)")
    text('--interpolation', metavar='NAME', help="resizing (default: the model's)")


def add_device_args(parser: FlagParser) -> None:
    add = group(parser, 'device')
    add('--device', type=str, default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME', help='device')
    add('--channels-last', help='channels-last memory format')
    add('--amp', help='automatic mixed precision')
    add('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='its lower precision')
    add('--torchcompile', type=str, nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', type=str, metavar='MODE', help="mode of torch.compile, such as 'max-autotune'")


def add_model_args(parser: FlagParser) -> None:
    add = group(parser, 'model')
    add('--pretrained', help='start from the weights published for the model')
    add('--pretrained-path', type=str, metavar='FILE', help='start from these weights as if published')
    add(
        '--initial-checkpoint',
        type=str,
        default='',
        metavar='FILE|MODEL',
        help="start from these weights, or the trunk's",
    )
    add('--num-classes', type=int, metavar='N', help='number of classes (default: those of the data)')
    add('--gp', type=str, metavar='POOL', help='global pooling: avg, max, avgmax or catavgmax')
    add('--drop', type=float, default=0.0, metavar='P', help='dropout before the classifier')
    add('--drop-path', type=float, metavar='P', help='stochastic depth')
    add('--drop-block', type=float, metavar='P', help='DropBlock')
    add('--head-init-scale', type=float, metavar='X', help="scale the classifier's initial weights")
    add('--head-init-bias', type=float, metavar='X', help="the classifier's initial bias")
    add('--grad-checkpointing', help='recompute activations in the backward pass to save memory')
    add('--sync-bn', help='normalise over the batches of all processes')
    add('--dist-bn', default='reduce', choices=['reduce', 'broadcast', ''], help='share batch statistics each epoch')
    add('--no-ddp-bb', action='store_true', default=False, help='do not broadcast buffers at each step')
    add('--model-ema', help='validate and keep an exponential moving average of the weights')
    add('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay of the average')
    add('--model-ema-warmup', help='start the average at a lower decay')


def add_optimizer_args(parser: FlagParser) -> None:
    add = group(parser, 'optimizer')
    number = partial(add, type=float, metavar='X')
    add('--opt', type=str, default='sgd', metavar='NAME', help='any optimizer of timm')
    number('--opt-eps', help='optimizer epsilon')
    number('--opt-betas', nargs='+', help='optimizer betas')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='more optimizer arguments')
    number('--momentum', default=0.9, help='momentum')
    number('--weight-decay', default=2e-5, help='weight decay')
    number('--clip-grad', help='clip gradients')
    add('--clip-mode', default='norm', choices=['norm', 'value', 'agc'], help='to a norm, a value, or adaptively')
    number('--layer-decay', help='learning rate decay from layer to layer')
    number('--layer-decay-min-scale', default=0.0, help='lowest scale of the layer decay')
    number('--layer-decay-no-opt-scale', help='layers below this scale are not trained')
    number('--trunk-lr-scale', help='learning rate of all but DEPLA and the classifier, scaled by this')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='steps whose gradients make one update')


def _whole_or_part(text: str) -> float:
    """A number of epochs, an int where it is whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


def add_schedule_args(parser: FlagParser) -> None:
    add = group(parser, 'schedule')
    number = partial(add, type=float, metavar='X')
    count = partial(add, type=int, metavar='N')
    count('--epochs', default=300, help='epochs, warm-up included')
    count('--stop-epoch', help='end after this many epochs of the schedule')
    add('--epoch-repeats', type=float, default=0.0, metavar='N', help='passes an epoch over a hfids/ data set')
    count('--train-num-samples', help='images an epoch of a streaming data set (default: its own count)')
    count('--val-num-samples', help='images of a streaming validation set')
    add('--sched', type=str, default='cosine', metavar='NAME', help='any schedule of timm')
    add('--sched-on-updates', help='update the learning rate at each step instead of each epoch')
    number('--lr', help='learning rate; overrides --lr-base')
    number('--lr-base', default=0.1, help='learning rate for a global batch of --lr-base-size')
    count('--lr-base-size', default=256, help='global batch that --lr-base is meant for')
    add('--lr-base-scale', default='', choices=['', 'linear', 'sqrt'], help='how it grows (default: by optimizer)')
    number('--lr-noise', nargs='+', help='start and end of learning rate noise, share of the epochs')
    number('--lr-noise-pct', default=0.67, help='limit of the noise')
    number('--lr-noise-std', default=1.0, help='deviation of the noise')
    number('--lr-cycle-mul', default=1.0, help='growth of the cycles')
    number('--lr-cycle-decay', default=0.5, help='decay from cycle to cycle')
    count('--lr-cycle-limit', default=1, help='cycles')
    number('--lr-k-decay', default=1.0, help='k-decay of cosine and poly')
    number('--warmup-lr', default=1e-5, help='learning rate at the start of the warm-up')
    number('--min-lr', default=0.0, help='lowest learning rate')
    add('--warmup-epochs', type=_whole_or_part, default=5, metavar='N', help='epochs of warm-up')
    add('--warmup-prefix', help='put the warm-up before the epochs instead of within them')
    number('--decay-epochs', default=90, help='epochs between decays (step)')
    count('--decay-milestones', nargs='+', default=[90, 180, 270], help='epochs of the decays (multistep)')
    count('--cooldown-epochs', default=0, help='epochs at the lowest rate after the schedule')
    count('--patience-epochs', default=10, help='epochs without progress before a decay (plateau)')
    number('--decay-rate', '--dr', default=0.1, help='decay (step, multistep, plateau), power (poly)')


def _add_augmentation_args(parser: FlagParser) -> None:
    add = group(parser, 'augmentation and loss')
    number = partial(add, type=float, metavar='X')
    add('--no-aug', action='store_true', help='no augmentation')
    add('--train-crop-mode', type=str, metavar='MODE', help='training crop: rrc, rkrc or rkrr (default: rrc)')
    number('--scale', nargs=2, default=[0.08, 1.0], help='random crop, area')
    number('--ratio', nargs=2, default=[3 / 4, 4 / 3], help='random crop, aspect')
    number('--hflip', default=0.5, help='probability of a horizontal flip')
    number('--vflip', default=0.0, help='probability of a vertical flip')
    number('--color-jitter', default=0.4, help='brightness, contrast, saturation')
    number('--color-jitter-prob', help='probability of colour jitter (default: always)')
    number('--grayscale-prob', default=0.0, help='probability of a grey image')
    number('--gaussian-blur-prob', default=0.0, help='probability of blur')
    add('--aa', type=str, metavar='POLICY', help='AutoAugment, RandAugment or AugMix policy, as timm names them')
    number('--aug-repeats', default=0.0, help='times that a sample appears in the epoch, augmented anew')
    add('--aug-splits', type=int, default=0, metavar='N', help='a clean and N - 1 augmented copies of each batch')
    add('--train-interpolation', type=str, default='random', metavar='NAME', help='resizing in training')
    add('--resize-backend', default='pil', choices=['pil', 'torch'], help='torch is faster and rounds differently')
    number('--reprob', default=0.0, help='probability of random erasing')
    add('--remode', default='pixel', choices=['const', 'rand', 'pixel'], help='what fills an erased box')
    add('--recount', type=int, default=1, metavar='N', help='boxes to erase, at most')
    add('--resplit', help='leave the first augmentation split unerased')
    number('--mixup', default=0.0, help='mixup alpha')
    number('--cutmix', default=0.0, help='cutmix alpha')
    number('--cutmix-minmax', nargs=2, help='smallest and largest side of the cutmix box, share of the image')
    number('--mixup-prob', default=1.0, help='probability of mixing')
    number('--mixup-switch-prob', default=0.5, help='probability of cutmix where mixup is on too')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'], help='what shares the mixing parameters')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='mix no more from this epoch on (0: always mix)')
    number('--smoothing', default=0.1, help='label smoothing')
    add('--bce-loss', help='binary cross-entropy')
    add('--bce-sum', help='sum it over the classes instead of averaging')
    number('--bce-target-thresh', help='binarise soft targets above this')
    number('--bce-pos-weight', help='weight of the positive class')
    add('--jsd-loss', help='Jensen-Shannon consistency between augmentation splits')


def _add_distillation_args(parser: FlagParser) -> None:
    add = group(parser, 'distillation')
    number = partial(add, type=float, metavar='X')
    add('--kd-model-name', type=str, metavar='RUN|MODEL', help='teacher: a run, a checkpoint or a pretrained model')
    add('--kd-distill-type', default='logit', choices=['logit', 'feature'], help='what the student matches')
    number('--distill-loss-weight', help='weight of the distillation loss')
    number('--task-loss-weight', help='weight of the classification loss')
    number('--kd-temperature', default=4.0, help='temperature of the soft targets')


def add_run_args(parser: FlagParser, metrics: Sequence[str], val_split: str) -> None:
    add = group(parser, 'run')
    recipes = ', '.join(list_recipes(parser.recipes))
    add('-c', '--config', '--recipe', dest='recipe', type=str, metavar='NAME|FILE', help=f'{recipes}, or a file')
    add('--train-split', type=str, default='train', metavar='NAME', help='training split')
    add('--val-split', type=str, default=val_split, metavar='NAME', help='validation split')
    add('-vb', '--validation-batch-size', type=int, metavar='N', help='images a validation step')
    add('--output', type=str, default='output', metavar='DIR', help='folder of the runs')
    add('--experiment', type=str, default='', metavar='NAME', help='folder of this run (default: time and model)')
    add('--seed', type=int, default=42, metavar='N', help='random seed')
    add('--deterministic', default=True, help='exact on GPUs too; --no-deterministic lets cuDNN choose faster kernels')
    add('--dry-run', help='print the plan and exit')
    add('--resume', type=str, default='', metavar='auto|RUN', help="go on with the run: 'auto', a run or a checkpoint")
    add('--resume-with-changes', help='go on although arguments that change the training differ')
    add('--no-resume-opt', action='store_true', default=False, help='resume without the state of the optimizer')
    add('--checkpoint-minutes', type=float, default=1.0, metavar='X', help='minutes between checkpoints (0: none)')
    add('--recovery-interval', type=int, default=0, metavar='N', help='steps between checkpoints (0: none)')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help="epochs' checkpoints to keep, the best ones")
    add('--save-epochs', type=int, nargs='+', default=[], metavar='N', help="keep these epochs' checkpoints too")
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations')
    add('--eval-metric', default=metrics[0], choices=metrics, help='metric of the best checkpoint')
    add('--log-interval', type=int, default=50, metavar='N', help='steps between lines of a log')
    add('--log-tensorboard', help='write event files for TensorBoard')
    add('--log-wandb', help='log to Weights & Biases')
    add('--wandb-project', type=str, metavar='NAME', help='its project')
    add('--wandb-tags', type=str, nargs='+', default=[], metavar='TAG', help='its tags')
    add('--wandb-resume-id', type=str, default='', metavar='ID', help='the run there to go on with')


def _create_parser(
    script: str, arguments: str, description: str, default_model: str, left_out: Dict[str, str]
) -> FlagParser:
    """What train.py and validate.py share."""
    usage = f'{script} {arguments} [--FLAG VALUE ...]'
    parser = FlagParser(script, usage, description, left_out=left_out)
    parser.add_argument('-m', '--model', default=default_model, metavar='NAME', help='any model of timm or timm_depla')
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help="model arguments, as in depla=\"{'temperature': 0.5, 'bfn': 'adaptive'}\"",
    )
    _add_data_args(parser)
    add_device_args(parser)
    return parser


def create_train_parser() -> FlagParser:
    """The command line of train.py."""
    description = 'Train an image classifier of timm or timm_depla; without a data folder, on the embedded digits.'
    parser = _create_parser('train.py', '[DIR] [--recipe NAME]', description, 'resnet50_depla', LEFT_OUT)
    parser.add_argument('data', nargs='?', metavar='DIR', help='data folder')
    for add_args in (
        add_model_args,
        add_optimizer_args,
        add_schedule_args,
        _add_augmentation_args,
        _add_distillation_args,
    ):
        add_args(parser)
    add_run_args(parser, ['top1', 'top5', 'loss'], 'validation')
    return parser


def create_validate_parser() -> FlagParser:
    """The command line of validate.py."""
    description = 'Validate image classifiers: runs, checkpoints, and models with pretrained weights.'
    parser = _create_parser('validate.py', 'RUN|CHECKPOINT|MODEL ...', description, '', LEFT_OUT_OF_VALIDATION)
    parser.set_defaults(batch_size=256)
    parser.add_argument('targets', nargs='*', metavar='RUN|CHECKPOINT|MODEL', help='what to validate, or wildcards')
    add = group(parser, 'validation')
    text = partial(add, type=str, default='')
    text('--checkpoint', metavar='FILE', help='a checkpoint, or a file of weights of --model')
    add('--pretrained', help='use the pretrained weights of --model (a model without a checkpoint always does)')
    text('--split', '--val-split', dest='val_split', default='validation', metavar='NAME', help='validation split')
    add('--val-num-samples', type=int, metavar='N', help='images of a streaming data set')
    add('--num-classes', type=int, metavar='N', help='classes of a file of weights')
    add('--gp', type=str, metavar='POOL', help='global pooling: avg, max, avgmax or catavgmax')
    add('--use-train-size', help="the model's training size even where its cfg names a test size")
    add('--test-pool', help='pool over windows of the training size where images are larger')
    text('--real-labels', metavar='FILE', help="ImageNet's reassessed labels (JSON)")
    text('--valid-labels', metavar='FILE', help='class indices to choose among, one a line')
    add('--retry', help='halve the batch and try again where memory runs out')
    text('--results-file', metavar='FILE', help='write the table of results')
    add('--results-format', default='csv', choices=['csv', 'json'], help='its format')
    return parser
