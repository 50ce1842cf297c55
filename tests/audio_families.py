"Audio language models of transformers, built small at random from their own classes: a row for each family"
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
import transformers as hf

from mdl_nbdev.model.byte_tokenizer import byte_tokenizer

SECONDS = 2 # of a feature extractor's window; published ones have 30 or 300


def tokenizer(*names, **special):
    "Bytes, ChatML's tokens and those of a family, which `special` names as attributes"
    return byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>", *names, *special.values()], **special)


def decoder(tok, **kw):
    "The shape of a decoder that is small"
    return dict(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                tie_word_embeddings=False, bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id) | kw


def whisper(**kw):
    "The shape of a Whisper encoder that is small"
    return dict(num_mel_bins=128, max_source_positions=SECONDS * 50, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64) | kw


def draw(model):
    "The model with weights that keep activations at a steady size, drawn with a seed"
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed_positions" not in name: p.normal_(0, (2 if "lm_head" in name else 1) / (p.shape[-1] if "experts" in name else p[0].numel())**.5, generator=g)
    return model.eval()


@dataclass
class Kind:
    "How the tests make a family's model"
    build: Callable # gives a model and what has its processor's `save_pretrained`
    shortest: int # samples of the shortest clip that its processor takes as it is
    most_clips: int = 9 # in one conversation
    longest: int = SECONDS # of its clips
    system: bool = True # whether its template has a system prompt
    prompts: bool = True # whether it shows texts of the user
    apart: bool = True # whether clips of other lengths in a batch do not matter
    recomputes: bool = True # whether activations can be computed again
    end: str = "<|im_end|>" # of an answer
    added: str = "" # to its template, after a last answer that would have no end
    shown: Callable = str # what its template shows of an answer
    processor: Callable = hf.AutoProcessor.from_pretrained # its own, from a folder
    step: int = 1 # samples; several clips of a conversation have a multiple of them each
    edge: int = 0 # last frames of a clip that its processor makes otherwise where a longer one stands beside it
    pads_alike: bool = True # whether several clips of a conversation are padded as its processor pads them
    spectrograms: Callable = np.asarray # of its features [windows, mels, frames]
    quick: Callable | None = None # builds a model with shorter windows than its processor has, for runs that learn
    epochs: int | None = 12 # until it names the demo's sounds; None: 74 of 100 after 30 epochs

    def save(self, folder, quick=False):
        for saved in (quick and self.quick or self.build)(): saved.save_pretrained(folder)
        return folder


def qwen2_audio():
    tok = tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    config = hf.Qwen2AudioConfig(audio_config=whisper(model_type="qwen2_audio_encoder"), text_config=decoder(tok, model_type="qwen2"), audio_token_index=tok.convert_tokens_to_ids("<|AUDIO|>"))
    return draw(hf.Qwen2AudioForConditionalGeneration(config)), hf.Qwen2AudioProcessor(hf.WhisperFeatureExtractor(feature_size=128, chunk_length=SECONDS), tok)


