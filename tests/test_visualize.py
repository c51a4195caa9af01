"""Captured tensors are those of the forward pass, and capturing changes nothing."""

import copy
import re
import sys

import pytest
import timm
import torch
from helpers import ROOT, create, run
from PIL import Image

from timm_depla.capture import capture, capturing, find_blocks, measure, strength
from timm_depla.detection import create_detector
from timm_depla.errors import ConfigError
from timm_depla.layers.linear import back_fill, match_size, soft_roi_pool
from timm_depla.visualize import draw_block, load_any, main, render_summary, summarize

DIGITS = f'local-dir:{ROOT / "hub" / "weights" / "test_resnet_depla.digits"}'
ADAPTIVE = dict(depla=dict(bfn='adaptive', temperature=0.5))


def build(name):
    if '_fpn' in name:
        model = create_detector(name, num_classes=5, min_size=64, max_size=64, out_channels=16)
        return model.eval(), [torch.rand(3, 64, 80)]
    name, _, kind = name.partition(':')
    return create(name, num_classes=5, **(ADAPTIVE if kind else {})), torch.randn(2, 3, 96, 96)


@pytest.mark.parametrize(
    'name', ['test_resnet_depla', 'test_resnet_depla:adaptive', 'test_fishnet_depla',
             'maskrcnn_test_resnet_fpn_depla', 'fasterrcnn_test_resnet_depla_fpn'],
)  # fmt: skip
@torch.no_grad()
def test_captured_maps_give_the_output(name):
    """Maps and heatmaps are probabilities over the positions, and looking changes nothing."""
    model, x = build(name)
    before, state = model(x), copy.deepcopy(model.state_dict())
    with capturing(model) as found:
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)  # the plain path rounds otherwise
    torch.testing.assert_close([model(x), model.state_dict()], [before, state], rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())
    assert found.keys() == find_blocks(model).keys()
    for key, module in find_blocks(model).items():
        block = found[key]
        assert block.maps.shape[1:3] == (module.rpn.num_groups, module.rpn.maps_per_group)
        assert block.maps.shape[3:] == block.heatmaps.shape[2:] == block.output.shape[2:]
        for maps in (block.maps, block.heatmaps):
            assert (maps >= 0).all() and (maps.sum((-2, -1)) - 1).abs().max() < 1e-5
        values = match_size(module.candidate(block.candidate), block.output, module.upsample)
        pooled = soft_roi_pool(block.maps, values)
        features = module.proj(module.bfn.transform(pooled))
        assert (features - block.features).abs().max() <= 1e-5 * features.abs().max()
        identity = match_size(block.identity, block.output, module.upsample)
        again = identity + module.norm(back_fill(features, block.heatmaps, None, identity.dtype))
        assert (again - block.output).abs().max() <= 1e-5 * block.output.abs().max()


