"""Answer a table with Ray Data: actors hold the model, each on one GPU, and Ray sends them batches of rows.

    python examples/ray_infer.py data/test.csv runs/answers runs/lora_audio/final --actors 8

The answers are Parquet files in a folder; `reason` says why a row has none. Paths of clips are absolute, or addresses.
Unlike `mdl_infer`, a run that is interrupted starts again. Use it where the rows come from a pipeline of Ray, or go on to one.
"""
import argparse

import ray

from mdl_nbdev import InferSettings


class Answerer:
    "An actor: the model stays loaded between batches"
    def __init__(self, settings):
        from mdl_nbdev.infer.identity import prompts_of_training, with_training_prompts
        from mdl_nbdev.infer.run import Pipeline
        from mdl_nbdev.model.vllm import choose_engine
        settings = with_training_prompts(settings, prompts_of_training(settings))
        self.pipeline = Pipeline(choose_engine(settings, None), settings)

    def __call__(self, batch): # Column -> values
        from mdl_nbdev.data.rows import Row
        from mdl_nbdev.infer.run import PromptedRow
        prompts = batch.get("user_prompt", [None]*len(batch["audio"]))
        rows = [Row(audio, None, prompt, None, "a batch", i, ()) for i, (audio, prompt) in enumerate(zip(batch["audio"], prompts))]
        shards = self.pipeline.run([[PromptedRow(row) for row in rows]])
        answered = sorted((row for shard in shards for row in shard), key=lambda answer: answer.row.line)
        return batch | dict(prediction=[a.prediction for a in answered], reason=[a.reason or "" for a in answered])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="CSV or Parquet file with the columns audio and, perhaps, user_prompt")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--actors", type=int, default=1, help="number of models that are loaded")
    parser.add_argument("--gpus", type=float, default=1, help="GPUs of each actor")
    parser.add_argument("--engine", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()
    settings = InferSettings(input=args.input, output=args.output, model_name=args.model, engine=args.engine, max_new_tokens=args.max_new_tokens)
    read = ray.data.read_parquet if args.input.endswith(".parquet") else ray.data.read_csv
    answers = read(args.input).map_batches(Answerer, fn_constructor_args=[settings], batch_size=256, concurrency=args.actors, num_gpus=args.gpus)
    answers.write_parquet(args.output)


if __name__ == "__main__": main()
