from .digits import digits_folder

__all__ = ['digits_folder']
