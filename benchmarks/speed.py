"""Time and memory of models over a base.

A training step is forward and backward, without the optimizer. Memory is that of the weights and buffers and the most
that PyTorch allocates in a step. `MODEL:NAME` has timm's attention layer NAME in its residual blocks. `MODEL+plain`
runs under `set_fused_depla(False)`. `MODEL+fused` is by timm's `reparameterize_model`, for inference alone.
"""

import argparse
import statistics
from functools import partial
from typing import Any, Callable, Dict, List, Sequence, Tuple

import timm
import torch
from timm.utils import reparameterize_model

from timm_depla.layers import set_fused_depla

from .pairs import median_text, peak_memory, ratio_text, time_rounds
from .record import table

IMAGENET = 1_281_167  # training images
EPOCHS = 400  # of the recipe `better`
KINDS = ('inference', 'training step')
FLAGS = dict(
    model=['resnet50_depla'], base='resnet50', batch_size=8, img_size=224, pairs=80,
    device=dict(choices=('cpu', 'cuda'), default='cpu'),
    amp=dict(action='store_true', default=False, help='under autocast to bfloat16'),
    torchcompile=dict(action='store_true', default=False, help='compile every model'),
)  # fmt: skip


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
    for parameter in model.parameters():
        if parameter.ndim == 4:  # lambda networks also have 3D convolutions
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def random_images(batch_size: int, size: int, device: str = 'cpu') -> torch.Tensor:
    """(B, 3, S, S), channels last."""
    return torch.randn(batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)


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


def trained(specs: Sequence[str]) -> List[str]:
    """Those that a training step is measured of."""
    return [spec for spec in specs if not spec.endswith('+fused')]


def measure(
    specs: Sequence[str], x: torch.Tensor, time: Callable[..., List], amp: bool = False, compiler: Any = None
) -> Tuple[Dict[str, List[List[float]]], List[int]]:
    """Seconds by kind of call, a column a model, and the bytes of a step of each model that trains."""
    models = {spec: create_model(spec, x.shape[-1]).to(x.device) for spec in specs}
    called = {spec: compiler(model) if compiler else model for spec, model in models.items()}
    samples, calls = {}, {}
    for kind, function, names in zip(KINDS, (infer, train_step), (specs, trained(specs)), strict=True):
        for name in names:
            models[name].train(kind == 'training step')
        calls = {name: along(name, partial(function, called[name], x, amp)) for name in names}
        samples[kind] = time(list(calls.values()))
    memory = []
    for name in calls:
        for model in models.values():
            model.zero_grad()
        state = sum(tensor.nbytes for tensor in models[name].state_dict().values())
        memory.append(peak_memory(calls[name], x.device.type) + state)
    return samples, memory


def run(args: argparse.Namespace) -> Dict[str, Any]:
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('no CUDA GPU here: run this command on a machine with one, or leave out --device cuda')
    torch.manual_seed(0)
    specs = [*args.model, args.base]
    x = random_images(args.batch_size, args.img_size, args.device)
    time = partial(time_rounds, rounds=args.pairs, device=args.device)
    compiler = torch.compile if args.torchcompile else None
    samples, memory = measure(specs, x, time, args.amp, compiler)
    results = {**samples, 'names': specs, 'peak memory': memory}
    results.update({key: getattr(args, key) for key in ('batch_size', 'img_size', 'device', 'amp', 'torchcompile')})
    if args.device == 'cuda':
        results['gpu'] = torch.cuda.get_device_name()
    return results


def _on(results: Dict[str, Any]) -> str:
    how = [results.get('gpu', 'CPU'), *(['compiled'] if results['torchcompile'] else [])]
    how += ['bfloat16'] if results['amp'] else []
    return f'batch {results["batch_size"]} at {results["img_size"]} pixels, {", ".join(how)}'


def render(results: Dict[str, Any]) -> str:
    names, rows, on_gpu = results['names'], [], results['device'] == 'cuda'
    steps = trained(names)
    for name in names:
        row = [f'`{name}`']
        for kind, specs in ((KINDS[0], names), (KINDS[1], steps), ('peak memory', steps)):
            if name in specs:
                samples, column = results[kind], specs.index(name)
                is_unit = name == names[-1] and kind in KINDS
                row += [median_text(samples, column), '1' if is_unit else ratio_text(samples, column)]
            else:
                row += ['', '']
        if on_gpu and name in steps:
            step = statistics.median(sample[steps.index(name)] for sample in results['training step'])
            row.append(f'{EPOCHS * IMAGENET / results["batch_size"] * step / 3600:.0f}')
        rows.append(row)
    header = ['', 'inference', 'ratio', 'training step', 'ratio', 'memory of a step', 'ratio']
    header += [f'GPU-hours of {EPOCHS} epochs of ImageNet'] if on_gpu else []
    return f'B{_on(results)[1:]}; {len(results["inference"])} turns.\n\n{table(header, rows)}'


def summary(results: Dict[str, Any]) -> List[Tuple[str, str, str]]:
    """A step of DEPLA on a GPU, or of other modules on a CPU."""
    names = results['names']
    wanted = ['resnet50_depla'] if results['device'] == 'cuda' else ['seresnet50', 'resnet50:nl']
    return [
        (f'training step of `{name}`', ratio_text(results['training step'], column), f'`{names[-1]}`, {_on(results)}')
        for column, name in enumerate(trained(names)[:-1])
        if name in wanted
    ]
