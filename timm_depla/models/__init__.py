from .builder import check_published as check_published
from .builder import list_models as list_models
from .fishnet_depla import *  # noqa: F403
from .insertion import *  # noqa: F403
from .regnet_depla import *  # noqa: F403
from .resnet_depla import *  # noqa: F403
from .trunk import TrunkReport as TrunkReport
from .trunk import find_weights as find_weights
from .trunk import load_trunk as load_trunk
