"""MiDashengLM once more, slowly: float64, one clip and one row at a time, no batching, no masks, nothing taken from the package.

It reads a state dict and plain dictionaries, and follows the description of the network step by step."""
import math

import torch


def mel_filters(n_mels=64, n_fft=512, rate=16000, f_max=8000):
    "Triangles between neighbouring points that are equally far apart on the HTK mel scale"
    def to_mel(f): return 2595*math.log10(1 + f/700)
    points = [700*(10**(to_mel(f_max)*i/(n_mels + 1)/2595) - 1) for i in range(n_mels + 2)]
    out = torch.zeros(n_mels, n_fft//2 + 1, dtype=torch.float64)
    for m in range(n_mels):
        low, mid, high = points[m:m+3]
        for b in range(n_fft//2 + 1):
            f = b*rate/n_fft
            out[m, b] = max(0., min((f - low)/(mid - low), (high - f)/(high - mid)))
    return out


def log_mel(clip):
    "A clip [samples] to decibels [64, 1 + samples//160], by an explicit Fourier matrix"
    x = clip.double()
    n = len(x)
    turns = torch.outer(torch.arange(257), torch.arange(512)).double()*2*math.pi/512
    window = 0.5 - 0.5*torch.cos(2*math.pi*torch.arange(512).double()/512)
    index = (160*torch.arange(1 + n//160)[:, None] - 256 + torch.arange(512)).abs()
    index = torch.where(index < n, index, 2*(n - 1) - index)
    frames = x[index]*window
    power = (frames @ turns.cos().T)**2 + (frames @ turns.sin().T)**2
    db = 10*torch.log10((power @ mel_filters().T).clamp(min=1e-10)).T
    return torch.maximum(db, db.max() - 120)


def linear(sd, name, x):
    y = x @ sd[f"{name}.weight"].T
    return y + sd[f"{name}.bias"] if f"{name}.bias" in sd else y


def layer_norm(sd, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean)/(var + 1e-6).sqrt()*sd[f"{name}.weight"] + sd[f"{name}.bias"]


def gelu(x): return 0.5*x*(1 + torch.erf(x/math.sqrt(2)))


def attend(q, k, v, allowed):
    "One head: q [n, d], k and v [m, d], allowed [n, m]"
    scores = q @ k.T/math.sqrt(q.shape[1])
    weights = torch.where(allowed, (scores - scores.max()).exp(), torch.zeros((), dtype=torch.float64))
    return weights/weights.sum(1, keepdim=True) @ v


def encoder_block(sd, name, x, heads, keys):
    "One block over the patches of one chunk, of which the first `keys` may be attended to"
    d = x.shape[1]//heads
    qkv = linear(sd, f"{name}.attn.qkv", layer_norm(sd, f"{name}.norm1", x))
    q, k, v = qkv.chunk(3, dim=1)
    allowed = (torch.arange(len(x)) < keys)[None].expand(len(x), -1)
    out = torch.cat([attend(q[:, i:i+d], k[:, i:i+d], v[:, i:i+d], allowed) for i in range(0, heads*d, d)], dim=1)
    x = x + linear(sd, f"{name}.attn.proj", out)*sd.get(f"{name}.ls1.gamma", 1.)
    h = linear(sd, f"{name}.mlp.fc2", gelu(linear(sd, f"{name}.mlp.fc1", layer_norm(sd, f"{name}.norm2", x))))
    return x + h*sd.get(f"{name}.ls2.gamma", 1.)


def encode_clip(sd, audio, clip):
    "The audio tokens of one clip, [tokens, hidden]"
    if len(clip) < 3200: clip = torch.cat([clip, torch.zeros(3200 - len(clip), dtype=clip.dtype)])
    mel, bn = log_mel(clip), {k: sd[f"audio_encoder.init_bn.{k}"][:, None] for k in ("weight", "bias", "running_mean", "running_var")}
    mel = (mel - bn["running_mean"])/(bn["running_var"] + 1e-5).sqrt()*bn["weight"] + bn["bias"]
    kernel, bias = sd["audio_encoder.patch_embed.proj.weight"][:, 0], sd["audio_encoder.patch_embed.proj.bias"]
    n_patches, valid = mel.shape[1]//4, len(clip)//640
    chunks = []
    for start in range(0, n_patches, 252):
        width = min(252, n_patches - start)
        x = torch.stack([(kernel*mel[:, 4*p:4*p + 4]).sum((1, 2)) + bias for p in range(start, start + width)])
        x = x + sd["audio_encoder.time_pos_embed"][0, :, 0, :width].T + sd["audio_encoder.freq_pos_embed"][0, :, 0, 0]
        for i in range(audio["depth"]):
            x = encoder_block(sd, f"audio_encoder.blocks.{i}", x, audio["num_heads"], max(1, min(width, valid - start)))
        chunks.append(layer_norm(sd, "audio_encoder.norm", x))
    x = torch.cat(chunks)
    tokens = max(1, (1 + len(clip)//160)//4//5)
    folded = torch.stack([torch.cat([x[5*t + j] for j in range(5)]) for t in range(tokens)])
    return linear(sd, "audio_projector.net.2", gelu(linear(sd, "audio_projector.net.0", folded)))


def rms_norm(weight, x): return x/((x*x).mean(-1, keepdim=True) + 1e-6).sqrt()*weight


def rotate(x, positions, theta):
    "Rotary embedding of one head, x [n, d]: feature i turns together with feature i + d/2"
    half = x.shape[1]//2
    angle = torch.outer(positions.double(), theta**(-torch.arange(half).double()/half))
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a*angle.cos() - b*angle.sin(), b*angle.cos() + a*angle.sin()], dim=1)


def decoder_layer(sd, name, x, text):
    heads, kv_heads, theta = text["num_attention_heads"], text["num_key_value_heads"], text["rope_theta"]
    h = rms_norm(sd[f"{name}.input_layernorm.weight"], x)
    q, k, v = (linear(sd, f"{name}.self_attn.{c}_proj", h) for c in "qkv")
    d, positions, outs = q.shape[1]//heads, torch.arange(len(x)), []
    causal = positions[:, None] >= positions
    def head(y, i, norm):
        y = y[:, i*d:i*d + d]
        if f"{name}.self_attn.{norm}.weight" in sd: y = rms_norm(sd[f"{name}.self_attn.{norm}.weight"], y)
        return rotate(y, positions, theta)
    for i in range(heads):
        j = i*kv_heads//heads
        outs.append(attend(head(q, i, "q_norm"), head(k, j, "k_norm"), v[:, j*d:j*d + d], causal))
    x = x + linear(sd, f"{name}.self_attn.o_proj", torch.cat(outs, dim=1))
    h = rms_norm(sd[f"{name}.post_attention_layernorm.weight"], x)
    gate = linear(sd, f"{name}.mlp.gate_proj", h)
    return x + linear(sd, f"{name}.mlp.down_proj", gate*torch.sigmoid(gate)*linear(sd, f"{name}.mlp.up_proj", h))


def logits(sd, audio, text, audio_token_id, ids, clips):
    "Logits of one row [positions, vocabulary]: `ids` without padding, `clips` in the order of their audio tokens"
    sd = {k: v.double() for k, v in sd.items()}
    x = sd["decoder.model.embed_tokens.weight"][torch.tensor(ids)].clone()
    vectors = [v for c in clips for v in encode_clip(sd, audio, c)]
    places = [i for i, t in enumerate(ids) if t == audio_token_id]
    assert len(places) == len(vectors)
    for i, v in zip(places, vectors): x[i] = v
    for i in range(text["num_hidden_layers"]): x = decoder_layer(sd, f"decoder.model.layers.{i}", x, text)
    x = rms_norm(sd["decoder.model.norm.weight"], x)
    return x @ sd.get("decoder.lm_head.weight", sd["decoder.model.embed_tokens.weight"]).T
