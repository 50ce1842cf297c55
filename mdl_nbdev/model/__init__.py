"Models: families, chat, networks, loading, adapters"
import sys

from mdl_nbdev._moved import Moved
from mdl_nbdev.base.imports import import_when_used

import_when_used("bitsandbytes", "datasets") # transformers and peft import them wherever they are installed, but few runs use them
sys.modules[__name__].__class__ = Moved
