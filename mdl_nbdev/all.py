"""All public names, for notebooks: `from mdl_nbdev.all import *`

This imports neither torch nor transformers: functions that need them import them when they are called.
"""
from mdl_nbdev import *
from mdl_nbdev import __all__
