"""Other libraries take the models as they are: docs/clients.md names the test of each."""

import pytest
import timm
import torch
import torchvision.models.detection as tv
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import deploy
from timm_depla.detection import create_detector

SIZE = 32
IMAGES, LABELS = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2


def network():
    return timm.create_model('test_resnet_depla', num_classes=2)


def batches():
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)


@pytest.fixture(scope='module')
def digits():
    return timm.create_model(f'local-dir:{deploy.WEIGHTS}', pretrained=True).eval()


@pytest.fixture(scope='module')
def validation(digits):
    return deploy.read_batches(digits, 'validation', 8)


SLOW = {'PT2E, int8': pytest.mark.slow}  # it compiles


@pytest.mark.parametrize('name', [pytest.param(name, marks=SLOW.get(name, ())) for name in deploy.RUNTIMES])
def test_runtimes(name, digits, validation):
    """A runtime gives the network's numbers, or those of int8 weights: a few percent off."""
    fresh = timm.create_model(f'local-dir:{deploy.WEIGHTS}', pretrained=True).eval()
    with torch.no_grad():
        expected = digits(validation[0])
        try:
            found = torch.as_tensor(deploy.RUNTIMES[name][0](fresh, validation[::8])(validation[0]))
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
    error = float((found - expected).abs().max() / expected.abs().max())
    assert (1e-4 < error < 0.1) if 'int8' in name else error < 0.01


def test_transformers(digits, tmp_path):
    """A published folder by AutoModel and the pipeline, a backbone and the Trainer."""
    transformers = pytest.importorskip('transformers')
    folder = str(deploy.WEIGHTS)
    pipe = transformers.pipeline('image-classification', model=folder, device='cpu')
    digit = sorted((deploy.digits_folder() / 'validation' / '7').iterdir())[0]
    assert pipe(str(digit))[0]['label'] == '7'
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(model(IMAGES).logits, digits(IMAGES), rtol=1e-5, atol=1e-5)
    options = dict(use_pretrained_backbone=False, out_indices=[1, 3])
    config = transformers.TimmBackboneConfig(backbone='test_resnet_depla', **options)
    assert [m.shape[-1] for m in transformers.TimmBackbone(config)(IMAGES).feature_maps] == [8, 2]
    config = transformers.TimmWrapperConfig.from_pretrained(folder)
    model = transformers.TimmWrapperForImageClassification(config)
    pytest.importorskip('accelerate')  # which the Trainer needs
    options = transformers.TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy='no')
    data = [dict(pixel_values=image, labels=label) for image, label in zip(IMAGES, LABELS, strict=True)]
    assert transformers.Trainer(model, options, train_dataset=data).train().training_loss > 0


@pytest.mark.parametrize('detector', [tv.RetinaNet, tv.FCOS])
def test_torchvision_detectors(detector):
    backbone = create_detector('fasterrcnn_test_resnet_depla_fpn_depla', num_classes=2).backbone
    sizes = tuple((16 * 2**i,) for i in range(len(backbone(IMAGES))))
    anchors = tv.anchor_utils.AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    model = detector(backbone, num_classes=2, min_size=64, max_size=64, anchor_generator=anchors)
    target = dict(boxes=torch.tensor([[4.0, 4.0, 20.0, 24.0]]), labels=torch.tensor([1]))
    sum(model([IMAGES[0]], [target]).values()).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_segmentation_models_pytorch():
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.Unet('tu-test_resnet_depla', encoder_weights=None, classes=3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_lightning(tmp_path):
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    before = module.network.fc.weight.detach().clone()
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    lightning.Trainer(max_steps=1, accelerator='cpu', default_root_dir=tmp_path, **options).fit(module, batches())
    assert not torch.equal(before, module.network.fc.weight)


def test_fastai():
    fastai = pytest.importorskip('fastai.vision.all')
    loaders = fastai.DataLoaders(batches(), batches())
    learner = fastai.Learner(loaders, network(), loss_func=nn.CrossEntropyLoss(), metrics=fastai.accuracy, cbs=[])
    before = learner.model.fc.weight.detach().clone()
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, 0.01)
    assert not torch.equal(before, learner.model.fc.weight) and 0 <= learner.validate()[1] <= 1


def test_accelerate():
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), batches())
    images, labels = next(iter(loader))
    before = model.fc.weight.detach().clone()
    accelerator.backward(nn.functional.cross_entropy(model(images), labels))
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert not torch.equal(before, model.fc.weight)


def test_grad_cam():
    cam = pytest.importorskip('pytorch_grad_cam')
    model = network().eval()
    for layer in (model.layer3[-1], model.layer3[-1].depla):
        with cam.GradCAM(model=model, target_layers=[layer]) as draw:
            assert draw(input_tensor=IMAGES[:2], targets=None).shape == (2, SIZE, SIZE)


def test_captum():
    captum = pytest.importorskip('captum.attr')
    model = network().eval()
    integrated = captum.IntegratedGradients(model)
    attributions, delta = integrated.attribute(IMAGES[:1], target=1, n_steps=64, return_convergence_delta=True)
    difference = (model(IMAGES[:1]) - model(torch.zeros_like(IMAGES[:1])))[0, 1]
    assert attributions.shape == IMAGES[:1].shape and abs(delta) < 0.05 * max(abs(difference), 1)