# As in transformers' tests/models/qwen2_5_omni/test_processing_qwen2_5_omni.py
OMNI_TEMPLATE = """{% set audio_count = namespace(value=0) %}{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}\
{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_bos|><|IMAGE|><|vision_eos|>{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}\
{% set audio_count.value = audio_count.value + 1 %}{% if add_audio_id %}Audio {{ audio_count.value }}: {% endif %}<|audio_bos|><|AUDIO|><|audio_eos|>\
{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_bos|><|VIDEO|><|vision_eos|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class WithoutFilms:
    "A processor without the part for films, which needs torchvision"
    def check_argument_for_proper_class(self, name, argument): return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    @classmethod
    def of(cls, folder):
        tok, extractor = hf.AutoTokenizer.from_pretrained(folder), hf.AutoFeatureExtractor.from_pretrained(folder)
        return cls(hf.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(), None, extractor, tok, chat_template=(Path(folder) / "chat_template.jinja").read_text())


class OmniProcessor(WithoutFilms, hf.Qwen2_5OmniProcessor): "Qwen2.5-Omni's own"
class Omni3Processor(WithoutFilms, hf.Qwen3OmniMoeProcessor): "Qwen3-Omni's own"


def qwen_omni():
    tok = tokenizer(audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>", image_token="<|IMAGE|>", video_token="<|VIDEO|>",
                    vision_bos_token="<|vision_bos|>", vision_eos_token="<|vision_eos|>")
    tok.chat_template, ids = OMNI_TEMPLATE, {name: tok.convert_tokens_to_ids(f"<|{name}|>") for name in ("AUDIO", "IMAGE", "VIDEO", "audio_bos", "audio_eos", "vision_bos")}
    rope = dict(rope_type="default", rope_theta=10000., mrope_section=[4, 2, 2])
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[0])
    config = hf.Qwen2_5OmniThinkerConfig(
        audio_config=whisper(n_window=25, output_dim=64), vision_config=vision, text_config=decoder(tok, rope_parameters=rope), audio_token_index=ids["AUDIO"], image_token_index=ids["IMAGE"],
        video_token_index=ids["VIDEO"], audio_start_token_id=ids["audio_bos"], audio_end_token_id=ids["audio_eos"], vision_start_token_id=ids["vision_bos"])
    model = draw(hf.Qwen2_5OmniThinkerForConditionalGeneration(config))
    return model, tok, hf.WhisperFeatureExtractor(feature_size=128, chunk_length=SECONDS)


# Writes what vLLM's examples/generate/multimodal/qwen3_omni prompts the published model with
OMNI3_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def qwen3_omni():
    names = {**{f"{kind}_token": f"<|{kind}_pad|>" for kind in ("audio", "image", "video")}, "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
             "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    tok = tokenizer(**names)
    tok.chat_template, ids = OMNI3_TEMPLATE, {name: tok.convert_tokens_to_ids(token) for name, token in names.items()}
    audio = whisper(output_dim=64, downsample_hidden_size=16, n_window_infer=200)
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0])
    text = decoder(tok, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, rope_parameters=dict(rope_type="default", rope_theta=10000., mrope_section=[4, 2, 2], mrope_interleaved=True))
    del text["tie_word_embeddings"]
    config = hf.Qwen3OmniMoeThinkerConfig(
        audio_config=audio, vision_config=vision, text_config=text, audio_token_id=ids["audio_token"], image_token_id=ids["image_token"], video_token_id=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"], vision_start_token_id=ids["vision_bos_token"])
    return draw(hf.Qwen3OmniMoeThinkerForConditionalGeneration(config)), tok, hf.WhisperFeatureExtractor(feature_size=128, chunk_length=300)


# As transformers' convert_audioflamingo3_to_hf.py and convert_musicflamingo_to_hf.py write them, the latter with a longer system prompt
FLAMINGO_TEMPLATE = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for m in messages if m['content'] is not none %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% set audio = namespace(found=False) %}{% set text_buf = namespace(v='') %}{% for c in m['content'] %}\
{% if c.get('type') == 'audio' or 'audio' in c %}{% set audio.found = True %}{% elif c.get('type') == 'text' or 'text' in c %}{% set text_buf.v = text_buf.v + c['text'] %}{% endif %}{% endfor %}\
{% if audio.found %}{{ '<sound>' }}{% endif %}{{ text_buf.v }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def flamingo(kind, **shape):
    tok = tokenizer("<sound>", "<|sound_bos|>", "<|sound_eos|>")
    sizes = dict(num_mel_bins=128, max_source_positions=SECONDS * 50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ids = dict(audio_token_id=tok.convert_tokens_to_ids("<sound>"), **{name: tok.convert_tokens_to_ids(token) for name, token in shape.items()})
    config = getattr(hf, f"{kind}Config")(audio_config=dict(model_type="audioflamingo3_encoder", **sizes), text_config=decoder(tok, model_type="qwen2"), **ids)
    processor = getattr(hf, f"{kind}Processor")(hf.WhisperFeatureExtractor(feature_size=128, chunk_length=SECONDS), tok, chat_template=FLAMINGO_TEMPLATE, max_audio_len=3 * SECONDS + 1)
    return draw(getattr(hf, f"{kind}ForConditionalGeneration")(config)), processor


def audio_flamingo(): return flamingo("AudioFlamingo3")
def music_flamingo(): return flamingo("MusicFlamingo", audio_bos_token_id="<|sound_bos|>", audio_eos_token_id="<|sound_eos|>")


# As in transformers' convert_glmasr_weights_to_hf.py
GLM_TEMPLATE = """{%- macro to_text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is iterable and content is not mapping -%}
{%- for item in content -%}
{%- if item is mapping and item.type == 'text' and item.text is defined -%}
{{- item.text -}}
{%- elif item is mapping and (item.type == 'audio' or 'audio' in item) -%}
<|begin_of_audio|><|pad|><|end_of_audio|><|user|>
{% elif item is string -%}
{{- item -}}
{%- endif -%}
{%- endfor -%}
{%- else -%}
{{- content -}}
{%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}
<|system|>
{{ to_text(m.content) | trim }}
{%- elif m.role == 'user' -%}
<|user|>
{{ to_text(m.content) | trim }}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{{ to_text(m.content) | trim }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{% endif -%}"""


def glm_asr():
    names = "<|system|> <|user|> <|assistant|> <|observation|> <|begin_of_audio|> <|end_of_audio|> <|pad|>".split()
    tok = byte_tokenizer(eos_token="<|endoftext|>", pad_token="<|endoftext|>", extra_special_tokens=names)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=SECONDS * 50)
    ends = tok.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    config = hf.GlmAsrConfig(audio_config=dict(model_type="glmasr_encoder", **sizes), text_config=decoder(tok, model_type="llama", eos_token_id=ends),
                             audio_token_id=tok.convert_tokens_to_ids("<|pad|>"), tie_word_embeddings=False)
    processor = hf.GlmAsrProcessor(hf.WhisperFeatureExtractor(feature_size=128, chunk_length=SECONDS), tok, chat_template=GLM_TEMPLATE, max_audio_len=3 * SECONDS + 1)
    return draw(hf.GlmAsrForConditionalGeneration(config)), processor


# As in transformers' convert_qwen3_asr_to_hf.py
QWEN3_ASR_TEMPLATE = """{%- set ns = namespace(system_text='') -%}{%- for m in messages -%}{%- if m.role == 'system' -%}{%- if m.content is string -%}{%- set ns.system_text = ns.system_text + m.content -%}\
{%- else -%}{%- for c in m.content -%}{%- if c.type == 'text' and (c.text is defined) -%}{%- set ns.system_text = ns.system_text + c.text -%}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endif -%}{%- endfor -%}\
{%- set ns2 = namespace(audio_tokens='') -%}{%- for m in messages -%}{%- if m.content is not string -%}{%- for c in m.content -%}{%- if c.type == 'audio' or ('audio' in c) or ('audio_url' in c) -%}\
{%- set ns2.audio_tokens = ns2.audio_tokens + '<|audio_start|><|audio_pad|><|audio_end|>' -%}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}\
{{- '<|im_start|>system\n' + ns.system_text + '<|im_end|>\n' -}}{{- '<|im_start|>user\n' + ns2.audio_tokens + '<|im_end|>\n' -}}\
{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- set ns3 = namespace(assistant_text='') -%}{%- if m.content is string -%}{%- set ns3.assistant_text = m.content -%}\
{%- else -%}{%- for c in m.content -%}{%- if c.type == 'text' and (c.text is defined) -%}{%- set ns3.assistant_text = ns3.assistant_text + c.text -%}{%- endif -%}{%- endfor -%}{%- endif -%}\
{{- '<|im_start|>assistant\n' -}}{% generation %}{{- ns3.assistant_text + '<|im_end|>\n' -}}{% endgeneration %}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def qwen3_asr():
    tok = tokenizer(audio_token="<|audio_pad|>", audio_bos_token="<|audio_start|>", audio_eos_token="<|audio_end|>")
    sizes = dict(num_mel_bins=128, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, downsample_hidden_size=8, output_dim=64, n_window_infer=200)
    config = hf.Qwen3ASRConfig(audio_config=dict(model_type="qwen3_asr_encoder", **sizes), text_config=decoder(tok, model_type="qwen3", head_dim=16), tie_word_embeddings=False,
                               audio_token_id=tok.convert_tokens_to_ids("<|audio_pad|>"), eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    return draw(hf.Qwen3ASRForConditionalGeneration(config)), hf.Qwen3ASRProcessor(hf.Qwen3ASRFeatureExtractor(), tok, chat_template=QWEN3_ASR_TEMPLATE)


# Those of granite-speech-4.1-2b, and of granite-speech-4.1-2b-plus without tools and documents
GRANITE_TEMPLATE = """{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }}
 ASSISTANT:{% elif message['role'] == 'assistant' %}{{ message['content'] }}{% endif %}{% endfor %}"""
GRANITE_PLUS_TEMPLATE = """{%- if messages[0]['role'] != 'system' %}{{- '<|start_of_role|>system<|end_of_role|>You are a helpful assistant. Please ensure responses are professional, accurate, and safe.<|end_of_text|>\n' }}\
{%- endif %}{%- for message in messages %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""


class MelSpectrogram:
    "torchaudio's, with the filters that its 2.11 computes, for where torchaudio is not installed"
    def __init__(self, n_fft, win_length, hop_length, n_mels, sample_rate):
        with np.load(Path(__file__).parent / "fixtures" / "torchaudio_filters.npz") as file: self.filters = torch.from_numpy(file["htk"])
        self.options = dict(n_fft=n_fft, win_length=win_length, hop_length=hop_length, window=torch.hann_window(win_length), return_complex=True)

    def to(self, device): return self
    def __call__(self, waves): return (torch.stft(waves, **self.options).abs().pow(2).transpose(-1, -2) @ self.filters).transpose(-1, -2)


class GraniteProcessor:
    "Granite Speech's own, whose chat template takes turns as texts"
    def __init__(self, folder):
        module = hf.models.granite_speech.feature_extraction_granite_speech
        if not hf.utils.is_torchaudio_available():
            module.torchaudio = SimpleNamespace(transforms=SimpleNamespace(MelSpectrogram=MelSpectrogram))
            module.requires_backends = lambda *args: None
        tok = hf.AutoTokenizer.from_pretrained(folder)
        self.own = hf.GraniteSpeechProcessor(module.GraniteSpeechFeatureExtractor(), tok)
        self.ends = any(end in tok.chat_template for end in ("end_of_text", "eos_token")) # of answers: 4.1 has them where it was saved by us

    def apply_chat_template(self, messages, return_tensors=None, tokenize=True, return_dict=True, **kw):
        def text(m): return "".join(p.get("text", "<|audio|>") for p in m["content"]) + ("" if self.ends or m["role"] != "assistant" else "<|end_of_text|>")
        clips = [p["audio"] for m in messages for p in m["content"] if p["type"] == "audio"]
        rendered = self.own.tokenizer.apply_chat_template([dict(role=m["role"], content=text(m)) for m in messages], tokenize=False, **kw)
        return self.own(rendered, clips or None, return_tensors="pt")


def granite(kind, template, **encoder):
    tok = byte_tokenizer(eos_token="<|end_of_text|>", pad_token="<|end_of_text|>", extra_special_tokens=["<|start_of_role|>", "<|end_of_role|>", "<|audio|>"], chat_template=template)
    sizes = dict(num_layers=4, hidden_dim=32, num_heads=4, context_size=20, max_pos_emb=32, dropout=0., conv_kernel_size=5) | encoder
    former = dict(model_type="blip_2_qformer", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, hidden_dropout_prob=0., attention_probs_dropout_prob=0.,
                  encoder_hidden_size=32 * (1 + len(encoder.get("cat_hidden_layers", []))), cross_attention_frequency=1)
    config = getattr(hf, f"{kind}Config")(encoder_config=sizes, projector_config=former, text_config=decoder(tok, model_type="granite"), audio_token_index=tok.convert_tokens_to_ids("<|audio|>"),
                                          has_lora_adapter=False, tie_word_embeddings=False)
    return draw(getattr(hf, f"{kind}ForConditionalGeneration")(config)), tok, TextFile("processor_config.json", json.dumps(dict(processor_class="GraniteSpeechProcessor")))


def unpaired(pairs): return pairs.reshape(len(pairs), -1, 80).transpose(0, 2, 1) # of frames


def granite_speech(): return granite("GraniteSpeech", GRANITE_TEMPLATE)
def granite_speech_plus(): return granite("GraniteSpeechPlus", GRANITE_PLUS_TEMPLATE, cat_hidden_layers=[1])


class VoxtralProcessor:
    "Voxtral's own, which reads clips from files, and renders answers only where a question follows"
    def __init__(self, folder):
        pytest.importorskip("mistral_common", reason="transformers renders Voxtral's conversations with mistral-common")
        self.own = hf.VoxtralProcessor(hf.AutoFeatureExtractor.from_pretrained(folder), hf.MistralCommonBackend.from_pretrained(folder))

    def apply_chat_template(self, messages, **kw):
        with TemporaryDirectory() as d:
            def part(p):
                if p["type"] == "text": return p
                path = f"{d}/{len(list(Path(d).iterdir()))}.wav"
                sf.write(path, p["audio"], 16000, subtype="FLOAT")
                return dict(type="audio", path=path)
            turns = [dict(role=m["role"], content=[part(p) for p in m["content"]]) for m in messages]
            answered = turns[-1]["role"] == "assistant"
            out = self.own.apply_chat_template([*turns, dict(role="user", content="?")] if answered else turns)
        end = (out["input_ids"][0] == 3).nonzero()[-1].item() if answered else None # [INST]
        return {k: v[:, :end] if k != "input_features" else v for k, v in out.items()}


def voxtral(seconds=30):
    "Its own processor's windows are of 30 s, whatever its files say"
    names = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]".split()
    names += "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]".split() + [f"<SPECIAL_{i}>" for i in range(20, 24)] + ["[AUDIO]", "[BEGIN_AUDIO]"] + [f"<SPECIAL_{i}>" for i in range(26, 34)] + ["[TRANSCRIBE]"] + [f"<SPECIAL_{i}>" for i in range(35, 40)]
    bytewise = [dict(rank=i, token_bytes=base64.b64encode(bytes([i])).decode(), token_str=None) for i in range(256)]
    tekken = dict(
        config=dict(pattern=r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+", num_vocab_tokens=256, default_vocab_size=296, default_num_special_tokens=40, version="v7"), vocab=bytewise,
        special_tokens=[dict(rank=i, token_str=n, is_control=True) for i, n in enumerate(names)],
        audio=dict(sampling_rate=16000, frame_rate=12.5, audio_encoding_config=dict(num_mel_bins=128, hop_length=160, window_size=400), chunk_length_s=float(seconds)))
    sizes = dict(num_mel_bins=128, max_source_positions=seconds * 50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    text = dict(model_type="llama", vocab_size=296, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
                bos_token_id=1, eos_token_id=2, pad_token_id=11)
    model = draw(hf.VoxtralForConditionalGeneration(hf.VoxtralConfig(audio_config=dict(model_type="voxtral_encoder", **sizes), text_config=text, audio_token_id=24)))
    return model, hf.WhisperFeatureExtractor(feature_size=128, chunk_length=seconds), TextFile("tekken.json", json.dumps(tekken))


# As transformers' tests/models/phi4_multimodal/test_processing_phi4_multimodal.py had it
PHI4_TEMPLATE = "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<|image|>' }}{% elif content['type'] == 'audio' %}{{ '<|audio|>' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% endif %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"


class Phi4Processor(hf.Phi4MultimodalProcessor):
    "Phi-4's own, without the part for pictures, which needs torchvision"
    def check_argument_for_proper_class(self, name, argument): return None if name == "image_processor" else super().check_argument_for_proper_class(name, argument)

    @classmethod
    def of(cls, folder):
        tok, extractor = hf.AutoTokenizer.from_pretrained(folder), hf.AutoFeatureExtractor.from_pretrained(folder)
        return cls(None, extractor, tok, chat_template=(Path(folder) / "chat_template.jinja").read_text())


def phi4():
    names = dict(audio_token="<|audio|>", image_token="<|image|>")
    tok = byte_tokenizer(eos_token="<|endoftext|>", pad_token="<|endoftext|>", extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", *names.values()], **names)
    tok.chat_template, ids = PHI4_TEMPLATE, {name: tok.convert_tokens_to_ids(token) for name, token in names.items()}
    audio = dict(hidden_size=32, intermediate_size=64, num_blocks=2, num_attention_heads=4, ext_pw_out_channel=32, depthwise_separable_out_channel=32, nemo_conv_channels=8, audio_token_id=ids["audio_token"])
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, crop_size=28, image_token_id=ids["image_token"])
    model = hf.Phi4MultimodalForCausalLM(hf.Phi4MultimodalConfig(audio_config=audio, vision_config=vision, **decoder(tok)))
    return draw(model), tok, hf.Phi4MultimodalFeatureExtractor()


@dataclass
class TextFile:
    "A file that is saved like a processor"
    name: str
    text: str
    def save_pretrained(self, folder): (Path(folder) / self.name).write_text(self.text)


KINDS = {
    "qwen2-audio": Kind(qwen2_audio, 961),
    "qwen2.5-omni": Kind(qwen_omni, 321, processor=OmniProcessor.of),
    "qwen3-omni": Kind(qwen3_omni, 201, step=160, edge=1, pads_alike=False, processor=Omni3Processor.of),
    "phi-4": Kind(phi4, 400, epochs=30, step=160, pads_alike=False, apart=False, end="<|end|>", processor=Phi4Processor.of, spectrograms=lambda features: np.moveaxis(features, 1, -1)),
    "audio-flamingo-3": Kind(audio_flamingo, 321, most_clips=1, longest=3 * SECONDS),
    "voxtral": Kind(voxtral, 1, most_clips=2, longest=31, system=False, end="</s>", shown=lambda text: text.rstrip(" "), processor=VoxtralProcessor, quick=lambda: voxtral(SECONDS)),
    "music-flamingo": Kind(music_flamingo, 321, most_clips=1, longest=3 * SECONDS),
    "glm-asr": Kind(glm_asr, 961, most_clips=1, longest=3 * SECONDS, end="<|user|>", added="<|user|>", shown=str.strip),
    "qwen3-asr": Kind(qwen3_asr, 8000, most_clips=1, longest=3 * SECONDS, prompts=False),
    "granite-speech": Kind(granite_speech, 257, epochs=30, longest=3 * SECONDS, system=False, end="<|end_of_text|>", apart=False, recomputes=False, processor=GraniteProcessor, spectrograms=unpaired),
    "granite-speech-plus": Kind(granite_speech_plus, 257, epochs=None, longest=3 * SECONDS, end="<|end_of_text|>", apart=False, recomputes=False, processor=GraniteProcessor, spectrograms=unpaired),
}