def test_mode_is_restored_and_hooks_removed_after_an_error():
    model, x = build('test_resnet_depla')
    model.train().layer1.eval()
    modes = [module.training for module in model.modules()]
    capture(model, x)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        capture(model, torch.zeros(1, 5, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_models_that_cannot_be_looked_into():
    model, x = build('test_resnet_depla')
    other, _ = build('test_resnet_depla')
    other.layer3.compile(backend='eager')
    for network, message in (
        (timm.create_model('test_resnet'), 'ResNet has no DEPLA block'),
        (torch.jit.script(model), 'a scripted model cannot be looked into'),
        (torch.compile(model, backend='eager'), 'a compiled model cannot be looked into'),
        (other, 'a compiled model cannot be looked into'),
    ):
        with pytest.raises(ValueError, match=message):
            capture(network, x)


def test_measures_tell_uniform_and_dead_groups():
    model, x = build('test_resnet_depla:adaptive')
    name, module = next(iter(find_blocks(model).items()))
    with torch.no_grad():
        module.rpn.logits.conv.weight.unflatten(0, (-1, module.rpn.num_groups))[:, 3] = 0  # channels are D times L
        module.rpn.temperature = 0.02
        block = capture(model, x)[name]
        values = measure(block)
    assert values['entropy'][:, 3] == pytest.approx(1, abs=1e-6)
    assert 0 < values['entropy'].min() < 0.999
    assert ((values['coverage'] >= 0) & (values['coverage'] < 1)).all()
    block.features[:, 5] = 0
    assert (strength(block)[:, 5] == 0).all()
    totals = {name: {key: value.mean(0) for key, value in measure(block).items()}}
    row = render_summary(totals).splitlines()[2].strip('| ').split(' | ')
    assert row[0] == f'`{name}`'
    assert row[-2].split(', ')[0] == '3' and '5' in row[-1].split(', ')


@pytest.mark.parametrize('weights', [DIGITS, DIGITS.replace('digits', 'fashion_mnist')], ids=['colour', 'grey'])
def test_summary_is_the_mean_over_the_files(digit, weights):
    model = load_any(weights)
    files = sorted(digit.parent.iterdir())[:3]
    each = [summarize(model, [file]) for file in files]
    for name, values in summarize(model, files).items():
        for key, value in values.items():
            assert torch.allclose(value, torch.stack([e[name][key] for e in each]).mean(0))


def test_maps_are_on_one_scale(digit):
    """Uniform is 1, and in words; ticks differ, whatever the span."""
    block = capture(create('test_resnet_depla'), torch.rand(1, 3, 96, 96))['layer3.3.depla']
    count = block.maps[0, 0, 0].numel()
    block.maps.fill_(1 / count)
    for peak, ticks in ((1.04, ['1/2', '1', '2']), (30.0, ['1/16', '1/8', '1/4', '1/2', '1', '2', '4', '8', '16'])):
        block.heatmaps.fill_(1 / count)
        block.heatmaps[..., 0, 0] = peak / count
        figure = draw_block(torch.rand(3, 96, 96), block)
        figure.draw_without_rendering()
        places = [place for place in figure.axes if ' here' in place.get_title()]
        uniform = ['nearly uniform' in place.get_title() for place in places]
        assert uniform == [True] * 5 + [peak < 1.1] * 5
        assert len({place.images[1].norm.vmax for place in places}) == 1
        assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == ticks


def test_command(digit, tmp_path, monkeypatch, capsys):
    file = tmp_path / 'figure.png'
    file.symlink_to('elsewhere')  # which stays as it is
    run('-m', 'timm_depla.visualize', digit, '--model', DIGITS, '--out', file)
    image = Image.open(file)
    assert image.width >= 1000 and not (tmp_path / 'elsewhere').exists()
    assert len(image.convert('RGB').getcolors(1 << 24)) > 500
    monkeypatch.setattr(sys, 'argv', ['visualize', str(digit.parent), '--model', DIGITS, '--summary'])
    main()
    printed = capsys.readouterr().out
    assert re.search(r'^\| `layer3\.\d\.depla` \| 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\) \|', printed, re.MULTILINE)


def test_bad_input(digit, tmp_path, monkeypatch):
    (tmp_path / 'text.png').write_text('no image')
    Image.new('RGB', (30, 5)).save(tmp_path / 'small.png')
    plain = timm.create_model('test_resnet', num_classes=2)
    timm.models.save_for_hf(plain, tmp_path / 'plain', safe_serialization=True)
    for argv, message in [
        ((tmp_path / 'text.png', '--model', DIGITS), r"cannot read '.*text.png' as an image"),
        ((tmp_path / 'small.png', '--model', DIGITS), r"small.png' is 30 x 5 pixels: too small, give one of 8 a side"),
        ((digit, '--model', DIGITS, '--block', 'layer9'), r"no block 'layer9'; there are layer3\.\d\.depla"),
        ((digit, '--model', f'local-dir:{tmp_path / "plain"}'), r"plain': ResNet has no DEPLA block to look into"),
        ((digit, '--model', 'test_resnet_depla_'), r"is no run folder, checkpoint or model; did you mean 'test_resnet"),
        ((tmp_path / 'plain', '--model', DIGITS, '--summary'), r"no images in '.*plain'"),
        ((digit, '--model', DIGITS, '--out', 'x.xyz'), r"cannot write --out 'x.xyz'.*Format 'xyz' is not supported"),
        ((digit, '--model', DIGITS, '--out', '/proc/x.png'), r"cannot write --out '/proc/x.png'"),
    ]:
        monkeypatch.setattr(sys, 'argv', ['visualize', *map(str, argv)])
        with pytest.raises(ConfigError, match=message):
            main()
