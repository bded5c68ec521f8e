"""The baseline of the row `sample-135m-1-q8` of `benches/speed.py`: llama.cpp on Q8_0 blocks, by llama-cpp-python.

    python benches/speed_llama_cpp.py '{"model": "inputs/135m-q8_0.gguf", "data": "inputs/prompts-4.parquet", "threads": 2, ...}'

Prints versions and the result as lines of JSON, as `benches/speed_trl.py` does. A step is a prompt and its answer.
"""

import json
import sys
import time

import llama_cpp
import pyarrow.parquet as pq


def main(given):
    spec = json.loads(given)
    print(json.dumps({"versions": {"llama_cpp_python": llama_cpp.__version__, "python": sys.version.split()[0]}}), flush=True)
    prompts = [row["prompt"] for row in pq.read_table(spec["data"]).to_pylist()]
    length = spec["response_length"]
    model = llama_cpp.Llama(spec["model"], n_ctx=1024, n_batch=512, n_threads=spec["threads"], n_threads_batch=spec["threads"], seed=0, verbose=False)
    seconds = []
    for step in range(spec["steps"]):
        # As many tokens as our program gets of the same text, wherever llama.cpp's pieces end.
        tokens = model.tokenize(prompts[step % len(prompts)].encode(), add_bos=False)[:spec["prompt_length"]]
        started = time.perf_counter()
        model.reset()
        answer = model.generate(tokens, temp=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
        for _ in range(length):
            next(answer)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "tokens": length, "numbers": "Q8_0", "layout": "", "gave_up": False}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
