"Audio language models of transformers, built small at random from their own classes: a row for each family"
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

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
            if p.ndim > 1 and "embed_positions" not in name: p.normal_(0, (2 if "lm_head" in name else 1) / p[0].numel()**.5, generator=g)
    return model.eval()


@dataclass
class Kind:
    "How the tests make a family's model"
    build: Callable # gives a model and what has its processor's `save_pretrained`
    shortest: int # samples of the shortest clip that its processor takes as it is
    most_clips: int = 9 # in one conversation
    longest: int = SECONDS # of its clips
    system: bool = True # whether its template has a system prompt
    end: str = "<|im_end|>" # of an answer
    shown: Callable = str # what its template shows of an answer
    processor: Callable = hf.AutoProcessor.from_pretrained # its own, from a folder

    def save(self, folder):
        for saved in self.build(): saved.save_pretrained(folder)
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


class OmniProcessor(hf.Qwen2_5OmniProcessor):
    "Qwen2.5-Omni's own, without the part for films, which needs torchvision"
    def check_argument_for_proper_class(self, name, argument): return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    @classmethod
    def of(cls, folder):
        tok, extractor = hf.AutoTokenizer.from_pretrained(folder), hf.AutoFeatureExtractor.from_pretrained(folder)
        return cls(hf.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(), None, extractor, tok, chat_template=(Path(folder) / "chat_template.jinja").read_text())


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


def voxtral():
    names = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]".split()
    names += "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]".split() + [f"<SPECIAL_{i}>" for i in range(20, 24)] + ["[AUDIO]", "[BEGIN_AUDIO]"] + [f"<SPECIAL_{i}>" for i in range(26, 34)] + ["[TRANSCRIBE]"] + [f"<SPECIAL_{i}>" for i in range(35, 40)]
    bytewise = [dict(rank=i, token_bytes=base64.b64encode(bytes([i])).decode(), token_str=None) for i in range(256)]
    tekken = dict(
        config=dict(pattern=r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+", num_vocab_tokens=256, default_vocab_size=296, default_num_special_tokens=40, version="v7"), vocab=bytewise,
        special_tokens=[dict(rank=i, token_str=n, is_control=True) for i, n in enumerate(names)],
        audio=dict(sampling_rate=16000, frame_rate=12.5, audio_encoding_config=dict(num_mel_bins=128, hop_length=160, window_size=400), chunk_length_s=30.))
    sizes = dict(num_mel_bins=128, max_source_positions=1500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    text = dict(model_type="llama", vocab_size=296, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
                bos_token_id=1, eos_token_id=2, pad_token_id=11)
    model = draw(hf.VoxtralForConditionalGeneration(hf.VoxtralConfig(audio_config=dict(model_type="voxtral_encoder", **sizes), text_config=text, audio_token_id=24)))
    return model, hf.WhisperFeatureExtractor(feature_size=128), TextFile("tekken.json", json.dumps(tekken))


@dataclass
class TextFile:
    "A file that is saved like a processor"
    name: str
    text: str
    def save_pretrained(self, folder): (Path(folder) / self.name).write_text(self.text)


KINDS = {
    "qwen2-audio": Kind(qwen2_audio, 961),
    "qwen2.5-omni": Kind(qwen_omni, 321, processor=OmniProcessor.of),
    "audio-flamingo-3": Kind(audio_flamingo, 321, most_clips=1, longest=3 * SECONDS),
    "voxtral": Kind(voxtral, 1, most_clips=2, longest=31, system=False, end="</s>", shown=lambda text: text.rstrip(" "), processor=VoxtralProcessor),
    "music-flamingo": Kind(music_flamingo, 321, most_clips=1, longest=3 * SECONDS),
}
