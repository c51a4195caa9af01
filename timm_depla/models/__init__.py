from .backbone import LoadReport as LoadReport
from .backbone import find_weights as find_weights
from .backbone import load_backbone as load_backbone
from .builder import check_published as check_published
from .builder import list_models as list_models
from .fishnet_depla import *  # noqa: F403
from .insertion import *  # noqa: F403
from .regnet_depla import *  # noqa: F403
from .resnet_depla import *  # noqa: F403
