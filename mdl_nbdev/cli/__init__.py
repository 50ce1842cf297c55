"Console scripts, dashboards, the settings form and the demo"
import sys

from mdl_nbdev._moved import Moved

sys.modules[__name__].__class__ = Moved
