"""The page as a Space; DEPLA_MODELS, a variable of the Space, names its models, such as hf-hub:ORG/NAME."""

import os

from timm_depla.demo import launch

launch(os.environ.get('DEPLA_MODELS', '').split())
