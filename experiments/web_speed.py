"""A model's files in onnxruntime-web, the WebAssembly build of onnxruntime that browsers run, beside onnxruntime here.

Claim: every kind of ONNX file that ``w2s export`` writes runs in a browser as it is, with the values that it has elsewhere; the
kind ``wasm``, without onnxruntime-web, takes at most 0.6 of the time of ``fp32`` in it (``--against model/model.onnx``).

    python experiments/web_speed.py model --audio speech.wav --against peer.onnx

Needs node and npm, which fetches onnxruntime-web (150 MB) into ``--packages``. Node runs the same WebAssembly as a browser, on
one thread; what a browser adds (fetching, decoding, its own load) is not in the figures.

Results: experiments/README.md, "Exports".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from w2s_jax import audio
from w2s_jax.kinds import FILES, MODULE
from w2s_jax.runtime import Predictor
from w2s_jax.runtime.predictor import CARRIED, SIGNAL, ChunkRunner, is_chunked, open_session

#: Reads the plan (a list of files and what they are fed), runs all of them in turn, and prints times and outputs.
SCRIPT = """
import fs from 'fs';
import { createRequire } from 'module';
import { pathToFileURL } from 'url';
const [packages, plan, runs] = process.argv.slice(2);
const found = createRequire(packages + '/').resolve('onnxruntime-web');
const ort = await import(pathToFileURL(found)).then((module) => module.default ?? module);
ort.env.wasm.numThreads = 1;
const floats = (values, shape) => new ort.Tensor('float32', Float32Array.from(values), shape);
const models = [];
for (const { file, pieces, module } of JSON.parse(fs.readFileSync(plan))) {
  if (module) {
    const model = await import(pathToFileURL(module)).then(({ load }) => load());
    const signal = Float32Array.from(pieces[0].signal);
    models.push({ feeds: [], times: [], logits: null, predict: () => Object.values(model.predict(signal)) });
    continue;
  }
  const session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(file)), { executionProviders: ['wasm'] });
  const feeds = pieces.map(({ signal, state, bounds }) => {
    const feed = { signal: floats(signal, [1, signal.length]) };
    if (!state) return feed;
    const [first, last] = bounds.map((at) => new ort.Tensor('int64', BigInt64Array.of(BigInt(at)), [1]));
    return { ...feed, state: floats(state.flat(), [state.length, state[0].length]), first, last };
  });
  models.push({ session, feeds, times: [], logits: null });
}
for (let run = 0; run <= +runs; run++) {
  for (const model of models) {
    const began = performance.now();
    let state;
    if (model.predict) model.logits = model.predict();
    for (const feed of model.feeds) {
      const output = await model.session.run(state ? { ...feed, state } : feed);
      state = output.next;
      model.logits = Array.from(output[model.session.outputNames[0]].data);
    }
    if (run) model.times.push(performance.now() - began);
  }
}
console.log(JSON.stringify({ version: ort.env.versions.web, models: models.map(({ times, logits }) => ({ times, logits })) }));
"""


def fed(file: Path, wave: np.ndarray) -> tuple[list[dict], np.ndarray]:
    """What a file is fed, as JSON, and what it says here, [D]."""
    if file.is_dir():  # the kind wasm
        return [{"signal": wave.tolist()}], np.array(list(Predictor(file)(wave).values()))
    session, path = open_session(file)
    name, *others = (end.name for end in session.get_inputs())
    if not is_chunked([name, *others]):
        return [{"signal": wave.tolist()}], session.run(None, {name: wave[None]})[0][0]
    pieces = ChunkRunner(session, path)
    state, *bounds = CARRIED
    feeds = [
        {"signal": feed[SIGNAL][0].tolist(), "state": feed[state].tolist(), "bounds": [int(feed[bound][0]) for bound in bounds]}
        for feed in pieces.feeds(wave)
    ]
    return feeds, pieces(wave)[0]


def measure(files: list[Path], wave: np.ndarray, packages: Path, runs: int) -> tuple[str, list[dict]]:
    """onnxruntime-web's version, and for each file: times in ms, and the largest difference from onnxruntime here."""
    found = [fed(file, wave) for file in files]
    with tempfile.TemporaryDirectory() as place:
        script, plan = Path(place, "run.mjs"), Path(place, "plan.json")
        script.write_text(SCRIPT)
        plan.write_text(
            json.dumps(
                [
                    {"file": str(file), "pieces": pieces, "module": str((file / MODULE).resolve()) if file.is_dir() else None}
                    for file, (pieces, _) in zip(files, found, strict=True)
                ]
            )
        )
        command = ["node", str(script), str(packages.resolve()), str(plan), str(runs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    rows = [
        {"times": row["times"], "difference": float(np.abs(np.array(row["logits"]) - here).max())}
        for row, (_, here) in zip(result["models"], found, strict=True)
    ]
    return result["version"], rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--audio", type=Path, help="a recording; its first 5 s are used; default: noise")
    parser.add_argument("--against", type=Path, help="another .onnx file of one waveform, for 5 s")
    parser.add_argument("--packages", type=Path, default=Path("runs/web"), help="where npm puts onnxruntime-web")
    parser.add_argument("--runs", type=int, default=30)
    arguments = parser.parse_args()
    arguments.packages.mkdir(parents=True, exist_ok=True)
    if not (arguments.packages / "node_modules" / "onnxruntime-web").is_dir():
        subprocess.run(["npm", "install", "--silent", "--prefix", str(arguments.packages), "onnxruntime-web"], check=True)
    wave = np.random.default_rng(0).standard_normal(80_000).astype(np.float32)
    if arguments.audio:
        wave = np.resize(audio.load(arguments.audio), 80_000)
    files = [arguments.model / name for name in FILES.values() if name.endswith(".onnx") or name == FILES["wasm"]]
    files = [file for file in files if file.exists()] + ([arguments.against] if arguments.against else [])
    version, rows = measure(files, wave, arguments.packages, arguments.runs)
    print(f"onnxruntime-web {version}, one thread, {os.cpu_count()} cores, {arguments.runs} runs in turn\n")
    print("| file | ms, median | ratio | largest difference from onnxruntime |\n|---|---|---|---|")
    for file, row in zip(files, rows, strict=True):
        ratio = f"{np.median(np.divide(row['times'], rows[-1]['times'])):.2f}" if arguments.against else "–"
        print(f"| {file.name} | {np.median(row['times']):.1f} | {ratio} | {row['difference']:.1e} |")
