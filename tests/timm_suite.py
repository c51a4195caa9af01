"""Run timm's own tests/test_models.py, unchanged, on our models: `python tests/timm_suite.py 1.0.31`.

pip downloads the version of timm and its source distribution into a temporary folder. As a pytest plugin, this file
adds our models, and `backbone_depla` over a network of (B, C, H, W) and one of (B, H, W, C) maps, to the tests that
select models by timm's file names. The runner checks that every test that runs on resnet50 also runs on each of our
models, so that none is skipped in silence.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm
from timm.models import generate_default_cfgs, register_model

import timm_depla

ROOT = Path(__file__).parent.parent
MODELS = timm_depla.list_models()
_CFG = dict(num_classes=1000, input_size=(3, 160, 160))
default_cfgs = generate_default_cfgs({f'backbone_depla_{name}.untrained': _CFG for name in ('convnext', 'mambaout')})


@register_model
def backbone_depla_convnext(pretrained=False, **kwargs):
    return timm_depla.models.insertion.backbone_depla(pretrained, backbone='test_convnext', **kwargs)


@register_model
def backbone_depla_mambaout(pretrained=False, **kwargs):
    return timm_depla.models.insertion.backbone_depla(pretrained, backbone='test_mambaout', **kwargs)


def pytest_configure() -> None:
    """Let `list_models(module=[...])`, where it asks for timm's file 'resnet', find the models of our files."""
    modules = sorted({timm.model_entrypoint(name).__module__.rpartition('.')[2] for name in MODELS})
    upstream = timm.list_models

    def list_models(filter='', module='', **kwargs):
        ours = [*modules, 'timm_suite'] if not isinstance(module, str) and 'resnet' in module else []
        return upstream(filter, [*module, *ours] if ours else module, **kwargs)

    timm.list_models = list_models


def run(*command: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], check=True, **kwargs)


def functions_on(test_ids: str, model: str) -> set:
    """Names of the test functions that have `model` among their parameters."""
    return set(re.findall(rf'::(\w+)\[(?:[^\]]*-)?{model}(?:-[^\]]*)?\]', test_ids))


def run_version(version: str, folder: Path, options: list) -> int:
    """Run one version's tests and return pytest's exit status."""
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    run(*pip, 'install', '--no-deps', '--target', folder / 'site', f'timm=={version}')
    run(*pip, 'download', '--no-deps', '--no-binary', 'timm', '-d', folder, f'timm=={version}')
    with tarfile.open(folder / f'timm-{version}.tar.gz') as archive:
        archive.extractall(folder, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))  # from 3.11.4 on
    source = folder / f'timm-{version}'
    (source / 'timm').rename(source / 'unused')  # the tests are to import the installed package
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (folder / 'site', ROOT, ROOT / 'tests')))}
    command = [sys.executable, '-m', 'pytest', '-p', 'timm_suite', 'tests/test_models.py']
    ids = run(*command, '--collect-only', '-q', cwd=source, env=env, capture_output=True, text=True).stdout
    expected = functions_on(ids, 'resnet50')
    models = [*MODELS, 'backbone_depla_convnext', 'backbone_depla_mambaout']
    print(f'timm {version}: {len(expected)} tests on each of {len(models)} models', flush=True)
    for model in models:
        if missing := expected - functions_on(ids, model):
            sys.exit(f'not run on {model}: {", ".join(sorted(missing))}')
    ours = ' or '.join(models)
    return subprocess.run([*command, '-k', ours, '-q', *options], cwd=source, env=env).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('version', help='of timm')
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(run_version(args.version, Path(scratch), options))


if __name__ == '__main__':
    main()
