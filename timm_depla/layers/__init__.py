from .depla import AdaptiveBFN, Depla, PlainBFN, SoftRPN, soft_roi_pool

__all__ = ['AdaptiveBFN', 'Depla', 'PlainBFN', 'SoftRPN', 'soft_roi_pool']
