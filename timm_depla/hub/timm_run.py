"""A run of timm's train.py in the form that publishing reads."""

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import yaml

from timm_depla.engine.checkpoint import checkpoint_name, pack_state, write_checkpoint
from timm_depla.engine.classification.flags import create_train_parser
from timm_depla.engine.config import parse_args
from timm_depla.loading import load_model, model_config
from timm_depla.timm_runs import read_timm_run


@contextmanager
def adopted(source: str) -> Iterator[str]:
    """A run or checkpoint of timm's train.py as one of ours, in a temporary folder; anything else is given back.

    ConfigError if its weights do not fit its model.
    """
    found = read_timm_run(source)
    if found is None:
        yield source
        return
    model = load_model(source)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    files = {
        'model.safetensors': weights,
        'config.json': model_config(model, found.model_args),
        'record.json': json.dumps({'epoch': found.epochs, 'step': 0}).encode(),
        **pack_state({}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, 'run', 'checkpoints', checkpoint_name(found.epochs, 0))
        write_checkpoint(folder, files)
        args = {**vars(parse_args(create_train_parser(), [])), **found.args, 'recipe': 'timm'}
        (folder.parent.parent / 'args.yaml').write_text(yaml.safe_dump(args))
        yield str(folder)
