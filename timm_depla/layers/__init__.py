from .depla import AdaptiveBFN, Depla, PlainBFN, SoftRPN, check_depla_args, soft_roi_pool

__all__ = ['AdaptiveBFN', 'Depla', 'PlainBFN', 'SoftRPN', 'check_depla_args', 'soft_roi_pool']
