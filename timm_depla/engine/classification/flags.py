"""The flags of train.py and validate.py."""

from functools import partial
from typing import Dict

from timm_depla import schema

from ..config import FlagParser, KeyValues
from ..flags import add_device_args, add_loading_args, add_training_args, group

_INTERPOLATIONS = ['', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos']
_JIT = 'TorchScript is deprecated: use --torchcompile'
_FLEXIBLE = 'for transformers that take sequences of any length'
_ONE_SIZE = 'one image size a run'
_ONE_PASS = 'an epoch is one pass over the data; --train-num-samples sets that of a stream'
_LEFT_OUT_OF_BOTH = {
    '--amp-impl': 'Apex is no longer kept up: --amp is torch.amp',
    '--device-modules': 'no other accelerator than those that torch knows has been tried',
    '--fast-norm': 'it is for layer and group norms, which these networks have not',
    **dict.fromkeys(('--fuser', '--torchscript'), _JIT),
    '--model-dtype': 'the weights stay in float32: use --amp --amp-dtype bfloat16',
    **dict.fromkeys(('--naflex-loader', '--naflex-max-seq-len'), _FLEXIBLE),
    '--no-prefetcher': "there is one way of loading, timm's prefetcher",
    **dict.fromkeys(('--task', '--target-format'), 'one label an image only'),
}
LEFT_OUT = {
    **_LEFT_OUT_OF_BOTH,
    **dict.fromkeys(('--bn-eps', '--bn-momentum'), "an argument of EfficientNet's: use --model-kwargs"),
    '--drop-connect': 'timm deprecates it: use --drop-path',
    '--kd-loss-type': "timm has one, 'kl'",
    **dict.fromkeys(('--kd-student-feature-dim', '--kd-teacher-feature-dim'), 'timm finds it from the model'),
    '--kd-token-distill-type': 'for transformers with a distillation token',
    '--local_rank': 'torchrun and Slurm set it in the environment',
    '--loss': 'the loss follows from --smoothing, --mixup, --cutmix, --bce-loss and --jsd-loss',
    '--model-ema-force-cpu': 'the average is validated each epoch, on the device',
    **dict.fromkeys(('--naflex-loss-scale', '--naflex-patch-size-probs', '--naflex-patch-sizes'), _FLEXIBLE),
    **dict.fromkeys(('--naflex-patchify-channels-first', '--naflex-train-seq-lens'), _FLEXIBLE),
    '--pretrained-cfg-overlay': 'use --pretrained-path, --num-classes and the data flags',
    '--save-images': 'every batch can be made again from its position: see docs/training.md',
    '--split-bn': 'its second set of norms is in no model that timm loads',
    '--start-epoch': 'a checkpoint knows its position: use --resume',
    '--synchronize-step': "reading each step's loss synchronises already, one step late",
    **dict.fromkeys(('--train-batches-per-epoch', '--train-steps-per-epoch'), _ONE_PASS),
    **dict.fromkeys(('--train-batch-sizes', '--train-img-sizes', '--train-size-probs'), _ONE_SIZE),
    **dict.fromkeys(('--train-size-random-mix', '--train-size-schedule', '--train-size-schedule-spread'), _ONE_SIZE),
    '--tta': 'it needs a loader that timm no longer has',
    '--variable-batch-loss-scale': 'one batch size a run',
    '--use-multi-epochs-loader': 'workers live for the whole run',
    '--worker-seeding': 'random numbers follow from the position, not the worker',
}
"""Flags of timm's train.py that ours lacks, each with the reason."""
LEFT_OUT_OF_VALIDATION = {
    **_LEFT_OUT_OF_BOTH,
    '--crop-border-pixels': 'use --crop-pct, or crop the files',
    '--log-freq': 'a bar on a terminal, and the result in a log',
    '--aot-autograd': 'use --torchcompile',
    '--num-gpu': 'DataParallel is not kept up: validate one model on each device',
    '--seed': 'validation draws no random numbers',
    '--tf-preprocessing': 'it needs TensorFlow, for the first ports of its models',
    '--use-ema': 'a checkpoint of ours holds the weights that were validated; files of weights load the average first',
}
"""Flags of timm's validate.py that ours lacks, each with the reason."""


def _add_data_args(parser: FlagParser) -> None:
    add = group(parser, 'data')
    text = partial(add, type=str, default='')
    add_loading_args(add, 'data folder, or cache of a Hugging Face data set')
    text('--dataset', metavar='NAME', help='wds/, hfds/NAME, hfids/NAME or torch/NAME (default: folder or tar)')
    text('--class-map', metavar='FILE', help='file that maps class names to indices')
    add('--val-fraction', type=schema.fraction, help='share of each class for validation, of a folder without splits')
    add('--dataset-download', help='download torch/ and hfids/ data sets')
    add('--dataset-trust-remote-code', help='let Hugging Face data sets run their own code')
    modes = schema.IMAGE_MODES
    add('--input-img-mode', choices=modes, help='image mode (default: L for one channel, else RGB)')
    text('--input-key', default=None, metavar='KEY', help='key of the image (wds/, hfds/, hfids/)')
    text('--target-key', default=None, metavar='KEY', help='key of the class (wds/, hfds/, hfids/)')
    add('-b', '--batch-size', type=schema.count, default=128, help='images a step in each process')
    add('--img-size', type=schema.side, help="image size in pixels (default: the model's)")
    add('--in-chans', type=schema.channels, help="image channels (default: the model's)")
    add('--input-size', type=schema.side, nargs=3, help='channels, height and width')
    add('--crop-pct', type=schema.crop, help='centre crop for validation, share of the image')
    add('--crop-mode', choices=['center', 'squash', 'border'], help="crop for validation (default: the model's)")
    add('--mean', type=schema.finite, nargs='+', help="pixel mean (default: the model's)")
    add('--std', type=schema.deviation, nargs='+', help="pixel deviation (default: the model's)")
    add('--interpolation', default='', choices=_INTERPOLATIONS, help="resizing (default: the model's)")


def _add_augmentation_args(parser: FlagParser) -> None:
    add = group(parser, 'augmentation and loss')
    add('--no-aug', action='store_true', help='no augmentation')
    add('--train-crop-mode', choices=['rrc', 'rkrc', 'rkrr'], help='training crop (default: rrc)')
    add('--scale', type=schema.aspect, nargs=2, default=[0.08, 1.0], help='random crop, area')
    add('--ratio', type=schema.aspect, nargs=2, default=[3 / 4, 4 / 3], help='random crop, aspect')
    add('--hflip', type=schema.share, default=0.5, help='probability of a horizontal flip')
    add('--vflip', type=schema.share, default=0.0, help='probability of a vertical flip')
    add('--color-jitter', type=schema.non_negative, default=0.4, help='brightness, contrast, saturation')
    add('--color-jitter-prob', type=schema.share, help='probability of colour jitter (default: always)')
    add('--grayscale-prob', type=schema.share, default=0.0, help='probability of a grey image')
    add('--gaussian-blur-prob', type=schema.share, default=0.0, help='probability of blur')
    add('--aa', type=str, metavar='POLICY', help='AutoAugment, RandAugment or AugMix policy, as timm names them')
    add('--aug-repeats', type=schema.few, default=0.0, help='times that an epoch has a sample, each augmented anew')
    add('--aug-splits', type=schema.splits, default=0, help='a clean and N - 1 augmented copies of each batch')
    names = [*_INTERPOLATIONS, 'random']
    add('--train-interpolation', default='random', choices=names, help='resizing in training')
    add('--resize-backend', default='pil', choices=['pil', 'torch'], help='torch is faster and rounds differently')
    add('--reprob', type=schema.share, default=0.0, help='probability of random erasing')
    add('--remode', default='pixel', choices=['const', 'rand', 'pixel'], help='what fills an erased box')
    add('--recount', type=schema.boxes, default=1, help='boxes to erase, at most')
    add('--resplit', help='leave the first augmentation split unerased')
    add('--mixup', type=schema.alpha, default=0.0, help='mixup alpha')
    add('--cutmix', type=schema.alpha, default=0.0, help='cutmix alpha')
    add('--cutmix-minmax', type=schema.share, nargs=2, help='smallest and largest side of its box, share of the image')
    add('--mixup-prob', type=schema.share, default=1.0, help='probability of mixing')
    add('--mixup-switch-prob', type=schema.share, default=0.5, help='probability of cutmix where mixup is on too')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'], help='what shares the mixing parameters')
    add('--mixup-off-epoch', type=schema.whole, default=0, help='mix no more from this epoch on (0: always mix)')
    add('--smoothing', type=schema.fraction, default=0.1, help='label smoothing')
    add('--bce-loss', help='binary cross-entropy')
    add('--bce-sum', help='sum it over the classes instead of averaging')
    add('--bce-target-thresh', type=schema.share, help='binarise soft targets above this')
    add('--bce-pos-weight', type=schema.positive, help='weight of the positive class')
    add('--jsd-loss', help='Jensen-Shannon consistency between augmentation splits')


def _add_distillation_args(parser: FlagParser) -> None:
    add = group(parser, 'distillation')
    add('--kd-model-name', type=str, metavar='RUN|MODEL', help='teacher: a run, a checkpoint or a pretrained model')
    add('--kd-distill-type', default='logit', choices=['logit', 'feature'], help='what the student matches')
    add('--distill-loss-weight', type=schema.non_negative, help='weight of the distillation loss')
    add('--task-loss-weight', type=schema.non_negative, help='weight of the classification loss')
    add('--kd-temperature', type=schema.positive, default=4.0, help='temperature of the soft targets')


def _create_parser(arguments: str, description: str, default_model: str, left_out: Dict[str, str]) -> FlagParser:
    """The part that the command lines of train.py and validate.py share."""
    parser = FlagParser(arguments, description, left_out)
    parser.add_argument('-m', '--model', default=default_model, metavar='NAME', help='any model of timm or timm_depla')
    kwargs = dict(nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE')
    example = "depla=\"{'temperature': 0.5, 'bfn': 'adaptive'}\""
    parser.add_argument('--model-kwargs', **kwargs, help=f'model arguments, as in {example}')
    _add_data_args(parser)
    add_device_args(parser)
    return parser


def create_train_parser() -> FlagParser:
    """The command line of train.py."""
    description = 'Train an image classifier of timm or timm_depla; without a data folder, on the embedded digits.'
    parser = _create_parser('[DIR] [--recipe NAME]', description, 'resnet50_depla', LEFT_OUT)
    parser.add_argument('data', nargs='?', metavar='DIR', help='data folder')
    add_training_args(parser, ['top1', 'top5', 'loss'], 'validation')
    _add_augmentation_args(parser)
    _add_distillation_args(parser)
    return parser


def create_validate_parser() -> FlagParser:
    """The command line of validate.py."""
    description = 'Validate image classifiers: runs, checkpoints, and models with pretrained weights.'
    parser = _create_parser('RUN|CHECKPOINT|MODEL ...', description, '', LEFT_OUT_OF_VALIDATION)
    parser.set_defaults(batch_size=256)
    parser.add_argument('targets', nargs='*', metavar='RUN|CHECKPOINT|MODEL', help='what to validate, or wildcards')
    add = group(parser, 'validation')
    text = partial(add, type=str, default='')
    text('--checkpoint', metavar='FILE', help='a checkpoint, or a file of weights of --model')
    add('--pretrained', help='use the pretrained weights of --model (a model without a checkpoint always does)')
    text('--split', '--val-split', dest='val_split', default='validation', metavar='NAME', help='validation split')
    number = dict(type=schema.count, dest='val_num_samples')
    add('--num-samples', '--val-num-samples', **number, help='images of a streaming data set')
    add('--num-classes', type=schema.count, help='classes of a file of weights')
    add('--gp', type=str, metavar='POOL', help='global pooling: avg, max, avgmax or catavgmax')
    add('--use-train-size', help="the model's training size even where its cfg names a test size")
    add('--test-pool', help='pool over windows of the training size where images are larger')
    add('--reparam', help="fold what inference does not need apart, by timm's reparameterize_model")
    text('--real-labels', metavar='FILE', help="ImageNet's reassessed labels (JSON)")
    text('--valid-labels', metavar='FILE', help='class indices to choose among, one a line')
    averages = ['micro', 'macro', 'weighted']
    add('--metrics-avg', choices=averages, help='average precision, recall and F1 over the classes, by scikit-learn')
    add('--retry', help='halve the batch and try again where memory runs out')
    text('--results-file', metavar='FILE', help='write the table of results')
    add('--results-format', default='csv', choices=['csv', 'json'], help='its format')
    return parser
