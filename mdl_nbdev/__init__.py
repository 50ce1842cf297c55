"""Fine-tune audio language models on your own recordings, check them, and run them on new files

Names are loaded when they are first used, so importing the package loads neither torch nor transformers.
"""
__version__ = "0.1.0"

import importlib
import logging

from mdl_nbdev import _moved

# On a CPU bitsandbytes warns, when it is imported, that a download would make it faster, and in each product that it computes in 16 bits
for _name in ("backends.cpu.ops", "autograd._functions"): logging.getLogger(f"bitsandbytes.{_name}").setLevel(logging.ERROR)

# What notebooks and scripts use; `check`, `train`, `infer`, `evaluate` and `demo` are modules that can be called like their main function
__all__ = """
    InputError CheckSettings ConvertSettings TrainSettings InferSettings MergeSettings EvalSettings ReviewSettings CompareSettings ServeSettings DemoSettings save_config
    load_audio audio_info AudioError SOUND_LABELS make_sound make_sounds check CheckReport show_clips show_batch
    Conversation to_conversation read_rows open_rows
    load_model load_processor load_adapter merge_adapter save_model
    convert ConvertReport AudioDataset open_dataset open_mix train dry_run read_metrics TrainReport
    infer InferReport evaluate score Scores EvalReport review ReviewReport compare ask serve
    watch start_training start_inference SettingsForm ReviewBoard Recorder demo""".split()
# Those that need torch: they are imported when they are called, so that `from mdl_nbdev.all import *` is quick
_CALLED_LATER = "load_model load_processor load_adapter merge_adapter save_model dry_run".split()


def __getattr__(name):
    if name in _moved.MODULES: return importlib.import_module(f"{__name__}.{name}")
    if name in _CALLED_LATER: return _moved.later(name)
    if name in __all__: return _moved.find(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return [*globals(), *__all__]


_moved.install(__name__)
