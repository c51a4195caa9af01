from .digits import *  # noqa: F403
from .folders import *  # noqa: F403
from .images import *  # noqa: F403
from .positions import *  # noqa: F403
from .resize import *  # noqa: F403
