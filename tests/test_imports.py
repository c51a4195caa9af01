"""Imports point one way: engine -> data, detection, models -> layers; see the layout in CONTRIBUTING.md."""

import ast
import re
from importlib.util import resolve_name
from pathlib import Path

import timm_depla

ALLOWED = {
    **{part: set() for part in ('errors', 'files', 'layers', 'schema', 'version')},
    'capture': {'layers'},
    'compile': {'layers', 'models'},
    'data': {'errors', 'files'},
    'models': {'files', 'layers', 'schema'},
    'detection': {'files', 'layers', 'schema'},
    'timm_runs': {'errors', 'files', 'schema'},
    'loading': {'data', 'detection', 'errors', 'files', 'models', 'timm_runs'},
    'engine': {'data', 'errors', 'files', 'layers', 'loading', 'models', 'schema', 'timm_runs', 'version'}
    | {'compile', 'detection'},
    'hub': {'commands', 'data', 'detection', 'engine', 'errors', 'files', 'loading', 'models', 'timm_runs', 'version'},
    'visualize': {'capture', 'commands', 'data', 'detection', 'errors', 'files', 'layers', 'loading'},
    'predict': {'commands', 'data', 'detection', 'engine', 'errors', 'files', 'schema', 'visualize'},
    'demo': {'capture', 'commands', 'data', 'errors', 'files', 'predict', 'schema', 'visualize'},
    'commands': {'errors', 'files', 'schema'},
    '__main__': {'commands'},
    '__init__': {'compile', 'models', 'version'},
}  # what each part may import


def imported_parts(path, root):
    """Top-level parts of timm_depla that a file imports, absolute or relative."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = '.'.join(['timm_depla', *path.relative_to(root).parts[:-1]])
            module = resolve_name('.' * node.level + (node.module or ''), package)
            names = [f'{module}.{alias.name}' for alias in node.names]
        else:
            continue
        yield from (name.split('.')[1] for name in names if name.startswith('timm_depla.'))


def test_imports_point_one_way():
    root = Path(timm_depla.__file__).parent
    files = list(root.rglob('*.py'))
    assert {path.relative_to(root).parts[0].removesuffix('.py') for path in files} == set(ALLOWED)
    for path in files:
        part = path.relative_to(root).parts[0].removesuffix('.py')
        extra = set(imported_parts(path, root)) - ALLOWED[part] - {part}
        assert not extra, f'{path} imports {extra}'
    for path in [*files, *root.parent.glob('*.py'), *root.parent.glob('hub/*.py')]:
        assert not re.search(r'^\s*(from|import) benchmarks', path.read_text(), re.MULTILINE), path
