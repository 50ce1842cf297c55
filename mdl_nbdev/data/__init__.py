"Rows and clips: tables, records, audio, checks, metrics"
import sys

from mdl_nbdev._moved import Moved

sys.modules[__name__].__class__ = Moved
