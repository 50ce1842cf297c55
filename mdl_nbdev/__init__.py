"""Fine-tune audio language models on your own recordings, check them, and run them over new files

Names are loaded when they are first used, so importing the package loads neither torch nor transformers.
"""
__version__ = "0.1.0"

import importlib
import logging
import sys
from types import ModuleType

# On a CPU bitsandbytes warns, when it is imported, that a download would make it faster, and in each product that it computes in 16 bits
for _name in ("backends.cpu.ops", "autograd._functions"): logging.getLogger(f"bitsandbytes.{_name}").setLevel(logging.ERROR)

# Where the names that notebooks use are defined
_HOMES = {
    "base.errors": "InputError",
    "base.settings": "CheckSettings ConvertSettings TrainSettings InferSettings MergeSettings EvalSettings DemoSettings",
    "base.command_line": "save_config",
    "data.remote": "AudioError",
    "data.audio": "load_audio audio_info",
    "data.conversations": "Conversation",
    "data.rows": "to_conversation",
    "data.tables": "read_rows",
    "data.sources": "open_rows",
    "data.sounds": "SOUND_LABELS make_sound make_sounds",
    "data.check": "check CheckReport",
    "model.load": "load_model load_processor",
    "model.save": "load_adapter merge_adapter save_model",
    "train.convert": "convert ConvertReport",
    "train.dataset": "AudioDataset open_dataset",
    "train.mix": "open_mix",
    "train.callbacks": "read_metrics",
    "train.report": "TrainReport",
    "train.run": "train dry_run",
    "infer.run": "infer InferReport",
    "infer.metrics": "score Scores",
    "infer.evaluate": "evaluate EvalReport",
    "cli.dashboard": "watch start_training start_inference SettingsForm",
    "cli.demo": "demo",
}
_home_of = {name: module for module, names in _HOMES.items() for name in names.split()}

# Modules of version 0.1.0 and where their names are now: imports written for it keep working
_MOVED = dict(
    config="base.errors base.options base.settings base.command_line",
    audio="data.audio data.remote data.pictures base.html base.text",
    sounds="data.sounds",
    data="data.tables data.rows data.conversations data.pictures data.audio",
    records="data.sources data.jsonl data.parquet data.messages data.tables data.rows data.conversations",
    check="data.check data.rows",
    chat="model.chat model.tokenizers model.label_view model.template model.midashenglm_family model.text_family model.hub model.midasheng_encoder",
    midashenglm="model.midashenglm model.midasheng_encoder model.label_loss",
    model="model.load model.targets model.adapters model.save model.engine model.midashenglm_family model.text_family",
    dataset="train.dataset train.convert train.mix base.files base.processes",
    batches="train.batches model.collate",
    losses="train.losses train.coba",
    checkpoints="train.checkpoints train.state train.stopping train.identity",
    memory="train.memory",
    trainer="train.loop train.resume",
    samples="train.samples",
    train="train.run train.report train.callbacks",
    infer="infer.run infer.output infer.identity",
    evaluate="infer.evaluate infer.metrics",
    dashboard="cli.dashboard",
    demo="cli.demo",
    cli="cli.commands",
)

_RENAMED = dict(audio_html="audio_player", duration_text="format_duration", META="MANIFEST") # Names of version 0.1.0, and what they are called now


def _look_up(name, modules):
    "A name from the first of some modules that defines it; `AttributeError` if none does"
    for module in modules.split():
        m = importlib.import_module(f"{__name__}.{module}")
        for n in (name, _RENAMED.get(name)):
            if n and hasattr(m, n): return getattr(m, n)
    raise AttributeError(f"{__name__} has no {name!r}")


class _Moved(ModuleType):
    "A module of version 0.1.0, which finds its names where they are now"
    def __getattr__(self, name):
        old = self.__name__.rpartition(".")[2]
        if name == "__all__": return [n for m in _MOVED[old].split() for n in importlib.import_module(f"mdl_nbdev.{m}").__all__]
        if name.startswith("__"): raise AttributeError(name)
        return _look_up(name, _MOVED[old])


class _Part(_Moved):
    "The package of a part that has the name of its main function: `train(settings)` calls `mdl_nbdev.train.run.train`"
    def __call__(self, *args, **kwargs): return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def __getattr__(name):
    if name in _home_of: return _look_up(name, _home_of[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return [*globals(), *_home_of]


_parts = ("data", "model", "train", "infer", "cli")
for _name in _MOVED:
    if _name not in _parts: sys.modules[f"{__name__}.{_name}"] = _Moved(f"{__name__}.{_name}")
