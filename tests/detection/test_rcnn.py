"""FPN-DEPLA against a literal transcription, and the detectors against torchvision's."""

import copy
import json
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from transcription import literal, randomized

from timm_depla.detection import BackboneWithFPN, FeaturePyramidNetworkDepla, create_detector, list_detectors
from timm_depla.detection.pretrained import detector_config, from_pretrained
from timm_depla.layers import set_fused_depla

ARGS = dict(num_groups=3, pooled_chs=4, maps_per_group=2)


def create_maps(*sizes, dtype=torch.float32):
    """Feature maps of a backbone, finest first, with 5, 7 and 9 channels."""
    torch.manual_seed(0)
    shapes = zip((5, 7, 9), sizes, strict=False)
    return OrderedDict((f'level{i}', torch.randn(2, c, *size, dtype=dtype)) for i, (c, size) in enumerate(shapes))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('depla', [dict(temperature=0.2), dict(), dict(temperature=1.0), dict(bfn='plain')])
def test_matches_literal_transcription(depla, memory_format):
    maps = create_maps((8, 6), (4, 3), (2, 2), dtype=torch.float64)
    fpn = FeaturePyramidNetworkDepla([5, 7, 9], 6, depla={**ARGS, **depla}).double().eval()
    for block in fpn.top_down_blocks:
        randomized(block)
    kwargs = dict(ARGS, keep_candidate=False, **{'temperature': 0.5, 'bfn': 'adaptive', **depla})
    merged, expected = None, []
    for i, x in reversed(list(enumerate(maps.values()))):
        inner, layer = fpn.inner_blocks[i][0], fpn.layer_blocks[i][0]
        lateral = F.conv2d(x, inner.weight, inner.bias)
        if merged is not None:
            block = fpn.top_down_blocks[len(expected) - 1]
            lateral = literal(block, lateral.tolist(), merged.tolist(), **kwargs)
        merged = lateral
        expected.insert(0, F.conv2d(merged, layer.weight, layer.bias, padding=1))
    with torch.no_grad():
        results = fpn(OrderedDict((k, v.contiguous(memory_format=memory_format)) for k, v in maps.items()))
    assert list(results) == ['level0', 'level1', 'level2']
    for actual, wanted in zip(results.values(), expected, strict=True):
        assert (actual - wanted).abs().max() < 1e-10 * wanted.abs().max()


@pytest.mark.parametrize('norm_layer', [None, torch.nn.BatchNorm2d])
@pytest.mark.parametrize('bfn', ['adaptive', 'plain'])
def test_training_in_the_fused_form_is_the_same(bfn, norm_layer):
    """The same outputs, gradients and statistics with less memory."""
    fused = FeaturePyramidNetworkDepla([5, 7, 9], 6, None, norm_layer, depla={**ARGS, 'bfn': bfn}).double()
    plain = copy.deepcopy(fused)
    results, saved = [], []
    for fpn, is_fused in ((fused, True), (plain, False)):
        maps = create_maps((8, 6), (4, 3), (2, 2), dtype=torch.float64)
        inputs = [level.requires_grad_() for level in maps.values()]
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t)
        with hooks, set_fused_depla(is_fused, always=True):
            outputs = list(fpn(maps).values())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        saved.append(sum(storages.values()))
        sum((out.sin() * torch.arange(out.shape[1]).view(-1, 1, 1)).sum() for out in outputs).backward()
        gradients = [tensor.grad for tensor in (*inputs, *fpn.parameters())]
        results.append([*outputs, *gradients, *fpn.buffers()])
    torch.testing.assert_close(*results)
    assert saved[0] < saved[1]


@pytest.mark.parametrize('extra', [LastLevelMaxPool(), LastLevelP6P7(9, 6), None])
@pytest.mark.parametrize('norm_layer', [None, torch.nn.BatchNorm2d])
def test_is_a_drop_in_for_torchvisions(extra, norm_layer):
    plain = FeaturePyramidNetwork([5, 7, 9], 6, extra, norm_layer).eval()
    fpn = FeaturePyramidNetworkDepla([5, 7, 9], 6, extra, norm_layer).eval()
    ours = [name for name in fpn.state_dict() if not name.startswith('top_down_blocks.')]
    assert ours == list(plain.state_dict())
    maps = create_maps((16, 12), (8, 6), (4, 3))
    with torch.no_grad():
        results, expected = fpn(maps), plain(maps)
        assert {k: v.shape for k, v in results.items()} == {k: v.shape for k, v in expected.items()}
        scripted = torch.jit.script(fpn)(maps)
    for name, result in results.items():
        assert (scripted[name] - result).abs().max() < 1e-5 * result.abs().max()


