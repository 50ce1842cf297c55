"""The flat modules of version 0.1.0: imports that were written for them keep working

This file and the `__init__.py` of the package and its parts are written by hand; everything else comes from notebooks.
"""
import functools
import importlib
import inspect
import sys
from types import ModuleType, SimpleNamespace

# The modules of version 0.1.0 and their public names
MODULES = {
    "audio": """
        SAMPLE_RATE MAX_PEAK AudioError is_url resolve AudioInfo audio_info load_audio to_int16 from_int16 cache_dir
        fetch audio_html svg_image duration_text waveform_html""",
    "batches": "StepSampler padding_waste pack_rows Collator Batch",
    "chat": """
        AUDIO AUDIO_BOS AUDIO_EOS CHATML ROLE_START ROLE_END ROLE_MARKERS tiny_tokenizer tiny_text_tokenizer
        n_audio_tokens check_conversation tokenize decode_answer from_hub load_tokenizer fingerprint Example encode
        LabelView""",
    "check": "MIN_AUDIO_SECONDS CheckReport check",
    "checkpoints": """
        MANIFEST check_checkpoint write_checkpoint last_checkpoint set_aside_later keep EarlyStopping save_state
        load_state random_state set_random_state identity differences""",
    "cli": "mdl_check mdl_convert mdl_train mdl_merge mdl_infer mdl_eval mdl_demo",
    "config": """
        InputError disk_is_full coerce option at_least within every several mapping positional DataSettings
        ModelSettings TokenizeSettings LoadSettings TuneSettings TaskSettings CheckSettings ConvertSettings
        TrainSettings InferSettings MergeSettings EvalSettings DemoSettings option_groups parser read_config
        from_args to_dict save_config""",
    "dashboard": """
        Curve chart Pace View TrainView Live Run TrainRun start_training Watch watch InferView InferRun
        start_inference SettingsForm""",
    "data": """
        COLUMNS Row BadRow bad_rows_error check_path CsvFile read_rows format_row Conversation text_message
        to_conversation clip_html""",
    "dataset": """
        META end_with_parent ConvertReport convert new_output make_folder AudioDataset open_dataset Mix open_mix
        split TooLong LengthReport limit_length""",
    "demo": "TINY_LORA DemoReport demo",
    "evaluate": "Scores score EvalReport evaluate",
    "infer": "Question InferReport infer",
    "losses": "count_labels loss_weights weighted_losses CoBa",
    "memory": "Stack MemoryEstimate estimate_memory memory_advice is_out_of_memory",
    "midashenglm": """
        SAMPLE_RATE MIN_SAMPLES QWEN2_7B LOSS_LOGITS n_audio_tokens MiDashengAudioConfig MiDashengLMConfig
        reflect_ends log_mel ChunkPlan plan_chunks MiDashengAudioBlock MiDashengAudioEncoder MiDashengAudioProjector
        weighted_sums loss_pieces next_position labelled_loss MiDashengLMPreTrainedModel MiDashengLMModel
        MiDashengLMProcessor""",
    "model": """
        tiny_config tiny_model tiny_text_model pick_device pick_dtype load_model load_processor generate_tokens
        linear_layers adapt Trainable optimizer_groups trainable_state load_trainable_state save_model load_adapter
        merge merge_adapter""",
    "records": "ROLES PAIRS KEYS SUFFIXES Record JsonlFile ParquetFile open_rows Source find_tasks",
    "samples": "SampleAnswers read_samples",
    "sounds": "SOUND_LABELS make_sound make_sounds",
    "train": "ProgressLine MetricsFile read_metrics TrainReport model_card train DryRun dry_run",
    "trainer": "TaskTrainer Flow",
}
# What names are called now
RENAMED = {"audio_html": "audio_player", "duration_text": "format_duration", "Question": "PromptedRow", "ProgressLine": "ProgressBar"}
# Where constants are, as module or module:name, and the console scripts, which are made by a function;
# nbdev's index knows where functions and classes are
CONSTANTS = {
    **dict.fromkeys(["SAMPLE_RATE", "MAX_PEAK"], "data.audio"), "SOUND_LABELS": "data.sounds", "COLUMNS": "data.rows", "SUFFIXES": "data.sources",
    **dict.fromkeys(["ROLES", "PAIRS", "KEYS"], "data.messages"), "MIN_AUDIO_SECONDS": "data.check",
    **dict.fromkeys(["AUDIO", "AUDIO_BOS", "AUDIO_EOS", "CHATML"], "model.midashenglm_family"),
    **dict.fromkeys(["ROLE_START", "ROLE_END"], "model.template"), "ROLE_MARKERS": "model.text_family",
    "MIN_SAMPLES": "model.midasheng_encoder", "QWEN2_7B": "model.midashenglm", "LOSS_LOGITS": "model.label_loss",
    "MANIFEST": "train.checkpoints", "META": "train.convert:MANIFEST", "TINY_LORA": "cli.demo",
    **dict.fromkeys(MODULES["cli"].split(), "cli.commands"),
}
# Functions that called an argument otherwise: where a chat is taken now, they took a tokenizer, and callbacks were listeners
OLD_ARGUMENTS = {
    **dict.fromkeys(["convert", "open_dataset", "open_mix", "limit_length"], ("tok", "chat")),
    **dict.fromkeys(["infer", "start_inference"], ("listeners", "callbacks")),
}
OLD_FIELDS = dict(tokens="prompt_tokens", room="max_new_tokens", answer="prediction", cut="truncated") # Of the rows that a listener gets
# What is gone, and what to use instead
REMOVED = dict.fromkeys(["at_least", "within", "every", "several", "mapping", "positional"], "declare options with `opt` of mdl_nbdev.base.options")
REMOVED["Stack"] = "the memory estimate runs a step without data and knows no layers"


