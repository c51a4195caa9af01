"""Records of measurements: results with the command, commit, versions and hardware."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Dict

import timm
import torch

from timm_depla.version import __version__


def _commit() -> str:
    """The commit of the code, with '-modified' if the working tree differs; empty outside of a clone or without git."""
    clone = Path(__file__).parent.parent.parent
    if not (clone / '.git').exists():  # an installed package, perhaps within another repository
        return ''

    def git(*args: str) -> str:
        try:
            return subprocess.run(['git', '-C', str(clone), *args], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ''

    written = (':!docs', ':!benchmarks/records', ':!benchmarks/evidence/*.jsonl')  # by the benchmarks themselves
    return git('rev-parse', 'HEAD') + ('-modified' if git('status', '--porcelain', '-uno', '--', *written) else '')


COMMIT = _commit()  # on import: later commits do not change the code that runs


def _processor() -> str:
    """The processor's name from /proc/cpuinfo, else the machine type."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.machine())


def create_record(command: str, results: Dict[str, Any], **more: Any) -> Dict[str, Any]:
    """Results with the command, commit, versions and hardware that they come from."""
    return {
        'command': command,
        **more,
        'commit': COMMIT,
        'versions': {
            'python': platform.python_version(),
            'torch': torch.__version__,
            'timm': timm.__version__,
            'timm_depla': __version__,
        },
        'hardware': f'{_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads',
        'results': results,
    }
