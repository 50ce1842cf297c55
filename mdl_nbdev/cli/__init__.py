"Dashboards, the settings form, the demo and the console scripts"
import sys

from mdl_nbdev import _Part

sys.modules[__name__].__class__ = _Part