@functools.cache
def homes(): # From nbdev's index, which `nbdev_export` writes
    "Name -> the module that defines it, for all functions and classes"
    symbols = importlib.import_module("mdl_nbdev._modidx").d["syms"]
    return {full.removeprefix(f"{module}."): module for module, names in symbols.items() for full in names}


def find(name): # Of a public function or class by its present name, or of a constant
    "The object of that name, from the module that defines it; `KeyError` if there is none"
    if name not in CONSTANTS: return getattr(importlib.import_module(homes()[name]), name)
    module, _, new = CONSTANTS[name].partition(":")
    return getattr(importlib.import_module(f"mdl_nbdev.{module}"), new or name)


class Later: # Without a docstring of its own: it has that of the function
    def __init__(self, name): self.__name__ = name
    @property
    def __wrapped__(self): return find(self.__name__) # by which `inspect` finds the signature
    @property
    def __doc__(self): return self.__wrapped__.__doc__
    def __call__(self, *args, **kwargs): return self.__wrapped__(*args, **kwargs)
    def __repr__(self): return f"<function {self.__name__}, which is imported when it is called>"


@functools.cache
def later(name): # Of a public function
    "A function whose module is imported when it is first called, or looked at"
    return Later(name)


def as_callback(listener):
    "A callback that shows a listener of version 0.1.0 rows with the fields that it knows"
    fields = OLD_FIELDS | {name: name for name in ("row", "conversation", "reason")}
    @functools.wraps(listener, updated=())
    def callback(rows, done, total):
        listener([SimpleNamespace(**{old: getattr(r, new) for old, new in fields.items()}) for r in rows], done, total)
    callback.shows_progress = getattr(listener, "shows_progress", False)
    return callback


@functools.cache
def with_old_arguments(function, old, new): # See `OLD_ARGUMENTS`
    "A function that can also be called as in version 0.1.0"
    @functools.wraps(function)
    def call(*args, **kwargs):
        if "listeners" in kwargs: kwargs["listeners"] = list(map(as_callback, kwargs["listeners"]))
        if old in kwargs: kwargs[new] = kwargs.pop(old)
        given = inspect.signature(function).bind(*args, **kwargs)
        if given.arguments.get("chat"): given.arguments["chat"] = find("chat_of")(given.arguments["chat"])
        return function(*given.args, **given.kwargs)
    return call


class Moved(ModuleType):
    "A module of version 0.1.0, which finds its names where they are now; called, it calls its function of the same name"
    @property
    def old_name(self): return self.__name__.rpartition(".")[2]

    def __getattr__(self, name):
        names = MODULES[self.old_name].split()
        if name == "__all__": return [n for n in names if n not in REMOVED]
        if name in REMOVED: raise AttributeError(f"{self.__name__}.{name} is gone: {REMOVED[name]}")
        if name not in names: raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = find(RENAMED.get(name, name))
        return with_old_arguments(found, *OLD_ARGUMENTS[name]) if name in OLD_ARGUMENTS else found

    def __dir__(self): return [*super().__dir__(), *MODULES[self.old_name].split()]
    def __call__(self, *args, **kwargs): return getattr(self, self.old_name)(*args, **kwargs)
    @property
    def __signature__(self): return inspect.signature(getattr(self, self.old_name))


def install(package): # The package's name
    "Put the modules of version 0.1.0 in their place; those that are parts now do that themselves"
    parts = ("data", "model", "train", "infer", "cli")
    for module in MODULES:
        if module not in parts: sys.modules.setdefault(f"{package}.{module}", Moved(f"{package}.{module}"))
