"""Where a number comes from: the command, commit, versions and hardware that it was measured with."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Dict

import timm
import torch

from timm_depla.version import __version__

__all__ = ['create_record']


def _commit() -> str:
    """The commit of the code, marked where the working tree differs from it; empty where it is no working tree."""

    def git(*args: str) -> str:
        command = ['git', '-C', str(Path(__file__).parent.parent.parent), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    written = (':!docs', ':!benchmarks/records', ':!benchmarks/evidence/*.jsonl')  # by the benchmarks themselves
    return git('rev-parse', 'HEAD') + ('-modified' if git('status', '--porcelain', '-uno', '--', *written) else '')


COMMIT = _commit()  # on import: the code that runs, whatever is committed meanwhile


def _processor() -> str:
    """The processor's name, as Linux tells it where it does."""
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
