"Training: datasets, batches, losses, checkpoints, the loop"
import sys

import mdl_nbdev.model # noqa: F401 - before transformers, so that what few runs use can wait
from mdl_nbdev._moved import Moved

sys.modules[__name__].__class__ = Moved
