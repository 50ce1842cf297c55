"A family of models that the package has never heard of: another clip token, another sample rate, another network, from checking its data to judging its answers"
import csv
import json

import numpy as np
import pytest
import soundfile as sf
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mdl_nbdev import CheckSettings, ConvertSettings, EvalSettings, InferSettings, TrainSettings, check, convert, evaluate, infer, train
from mdl_nbdev.base.errors import InputError
from mdl_nbdev.data.conversations import Conversation
from mdl_nbdev.model import families
from mdl_nbdev.model.byte_tokenizer import byte_tokenizer
from mdl_nbdev.model.chat import Chat
from mdl_nbdev.model.family import Family
from mdl_nbdev.model.midashenglm import CACHE

pytestmark = pytest.mark.usefixtures("one_thread")
RATE, GROOVE = 8000, 400 # samples a second; samples a token
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ '<disc>' if p.type == 'audio' else p.text }}{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


class GramophoneConfig(PreTrainedConfig):
    model_type = "gramophone"
    sub_configs = {"text_config": Qwen2Config}

    def __init__(self, text_config=None, disc_id=0, **kwargs):
        self.text_config = Qwen2Config(**text_config) if isinstance(text_config, dict) else text_config or Qwen2Config()
        self.disc_id = disc_id
        super().__init__(**kwargs)


class Gramophone(PreTrainedModel, GenerationMixin):
    "Spectra of 50 ms of sound, a linear layer, and a causal language model"
    config_class = GramophoneConfig
    supports_gradient_checkpointing = True
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.horn, self.amplifier, self.lm = nn.Linear(GROOVE // 2 + 1, width), nn.Linear(width, width), Qwen2ForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self): return self.lm.get_input_embeddings()
    def get_output_embeddings(self): return self.lm.lm_head

    def forward(self, input_ids=None, attention_mask=None, grooves=None, position_ids=None, inputs_embeds=None, use_cache=None, logits_to_keep=0, **kwargs):
        x = self.get_input_embeddings()(input_ids)
        if grooves is not None and (input_ids == self.config.disc_id).any():
            heard = self.amplifier(torch.tanh(self.horn(grooves.to(x.dtype))))
            x = x.masked_scatter((input_ids == self.config.disc_id)[..., None], heard)
        out = self.lm.model(inputs_embeds=x, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **{CACHE: kwargs.get(CACHE)})
        return CausalLMOutputWithPast(logits=self.lm.lm_head(out.last_hidden_state), **{CACHE: getattr(out, CACHE)})


class GramophoneFamily(Family):
    name, model_types, sample_rate, clip_token, max_clip_seconds = "gramophone", ("gramophone",), RATE, "<disc>", 20.
    parts = {"encoder": ("horn",), "projector": ("amplifier",)}

    def clip_tokens(self, n_samples): return max(1, n_samples // GROOVE)
    def clip_cost(self, n_samples, n_clips): return n_samples // GROOVE

    def clip_tensors(self, clips):
        padded = [np.pad(c, (0, max(0, GROOVE - len(c)))).astype(np.float32) / (32768 if c.dtype == np.int16 else 1) for c in clips]
        grooves = np.concatenate([c[:len(c) // GROOVE * GROOVE].reshape(-1, GROOVE) for c in padded])
        return {"grooves": np.log(np.abs(np.fft.rfft(grooves)) + 1e-3).astype(np.float32)}

    def register(self): AutoConfig.register("gramophone", GramophoneConfig, exist_ok=True)
    def model_class(self): return Gramophone


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The model in a folder, and a table of low, middle and high tones"
    families.add_family(GramophoneFamily())
    folder, rng = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    tok = byte_tokenizer(eos_token="<|end|>", pad_token="<|pad|>", extra_special_tokens=["<disc>"], chat_template=TEMPLATE)
    text = dict(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, eos_token_id=tok.eos_token_id)
    torch.manual_seed(0)
    model = Gramophone(GramophoneConfig(text, disc_id=tok.convert_tokens_to_ids("<disc>"), eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1: p.normal_(0, (2 if "lm_head" in name else 1) / p[0].numel()**.5)
    for saved in (model, tok): saved.save_pretrained(folder / "base")
    with open(folder / "tones.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["audio", "prediction"])
        for i in range(60):
            label, hertz = [("low", 300), ("middle", 900), ("high", 2700)][i % 3]
            t = np.arange(int(rng.uniform(.3, .8) * 22050)) / 22050 # a rate that is neither the family's nor the package's default
            sf.write(folder / f"{i}.wav", .3 * np.sin(2 * np.pi * hertz * rng.uniform(.9, 1.1) * t), 22050)
            rows.writerow([f"{i}.wav", label])
    yield folder
    families.FAMILIES.pop(0)


def test_a_new_family_goes_all_the_way(world):
    data, model = dict(base_dir=world), str(world / "base")
    assert not check(CheckSettings(input=world / "tones.csv", **data)).bad
    converted = convert(ConvertSettings(input=world / "tones.csv", output=world / "converted", model_name=model, **data))
    seconds = sum(sf.info(world / f"{i}.wav").duration for i in range(60))
    assert abs(converted.audio_seconds - seconds) < .01, "seconds at the family's own rate"
    settings = dict(model_name=model, lr=5e-3, num_epochs=20, batch_size=10, train_target=["encoder", "projector", "decoder"], gradient_checkpointing=False)
    run = train(TrainSettings(train_dataset=world / "converted", output=world / "run", **settings))
    assert run.last("loss") < .1 and json.loads((run.final / "config.json").read_text())["model_type"] == "gramophone"
    answers = infer(InferSettings(input=world / "tones.csv", output=world / "answers.csv", model_name=str(run.final), max_new_tokens=12, **data))
    assert answers.rows == 60 and not answers.failed
    assert evaluate(EvalSettings(input=world / "answers.csv", reference=world / "tones.csv")).scores.exact > .95


def test_its_limits_are_kept(world):
    sf.write(world / "long.wav", np.zeros(21 * RATE), RATE)
    (world / "long.csv").write_text("audio\nlong.wav\n")
    report = infer(InferSettings(input=world / "long.csv", output=world / "rejected.csv", model_name=str(world / "base"), max_new_tokens=4, base_dir=world))
    long = "long.wav: 21.0 s long, the limit is"
    assert report.failed and f"{long} 20 s; gramophone takes no longer clips: cut it into shorter ones" in report.rejected[0][3]
    chat, conversation = families.load_chat(str(world / "base")), Conversation([{"role": "user", "content": [{"type": "audio", "audio": str(world / "long.wav")}]}])
    with pytest.raises(InputError, match=rf"{long} 10 s; .*raise the limit \(--max-audio-seconds\)"): chat.load_clips(conversation, 10.)


def test_a_clip_token_that_the_tokenizer_lacks_is_refused():
    with pytest.raises(InputError, match="gramophone: the tokenizer has no added token '<disc>'"): Chat(byte_tokenizer(eos_token="<|end|>", chat_template=TEMPLATE), GramophoneFamily())


def test_parts_are_whole_names():
    family = GramophoneFamily()
    assert [family.part_of(n) for n in ("horn", "base_model.model.horn.weight", "hornbeam.weight", "lm.amplifier.0")] == ["encoder", "encoder", "decoder", "projector"]
