"""Time and memory of models against a base, measured alternately in one process so that machine drift cancels.

A training step is forward and backward, without the optimizer. Memory is the weights and buffers plus the peak that
PyTorch allocates during a step. On a CPU, the C library keeps freed memory, as in train.py. After a colon stands one of
timm's attention layers, which the residual blocks then use. After a plus stands a form: `plain` is with
`set_fused_depla(False)`, `uncomposed` has a hook on every DEPLA, so that its candidate is computed, and `fused` is the
result of timm's `reparameterize_model`, for inference. Other paths, at commits that have them, leave one path out.
"""

import argparse
import statistics
from functools import partial
from typing import Any, Callable, Dict

import timm
import torch
from timm.utils import reparameterize_model

from timm_depla.engine.distributed import keep_memory
from timm_depla.layers import Depla, set_fused_depla

from .pairs import median_interval, peak_memory, ratio_text, seconds_text, time_rounds
from .record import table

IMAGENET = 1_281_167  # training images
EPOCHS = 400  # of the recipe `better`
KINDS = ('inference', 'training step')


def add_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--model', nargs='+', default=['resnet50_depla'], metavar='MODEL[:ATTENTION][+PATH]', help='models to time'
    )
    parser.add_argument('--base', default='resnet50', help='model to compare them with')
    parser.add_argument('--batch-size', type=int, default=8, help='images')
    parser.add_argument('--img-size', type=int, default=224, help='pixels')
    parser.add_argument('--pairs', type=int, default=80, help='timings of each model, of inference and of a step')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--amp', action='store_true', help='under autocast to bfloat16')
    parser.add_argument('--torchcompile', action='store_true', help='compile every model')


def create_model(spec: str, img_size: int) -> torch.nn.Module:
    """Create a timm model in channels-last format from MODEL[:ATTENTION][+PATH].

    Models of a fixed input size get `img_size`.
    """
    spec, _, path = spec.partition('+')
    name, _, attention = spec.partition(':')
    kwargs: Dict[str, Any] = dict(block_args=dict(attn_layer=attention)) if attention else {}
    if timm.models.get_pretrained_cfg_value(name, 'fixed_input_size'):
        kwargs['img_size'] = img_size
    model = timm.create_model(name, **kwargs)
    if path == 'fused':
        model = reparameterize_model(model.eval())
    elif path == 'uncomposed':
        for module in model.modules():
            if isinstance(module, Depla):
                module.register_forward_hook(lambda *_: None)
    for parameter in model.parameters():
        if parameter.ndim == 4:  # lambda networks also have 3D convolutions
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def along(spec: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call of a model in the form that its name asks for."""

    def run() -> Any:
        with set_fused_depla(not spec.endswith('+plain')):
            return call()

    return run


def infer(model: Callable, x: torch.Tensor, amp: bool = False) -> None:
    with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        model(x)


def train_step(model: torch.nn.Module, x: torch.Tensor, amp: bool = False) -> None:
    model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        loss = model(x).logsumexp(1).mean()
    loss.backward()


def run(args: argparse.Namespace) -> Dict[str, Any]:
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('no CUDA GPU here: run this command on a machine with one, or leave out --device cuda')
    torch.manual_seed(0)
    keep_memory()
    names = [*args.model, args.base]
    models = [create_model(name, args.img_size).to(args.device) for name in names]
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    x = x.to(memory_format=torch.channels_last)
    results: Dict[str, Any] = {name: [] for name in KINDS}
    keys = ('batch_size', 'img_size', 'device', 'amp', 'torchcompile')
    results.update(names=names, **{key: getattr(args, key) for key in keys})
    if args.device == 'cuda':
        results['gpu'] = torch.cuda.get_device_name()
    called = [torch.compile(model) if args.torchcompile else model for model in models]
    for kind, function in zip(KINDS, (infer, train_step), strict=True):
        for model in models:
            model.train(kind == 'training step')
        calls = [along(name, partial(function, model, x, args.amp)) for name, model in zip(names, called, strict=True)]
        results[kind] = time_rounds(calls, args.pairs, args.device)
    results['peak memory'] = []
    for model, call in zip(models, calls, strict=True):
        model.zero_grad()
        state = sum(tensor.nbytes for tensor in model.state_dict().values())
        results['peak memory'].append(peak_memory(call, args.device) + state)
        model.zero_grad()
    return results


def render(results: Dict[str, Any]) -> str:
    *names, base = results['names']
    rows = []
    for i, name in enumerate([*names, base]):
        row = [f'`{name}`']
        for kind in KINDS:
            row.append(seconds_text(statistics.median(sample[i] for sample in results[kind])))
            row.append(ratio_text([sample[i] / sample[-1] for sample in results[kind]]) if name != base else '1')
        memory = results['peak memory']
        row += [f'{memory[i] / 2**20:.0f} MiB', f'{memory[i] / memory[-1]:.3f}']
        if results['device'] == 'cuda':
            step = statistics.median(sample[i] for sample in results['training step'])
            row.append(f'{EPOCHS * IMAGENET / results["batch_size"] * step / 3600:.0f}')
        rows.append(row)
    header = ['', 'inference', 'ratio', 'training step', 'ratio', 'peak memory of a step', 'ratio']
    header += [f'GPU-hours of {EPOCHS} epochs of ImageNet'] if results['device'] == 'cuda' else []
    how = [results.get('gpu', 'CPU'), 'compiled' if results['torchcompile'] else 'eager']
    how += ['autocast to bfloat16'] if results['amp'] else []
    counts = ' and '.join(f'{len(results[kind])} of {kind}' for kind in KINDS)
    return (
        f'Batch {results["batch_size"]} at {results["img_size"]} pixels, channels last, {", ".join(how)}: {counts}, in '
        f'turn. Medians; ratios to `{base}` by pair: median (95% interval).\n\n' + table(header, rows)
    )


def plot(results: Dict[str, Any]) -> Any:
    """Ratios to the base, with their intervals."""
    from matplotlib.figure import Figure

    *names, base = results['names']
    axes = (figure := Figure(figsize=(6, 1.2 + 0.4 * len(names)), layout='constrained')).subplots()
    for kind, marker, shift in zip(KINDS, 'os', (-0.1, 0.1), strict=True):
        for i in range(len(names)):
            middle, low, high = median_interval([sample[i] / sample[-1] for sample in results[kind]])
            style = dict(fmt=marker, color=f'C{KINDS.index(kind)}', capsize=2, label=None if i else kind)
            axes.errorbar([middle], [i + shift], xerr=[[middle - low], [high - middle]], **style)
    axes.axvline(1, color='0.7', linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if axes.get_xlim()[1] > 2:
        axes.set_xscale('log')
        axes.set_xticks(ticks := (1, 1.2, 1.5, 2, 3, 5), ticks)
        axes.minorticks_off()
    axes.set_xlabel(f'time over that of {base}: median and 95% interval')
    figure.legend(loc='outside upper center', ncols=len(KINDS))
    return figure