def test_weights_of_torchvision_give_the_outputs_of_torchvision():
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, box_score_thresh=0)
    ours = create_detector('maskrcnn_resnet50_fpn', box_score_thresh=0)
    ours.load_state_dict(theirs.state_dict())
    images = [torch.rand(3, 200, 300), torch.rand(3, 240, 160)]
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size = (256,), 400
    with torch.no_grad():
        for actual, expected in zip(ours.eval()(images), theirs.eval()(images), strict=True):
            assert len(expected['boxes']) == 100
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with_depla = create_detector('maskrcnn_resnet50_fpn_depla')
    missing, unexpected = with_depla.load_state_dict(theirs.state_dict(), strict=False)
    assert all(name.startswith('backbone.fpn.top_down_blocks.') for name in missing) and unexpected == []


def test_names():
    assert len(list_detectors()) == 12
    assert list_detectors('fasterrcnn*depla*') == ['fasterrcnn_fishnet150_depla_fpn', 'fasterrcnn_resnet50_fpn_depla']


@pytest.mark.parametrize('name', ['maskrcnn_test_resnet_fpn_depla', 'fasterrcnn_test_fishnet_depla_fpn'])
def test_trains_and_detects(name):
    model = create_detector(name, num_classes=4, out_channels=32, min_size=128, max_size=160, box_score_thresh=0.0)
    image = torch.rand(3, 120, 150)
    masks = torch.zeros(1, 120, 150, dtype=torch.uint8)
    masks[:, 20:80, 30:90] = 1
    target = dict(boxes=torch.tensor([[30.0, 20.0, 90.0, 80.0]]), labels=torch.tensor([2]), masks=masks)
    losses = model.train()([image, image], [target, target])
    sum(losses.values()).backward()
    assert {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'} <= set(losses)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        detections = model.eval()([image])[0]
    assert len(detections['boxes']) == len(detections['labels']) > 0 and detections['boxes'].shape[1] == 4
    assert ('masks' in detections) == ('mask' in name)


def test_out_channels_scale_the_heads_of_torchvision():
    small = create_detector('maskrcnn_resnet50_fpn', num_classes=5, out_channels=64).state_dict()
    assert small['roi_heads.box_head.fc7.weight'].shape == (256, 256)
    assert small['roi_heads.mask_head.0.0.weight'].shape == (64, 64, 3, 3)
    assert small['roi_heads.mask_predictor.conv5_mask.weight'].shape == (64, 64, 2, 2)


@pytest.mark.parametrize(
    'name,num_layers,frozen',
    [
        ('resnet50', 5, ('conv1.', 'bn1.', 'layer1.')),
        ('fishnet150_depla', 11, ('model.stem.', 'model.tail.0.')),
        ('convnext_atto', 5, ('stem_', 'stages_0.')),
    ],
)
def test_layers_to_train(name, num_layers, frozen):
    backbone = BackboneWithFPN(name, trainable_layers=num_layers - 2)
    for parameter_name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad != parameter_name.startswith(frozen)
    assert all(p.requires_grad for p in BackboneWithFPN(name).parameters())
    assert not any(p.requires_grad for p in BackboneWithFPN(name, trainable_layers=0).body.parameters())


@pytest.mark.parametrize('norm', ['frozen', 'batch', 'sync'])
def test_norms_of_the_backbone(norm):
    kinds = dict(frozen=FrozenBatchNorm2d, batch=torch.nn.BatchNorm2d, sync=torch.nn.SyncBatchNorm)
    body = BackboneWithFPN('test_resnet_depla', norm=norm).body
    norms = [m for m in body.modules() if isinstance(m, tuple(kinds.values()))]
    assert len(norms) > 20 and all(type(m) is kinds[norm] for m in norms)
    if norm != 'sync':  # which works on GPUs only
        assert len(body.train()(torch.randn(2, 3, 64, 64))) == 4


def test_backbone_and_neck_have_their_own_depla():
    kwargs = dict(depla=dict(temperature=0.2), backbone_kwargs=dict(depla=dict(temperature=7.0)))
    backbone = create_detector('fasterrcnn_test_resnet_depla_fpn_depla', **kwargs).backbone
    for part, temperature in ((backbone.body, 7.0), (backbone.fpn, 0.2)):
        assert {module.temperature for module in part.modules() if hasattr(module, 'temperature')} == {temperature}


@pytest.mark.parametrize('neck', ['fpn', 'fpn_depla'])
def test_norms_of_the_neck(neck):
    """With norms, the pyramid does not depend on the scale of the features."""
    for neck_norm in (None, 'batchnorm2d'):
        backbone = BackboneWithFPN('test_resnet', neck, neck_norm=neck_norm, out_channels=32)
        channels, fpn = backbone.body.feature_info.channels(), backbone.fpn.train()
        features = {str(i): torch.randn(2, number, 16 >> i, 16 >> i) for i, number in enumerate(channels)}
        assert sum(isinstance(layer[-1], torch.nn.BatchNorm2d) for layer in fpn.layer_blocks) == 4 * bool(neck_norm)
        small, large = (fpn({name: scale * x for name, x in features.items()}) for scale in (1, 10))
        assert torch.allclose(small['0'], large['0'], atol=1e-2) == bool(neck_norm)


@pytest.mark.parametrize(
    'name,kwargs,error,message',
    [
        ('resnet50', {}, ValueError, "no detector 'fasterrcnn_resnet50': give fasterrcnn or maskrcnn"),
        ('resnet5000_fpn', {}, ValueError, "no detector 'fasterrcnn_resnet5000_fpn'"),
        ('vit_tiny_patch16_224_fpn', {}, ValueError, r'features at 1/\[16, .* needs 1/\(4, 8, 16, 32\)'),
        ('swin_tiny_patch4_window7_224_fpn', {}, ValueError, 'layout NHWC, a pyramid takes NCHW'),
        ('resnet18_fpn', dict(backbone_kwargs=dict(output_stride=16)), ValueError, r'at 1/\[2, 4, 8, 16, 16\], .*'),
        ('resnet18_fpn', dict(backbone_kwargs=dict(device='cpu')), TypeError, r"leave out \['device'\]; .*\.to\(\)"),
        ('resnet18_fpn', dict(trainable_backbone_layers=6), ValueError, "0 to 5 for 'resnet18', got 6"),
        ('resnet18_fpn', dict(backbone_norm='froze'), ValueError, "backbone_norm must be one of .*'froze'"),
        ('resnet18_fpn', dict(neck_norm='bn'), ValueError, "no norm 'bn'; take 'batchnorm2d' or"),
        ('resnet18_fpn', dict(depla=dict(temperature=0.2)), ValueError, "take neck 'fpn_depla'"),
        ('resnet18_fpn_depla', dict(depla=dict(temprature=1)), TypeError, r"unknown depla argument \['temprature'\]"),
        ('resnet18_fpn', dict(min_sise=320), TypeError, r"unknown argument \['min_sise'\]; .*'min_size'"),
    ],
)
def test_bad_argument(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        create_detector(f'fasterrcnn_{name}', **kwargs)


def write_published(folder, config):
    (folder / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    save_file({'x': torch.zeros(1)}, folder / 'model.safetensors')
    return folder


CONFIG = json.loads(detector_config('fasterrcnn_test_resnet_fpn', ['a'], [1]))


@pytest.mark.parametrize(
    'model_args,message',
    [
        (dict(pretrained_backbone=True), 'would load weights from elsewhere: remove it'),
        (dict(backbone_kwargs=dict(pretrained_cfg_overlay=dict(url='http://localhost/x.pth'))), 'would load weights'),
        (dict(backbone_kwargs=dict(checkpoint_path='/x.pth')), 'would load weights from elsewhere: remove it'),
        ([1], "'model_args' must be a map of names to values"),
    ],
)
def test_published_detector_fetches_nothing(model_args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_pretrained(write_published(tmp_path, {**CONFIG, 'model_args': model_args}))


@pytest.mark.parametrize(
    'config,message',
    [
        *((text, 'cannot be read') for text in ('[]', '{', '[' * 10_000, '\x00', '"a"')),
        (dict(library_name='timm', architecture='resnet18'), "holds no detector but 'resnet18'"),
        (dict(library_name='timm_depla'), "'architecture' must be a text, not None"),
        ({**CONFIG, 'architecture': 3}, "'architecture' must be a text, not 3"),
        ({**CONFIG, 'num_classes': 'x'}, "'num_classes' must be"),
        ({**CONFIG, 'num_classes': 3}, 'class_names has 1 entries for 3 classes with background'),
        (CONFIG, r"are of another detector than its config.json with \['num_classes'\]"),
    ],
)
def test_config_of_something_else_is_one_error(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_pretrained(write_published(tmp_path, config), num_classes=5)
