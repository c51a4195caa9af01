"""Write the texts of hub/weights anew from their records, as after a change of the card: `python -m hub.rewrite`."""

from pathlib import Path

from timm_depla.detection import is_detector
from timm_depla.files import read_mapping
from timm_depla.hub.publish import differing, write_folder

WEIGHTS = Path(__file__).parent / 'weights'


def rewrite(folder: Path, output: Path) -> None:
    """Write a shipped folder anew, with the same weights."""
    texts = {name: read_mapping(folder / name) for name in ('config.json', 'recipe.yaml', 'record.json')}
    texts['recipe.yaml'] = differing(texts['recipe.yaml'], is_detector(folder))
    source = f'{"" if is_detector(folder) else "local-dir:"}hub/weights/{folder.name}'
    weights = (folder / 'model.safetensors').read_bytes()
    write_folder(output, {'model.safetensors': weights, **texts}, source, 'apache-2.0')


if __name__ == '__main__':
    for path in sorted(WEIGHTS.iterdir()):
        rewrite(path, path)
