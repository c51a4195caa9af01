"""Aggregation with Feature Detection (DEPLA, ICCV 2021) for timm: importing this package registers its models."""

from . import models as models
from .version import __version__ as __version__
