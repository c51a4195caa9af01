from .depla import AdaptiveBFN, Depla, PlainBFN, SoftRPN, check_depla_args
from .fused import set_fused_depla
from .linear import soft_roi_pool

__all__ = ['AdaptiveBFN', 'Depla', 'PlainBFN', 'SoftRPN', 'check_depla_args', 'set_fused_depla', 'soft_roi_pool']
