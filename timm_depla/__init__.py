"""Aggregation with Feature Detection (DEPLA, ICCV 2021) for timm: importing this package registers its models."""

from . import models as models
from .compile import compile_blocks as compile_blocks
from .models import insert_depla as insert_depla
from .models import list_models as list_models
from .version import __version__ as __version__
