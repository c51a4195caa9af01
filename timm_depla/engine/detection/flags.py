"""The flags of train_detection.py and validate_detection.py: those of train.py and validate.py where both have them."""

from functools import partial

from timm_depla import schema
from timm_depla.detection.coco import METRICS

from ..config import RECIPES, FlagParser, KeyValues
from ..flags import add_device_args, add_loading_args, add_training_args, group

_CLASSIFIER = 'it is for classifiers'
_GROUPS = 'detectors have no layer groups in timm'
_HEADS = 'use --model-kwargs with the names of torchvision, such as min_size=600 or box_detections_per_img=50'
_STREAM = 'the annotations give the number of images'
LEFT_OUT_OF_DETECTION = {
    **dict.fromkeys(('--backbone-lr-scale', '--drop', '--gp', '--head-init-bias', '--head-init-scale'), _CLASSIFIER),
    '--drop-block': 'an argument of the backbone: use --model-kwargs backbone_kwargs="{\'drop_block_rate\': 0.1}"',
    '--drop-path': 'an argument of the backbone: use --model-kwargs backbone_kwargs="{\'drop_path_rate\': 0.1}"',
    **dict.fromkeys(('--epoch-repeats', '--train-num-samples', '--val-num-samples'), _STREAM),
    **dict.fromkeys(('--img-size', '--input-size', '--mean', '--std'), _HEADS),
    **dict.fromkeys(('--layer-decay', '--layer-decay-min-scale', '--layer-decay-no-opt-scale'), _GROUPS),
    '--num-classes': 'it follows from the categories of the data set',
    '--pretrained': 'use --pretrained-backbone, or --initial-checkpoint for a whole detector',
    '--torchcompile': 'image sizes change from batch to batch: use --torchcompile-blocks',
    '--validation-batch-size': 'images are validated one by one, so that none is padded',
}
"""Flags of train.py that train_detection.py lacks, each with the reason."""


def _create_parser(arguments: str, description: str) -> FlagParser:
    """The part that both command lines share."""
    parser = FlagParser(arguments, description, LEFT_OUT_OF_DETECTION, RECIPES / 'detection')
    add = group(parser, 'data')
    add_loading_args(add, 'data folder: DIR/SPLIT, DIR/annotations/instances_SPLIT.json')
    evaluators = ['pycocotools', 'faster-coco-eval']
    add('--evaluator', default=evaluators[0], choices=evaluators, help='what measures average precision')
    add_device_args(parser)
    return parser


def create_detection_parser() -> FlagParser:
    """The command line of train_detection.py."""
    description = 'Train a detector on COCO-format data; without a data folder, on digits in scenes.'
    parser = _create_parser('[DIR] [--recipe NAME]', description)
    parser.add_argument('data', nargs='?', metavar='DIR', help='data folder')
    add = group(parser, 'detector')
    name = dict(type=str, default='maskrcnn_resnet50_fpn_depla', metavar='NAME')
    add('-m', '--model', **name, help='HEAD_BACKBONE_NECK: see the docs')
    kwargs = dict(nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE')
    add('--model-kwargs', **kwargs, help="arguments of create_detector: ours and torchvision's")
    add('-b', '--batch-size', type=schema.count, default=2, help='images a step in each process')
    add('--pretrained-backbone', help="start from the backbone's published weights")
    add('--trainable-backbone-layers', type=schema.whole, help='layers to train, from the end (default: see docs)')
    norms = ['batch', 'frozen']
    add('--backbone-norm', choices=norms, help="what becomes of BatchNorm (default: 'frozen' with trained weights)")
    add('--hflip', type=schema.share, default=0.5, help='probability of a horizontal flip')
    metrics = [f'{prefix}{name}' for prefix in ('', 'mask_') for name in METRICS[:6]]
    add_training_args(parser, metrics, 'val')
    return parser


def create_detection_validate_parser() -> FlagParser:
    """The command line of validate_detection.py."""
    description = 'Average precision of a detector: of a run, a checkpoint, or a file of weights of --model.'
    parser = _create_parser('RUN|CHECKPOINT|FILE', description)
    parser.add_argument('target', metavar='RUN|CHECKPOINT|FILE', help='what to validate')
    add = group(parser, 'validation')
    text = partial(add, type=str, default='')
    text('--split', '--val-split', dest='val_split', metavar='NAME', help="split (default: the run's, or val)")
    text('-m', '--model', metavar='NAME', help='the detector that a file of weights belongs to')
    add('--classes', type=schema.count, help='its classes, background included, if labels are category ids')
    text('--results-file', metavar='FILE', help="write the detections in COCO's format for submissions")
    return parser
