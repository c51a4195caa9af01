from .arguments import check_depla_args
from .depla import AdaptiveBFN, Depla, PlainBFN, SoftRPN, match_size, soft_roi_pool

__all__ = ['AdaptiveBFN', 'Depla', 'PlainBFN', 'SoftRPN', 'check_depla_args', 'match_size', 'soft_roi_pool']
