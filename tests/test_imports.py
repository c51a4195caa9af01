"""Imports point one way: engine -> data, detection, models -> layers; see the layout in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import timm_depla

ALLOWED = {
    'errors': set(),
    'files': set(),
    'layers': set(),
    'schema': set(),
    'version': set(),
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
            package = ['timm_depla', *path.relative_to(root).parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join(filter(None, [*base, node.module]))
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


def test_nothing_imports_the_benchmarks():
    root = Path(timm_depla.__file__).parent.parent
    for path in [*root.glob('*.py'), *root.glob('hub/*.py'), *root.glob('timm_depla/**/*.py')]:
        assert not re.search(r'^\s*(from|import) benchmarks', path.read_text(), re.MULTILINE), path
