"""What the C engine costs: time beside other files, a hop of a stream beside its window, and instructions of a second of audio.

    python experiments/c_speed.py time model peer.onnx        # in turn with another file, in onnxruntime, one thread
    python experiments/c_speed.py stream model                # a hop of 0.25 s, and the window of 5 s anew
    python experiments/c_speed.py count model    # callgrind's instructions of one second of noise

The counts repeat exactly, on a busy machine too; they are of AVX2, which valgrind knows. A model directory needs
the kinds c and c-int8. Results: experiments/README.md, "Exports".
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from w2s_jax import machine
from w2s_jax.kinds import FILES
from w2s_jax.measure import measure
from w2s_jax.runtime import Predictor
from w2s_jax.runtime.c import compiler

KINDS = ("c", "c-int8")
#: One second as a whole and as a stream; callgrind counts what is between the two marks.
COUNTED = """
#include <stdlib.h>
#include "w2s_model.h"
static float samples[W2S_SAMPLING_RATE], memory[W2S_PREDICT_BYTES / 4 + 1], scratch[W2S_SCRATCH_BYTES / 4 + 1];
static float stream[W2S_STREAM_BYTES(80000, 4000) / 4 + 1];
int main(int count, char **arguments)
{
    float values[W2S_DIMENSIONS];
    uint32_t random = 1;
    (void)arguments;
    for (int i = 0; i < W2S_SAMPLING_RATE; i++)
        samples[i] = (float)(int32_t)(random = random * 1664525u + 1013904223u) / 2147483648.0f;
    if (count == 1)
        return 0;
    if (count == 2)
        return w2s_predict(memory, sizeof memory, samples, W2S_SAMPLING_RATE, values);
    w2s_stream_init(stream, sizeof stream, W2S_RUNNING, 80000, 4000);
    for (int hop = 0; hop < 4; hop++) {
        w2s_stream_push(stream, scratch, sizeof scratch, samples + hop * 4000, 4000);
        w2s_stream_read(stream, scratch, sizeof scratch, values);
    }
    return 0;
}
"""


def count(directory: Path, flags: tuple[str, ...] = ("-mavx2", "-mfma")) -> dict[str, int]:
    """Instructions of one second of audio: ``whole``, and ``stream`` with a reading every 0.25 s."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "counted.c").write_text(COUNTED)
        program = Path(place) / "counted"
        sources = [Path(place) / "counted.c", directory / "w2s_model.c"]
        command = [*compiler(), "-std=gnu99", "-O3", "-fno-math-errno", *flags, "-I", directory, *sources, "-lm", "-o", program]
        subprocess.run(command, check=True)
        totals = []
        for arguments in ([], ["whole"], ["as", "stream"]):
            tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, *arguments]
            said = subprocess.run(tool, check=True, capture_output=True, text=True).stderr
            totals.append(int(re.search(r"Collected : (\d+)", said)[1]))
        return {"whole": totals[1] - totals[0], "stream": totals[2] - totals[0]}


def time_stream(directory: Path, kind: str, window: float = 5.0, hop: float = 0.25, runs: int = 60) -> dict[str, float]:
    """Milliseconds of a hop, with a reading, of a running stream, and of its window anew; in turn, medians."""
    predictor = Predictor(directory, kind=kind)
    noise = np.random.default_rng(0).normal(size=round((window + hop * runs) * predictor.sampling_rate)).astype(np.float32)
    streams = [predictor.stream(window, hop, normalisation) for normalisation in ("running", "window")]
    size, step = streams[0].window, streams[0].hop
    for stream in streams:
        stream.push(noise[:size])
    times: list[list[float]] = [[], []]
    for run in range(runs):
        for stream, spent in zip(streams, times, strict=True):
            began = time.perf_counter()
            stream.push(noise[size + run * step : size + (run + 1) * step])
            stream.read()
            spent.append(1000 * (time.perf_counter() - began))
    hop_time, window_time = map(statistics.median, times)
    ratio = statistics.median(one / other for one, other in zip(*times, strict=True))
    return {"hop": round(hop_time, 4), "window": round(window_time, 3), "ratio": round(ratio, 4)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "stream", "count"))
    parser.add_argument("model", type=Path, help="a model directory with the kinds c and c-int8")
    parser.add_argument("against", type=Path, nargs="?", help="another ONNX file, for time")
    parser.add_argument("--runs", type=int, default=60)
    arguments = parser.parse_args()
    there = [kind for kind in KINDS if (arguments.model / FILES[kind]).is_dir()]
    print(machine.describe())
    if arguments.what == "time":
        files = {kind: arguments.model / FILES[kind] for kind in there}
        figures = measure(files, 5.0, arguments.runs, 1, memory=False, against=arguments.against)
        for kind in there:
            print(kind, json.dumps({key: figures[kind].get(key) for key in ("milliseconds", "p95_milliseconds", "ratio")}))
    else:
        for kind in there:
            result = count(arguments.model / FILES[kind]) if arguments.what == "count" else time_stream(arguments.model, kind)
            print(kind, json.dumps(result))
