"Qwen2-Audio in the commands: what they train answers without this package as with it, on one process and on several"
import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from audio_families import KINDS
from test_launchers import near, together

from mdl_nbdev import InferSettings, TrainSettings, infer, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return KINDS["qwen2-audio"].save(tmp_path_factory.mktemp("qwen"))


LOAD = """
import json, sys, numpy as np, torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
model, processor = AutoModelForMultimodalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval(), AutoProcessor.from_pretrained(sys.argv[1])
import soundfile as sf
out = []
for path in sys.argv[2:]:
    messages = [{"role": "user", "content": [{"type": "audio", "audio": sf.read(path, dtype="float32")[0]}, {"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    out.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
assert not any(m.startswith("mdl_nbdev") for m in sys.modules)
print(json.dumps(out))
"""


def test_the_result_needs_transformers_alone(folder, tmp_path):
    "Trained by the command's own function, merged, loaded by transformers in a process of its own: the same answers as mdl_infer's"
    with open(tmp_path / "rows.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["audio", "user_prompt", "prediction"])
        for i in range(16):
            t = np.arange(8000) / 16000
            sf.write(tmp_path / f"{i}.wav", .3 * np.sin(2 * np.pi * (300, 2500)[i % 2] * t), 16000)
            rows.writerow([f"{i}.wav", "What is it?", ("low", "high")[i % 2]])
    run = train(TrainSettings(train_dataset=tmp_path / "rows.csv", base_dir=tmp_path, output=tmp_path / "run", model_name=str(folder), lr=5e-3, num_epochs=12, batch_size=8, bf16=False))
    assert run.last("loss") < .1
    answers = infer(InferSettings(input=tmp_path / "rows.csv", base_dir=tmp_path, output=tmp_path / "answers.csv", model_name=str(run.final), max_new_tokens=8, bf16=False))
    ours = [r["prediction"] for r in csv.DictReader(open(answers.output))]
    r = subprocess.run([sys.executable, "-c", LOAD, str(run.final), *(str(tmp_path / f"{i}.wav") for i in range(4))], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout.splitlines()[-1]) == ours[:4] == ["low", "high"] * 2


@pytest.mark.parametrize("name", ["qwen2-audio", pytest.param("tiny", marks=pytest.mark.slow)])
def test_processes_that_have_no_clips(folder, tmp_path, name):
    "Of two processes, one often has only texts: it goes through the encoder like the other, and the run is that of one process"
    rng = np.random.default_rng(0)
    for i in range(6): sf.write(tmp_path / f"{i}.wav", rng.normal(0, .1, 8000), 16000)
    rows = [{"audio": f"{tmp_path}/{i}.wav", "prompt": "what", "answer": "noise"} for i in range(6)] + [{"prompt": f"say {i}", "answer": f"{i}" * 20} for i in range(18)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["--train-dataset", tmp_path / "rows.jsonl", "--model-name", folder if name == "qwen2-audio" else name, "--train-target", "encoder,projector,decoder",
               "--lr", 1e-4, "--max-steps", 8, "--logging-steps", 1, "--sample-answers", 0]
    together([*command, "--batch-size", 2, "--output", tmp_path / "one"], tmp_path)
    together([*command, "--batch-size", 1, "--output", tmp_path / "two"], tmp_path, 2)
    near(tmp_path / "one", tmp_path / "two", "loss", "grad_norm")
