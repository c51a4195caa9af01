from .arguments import check_depla_args
from .depla import AdaptiveBFN, Depla, PlainBFN, SoftRPN
from .fused import set_fused_depla, use_fused_depla
from .linear import resize, soft_roi_pool

__all__ = [
    'AdaptiveBFN', 'Depla', 'PlainBFN', 'SoftRPN', 'check_depla_args', 'resize', 'set_fused_depla', 'soft_roi_pool',
    'use_fused_depla',
]  # fmt: skip
