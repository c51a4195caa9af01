"""Deployment on a CPU: each runtime's accuracy on the digits, and its time over the plain network.

`test_resnet_depla` with its shipped weights, and its base without DEPLA, untrained, take turns in the same runtime on
the same batches. Calibration takes training images.
"""

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from timm_depla.data import digits_folder

from .pairs import ratio_text, time_rounds
from .record import table

WEIGHTS = Path(__file__).parent.parent / 'hub' / 'weights' / 'test_resnet_depla.digits'
BASE = dict(layers=(1, 1, 4, 1), stem_width=8, channels=(16, 32, 48, 64))  # what DEPLA was added to
Call = Callable[[Tensor], Any]


def onnxruntime(model: nn.Module, batches: List[Tensor], is_int8: bool = False) -> Call:
    from onnxruntime import InferenceSession, SessionOptions
    from onnxruntime.quantization import quantize_dynamic

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/model.onnx'
        torch.onnx.export(model, (batches[0],), dynamo=True, verbose=False).save(path)
        if is_int8:
            quantize_dynamic(path, f'{folder}/int8.onnx')
            path = f'{folder}/int8.onnx'
        session = InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})[0]


def openvino(model: nn.Module, batches: List[Tensor], is_int8: bool = False) -> Call:
    from openvino import compile_model, convert_model

    converted = convert_model(model, example_input=batches[0], input=list(batches[0].shape))
    if is_int8:
        import nncf

        converted = nncf.quantize(converted, nncf.Dataset(batches))
    compiled = compile_model(converted, 'CPU', {'INFERENCE_NUM_THREADS': torch.get_num_threads()})
    return lambda images: compiled(images.numpy())[0]


def pt2e_int8(model: nn.Module, batches: List[Tensor]) -> Call:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (batches[0],)).module(), quantizer)
    for batch in batches:
        prepared(batch)
    compiled = torch.compile(move_exported_model_to_eval(convert_pt2e(prepared)))
    with inductor_config.patch(freezing=True):  # the weights, which it needs for its int8 kernels
        compiled(batches[0])
    return compiled


def torchao(model: nn.Module, batches: List[Tensor], config: str) -> Call:
    from torchao import quantization

    quantization.quantize_(model, getattr(quantization, config)())
    return model


RUNTIMES: Dict[str, Tuple[Callable[[nn.Module, List[Tensor]], Call], str]] = {  # and what a user calls
    'PyTorch': (lambda model, batches: model, ''),
    'ONNX Runtime': (onnxruntime, "`torch.onnx.export(model, (images,), dynamo=True).save('model.onnx')`"),
    'ONNX Runtime, int8': (
        partial(onnxruntime, is_int8=True),
        "`onnxruntime.quantization.quantize_dynamic('model.onnx', 'int8.onnx')`",
    ),
    'OpenVINO': (openvino, '`openvino.compile_model(openvino.convert_model(model, example_input=images))`'),
    'OpenVINO, int8': (
        partial(openvino, is_int8=True),
        '`nncf.quantize(openvino.convert_model(...), nncf.Dataset(batches))`',
    ),
    'PT2E, int8': (
        pt2e_int8,
        '`prepare_pt2e(torch.export.export(...).module(), X86InductorQuantizer())`, `convert_pt2e`, `torch.compile`',
    ),
    'torchao, int8 weights': (
        partial(torchao, config='Int8WeightOnlyConfig'),
        '`torchao.quantization.quantize_(model, Int8WeightOnlyConfig())`',
    ),
    'torchao, int8': (
        partial(torchao, config='Int8DynamicActivationInt8WeightConfig'),
        '`torchao.quantization.quantize_(model, Int8DynamicActivationInt8WeightConfig())`',
    ),
}
FLAGS = dict(runtime=dict(nargs='+', choices=RUNTIMES, default=list(RUNTIMES), metavar='NAME'), batch_size=8, pairs=60)


def read_batches(model: nn.Module, split: str, size: int) -> List[Tensor]:
    """The images of a split in batches of one size; the last is filled up with the first images."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted((digits_folder() / split).glob('*/*.png'))
    files += files[: -len(files) % size]
    images = torch.stack([transform(Image.open(file).convert('RGB')) for file in files])
    return list(images.split(size))


def accuracy(call: Call, batches: List[Tensor]) -> float:
    """Top-1 in percent on the batches of the validation split."""
    labels = [int(path.parent.name) for path in sorted((digits_folder() / 'validation').glob('*/*.png'))]
    found = np.concatenate([np.asarray(call(batch)).argmax(1) for batch in batches])
    return round(100 * float(np.mean(found[: len(labels)] == labels)), 2)


@torch.inference_mode()
def run(args: argparse.Namespace) -> Dict[str, Any]:
    model = timm.create_model(f'local-dir:{WEIGHTS}', pretrained=True).eval()
    plain = timm.create_model('test_resnet', num_classes=10, **BASE).eval()
    images = read_batches(model, 'validation', args.batch_size)
    calibration = read_batches(model, 'train', args.batch_size)[::10]
    results: Dict[str, Any] = {'batch_size': args.batch_size}
    for name in args.runtime:
        with torch.inference_mode(False), torch.no_grad():
            calls = [RUNTIMES[name][0](copy.deepcopy(network), calibration) for network in (model, plain)]
        top1 = accuracy(calls[0], images)
        pairs = time_rounds([partial(call, images[0]) for call in calls], args.pairs)
        results[name] = {'top1': top1, 'seconds': pairs}
        print(name, top1, flush=True)
    return results


def render(results: Dict[str, Any]) -> str:
    rows = []
    for name in (name for name in results if name != 'batch_size'):
        found = results[name]
        rows.append([name, RUNTIMES[name][1], f'{found["top1"]:.2f}', ratio_text(found['seconds'])])
    header = ['runtime', 'how', 'top-1', 'time over the plain network: median (95% interval)']
    return f'Batches of {results["batch_size"]} images of 128 x 128 pixels.\n\n{table(header, rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    """The most that a runtime loses."""
    found = {name: row['top1'] for name, row in results.items() if name != 'batch_size'}
    if 'PyTorch' not in found:
        return []
    loss = f'{min(found.values()) - found["PyTorch"]:+.2f}'
    return [(f'top-1 of the worst of {len(found) - 1} runtimes, difference in points', loss, 'PyTorch, the digits')]
