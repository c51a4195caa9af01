from .digits import digits_folder as digits_folder
from .images import CheckedImages as CheckedImages
from .images import UnreadableError as UnreadableError
from .positions import Draw as Draw
from .positions import PositionedBatches as PositionedBatches
from .positions import SeededBatches as SeededBatches
from .positions import SeededStream as SeededStream
from .positions import seed_position as seed_position
