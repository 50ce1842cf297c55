"Inference and evaluation"
import sys

from mdl_nbdev import _Part

sys.modules[__name__].__class__ = _Part
