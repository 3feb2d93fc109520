// $title
//
// Runs wherever WebAssembly does: pages, workers, AudioWorklets, node. Nothing leaves the machine; nothing is fetched but the file
// beside this one. Audio is mono, 16 kHz: Float32Array with full scale 1, or Int16Array.
//
//   const model = await load();                          // or load(bytes), where there is no fetch
//   model.predict(samples);                              // { arousal: 0.31, … }
//   const stream = model.stream({ window: 5, hop: 0.25 });
//   stream.push(samples);                                // as many as there are
//   stream.read();                                       // values of the last 5 s; null while it is too early
//
// In an AudioWorklet, which has no fetch: new Model(module), with a WebAssembly.Module from processorOptions.

const ERRORS = {
  [-3]: 'too few samples', [-4]: 'samples that are not finite',
  [-5]: 'the window has to be a multiple of the hop, and the hop at least a token', [-6]: 'not the state of such a stream',
};
const TOO_EARLY = -7, NORMALISATIONS = ['running', 'window'];

/** Load the model: from the file beside this module, a URL, bytes (ArrayBuffer, Uint8Array) or a WebAssembly.Module. */
export async function load(source = new URL('w2s_model.wasm', import.meta.url)) {
  if (source instanceof WebAssembly.Module) return new Model(source);
  if (typeof source === 'string' || source instanceof URL) {
    const url = new URL(source, import.meta.url);
    if (url.protocol === 'file:' && typeof process !== 'undefined') source = await (await import('node:fs/promises')).readFile(url);
    else {
      const response = await fetch(url);
      if (!response.ok) throw new Error(`cannot load $${url}: $${response.status} $${response.statusText}`);
      source = await response.arrayBuffer();
    }
  }
  return new Model(await WebAssembly.compile(source));
}

/** An instance of the module with its own memory, and room in it behind the code's own. */
class Memory {
  constructor(module) {
    this.calls = new WebAssembly.Instance(module).exports;
    this.calls.w2s_unpack();
    this.end = this.calls.__heap_base.value;
  }
  take(bytes) {
    const place = (this.end + 63) & ~63;
    this.end = place + bytes;
    const missing = this.end - this.calls.memory.buffer.byteLength;
    if (missing > 0) this.calls.memory.grow(Math.ceil(missing / 65536));
    return place;
  }
  bytes(place, count) { return new Uint8Array(this.calls.memory.buffer, place, count); }
  constant(which) { return this.calls.w2s_constant(which); }
  text(place) {
    const all = new Uint8Array(this.calls.memory.buffer, place), text = all.subarray(0, all.indexOf(0));
    return decodeURIComponent(Array.from(text, (byte) => '%' + byte.toString(16).padStart(2, '0')).join(''));
  }
  /** Copy samples in; returns the call's name and where they lie. */
  give(samples, place, name) {
    const type = samples instanceof Int16Array ? Int16Array : Float32Array;
    if (!(samples instanceof type)) throw new TypeError('expected samples as Float32Array or Int16Array');
    new type(this.calls.memory.buffer, place, samples.length).set(samples);
    return this.calls[type === Int16Array ? `$${name}_int16` : name];
  }
}

function check(code) {
  if (code) throw new RangeError(ERRORS[code] ?? `error $${code}`);
}

export class Model {
  constructor(module) {
    this.module = module;
    const memory = this.memory = new Memory(module);
    this.samplingRate = memory.constant(0);
    this.dimensions = Array.from({ length: memory.constant(1) }, (_, n) => memory.text(memory.constant(5 + n)));
    this.metadata = JSON.parse(memory.text(memory.constant(4)));
    this.work = memory.take(memory.constant(2));
    this.values = memory.take(4 * this.dimensions.length);
    this.base = memory.end;
  }
  /** The values of a whole recording. */
  predict(samples) {
    const memory = this.memory;
    memory.end = this.base; // one recording after the other
    const place = memory.take(4 * samples.length), run = memory.give(samples, place, 'w2s_predict');
    check(run(this.work, memory.constant(2), place, samples.length, this.values));
    return this.name(memory, this.values);
  }
  /** A stream of its own: window and hop in seconds; normalisation 'running' (cheap) or 'window' (as predict has it). */
  stream({ window = 5, hop = 0.25, normalisation = 'running' } = {}) { return new Stream(this, window, hop, normalisation); }
  name(memory, place) {
    const values = new Float32Array(memory.calls.memory.buffer, place, this.dimensions.length);
    return Object.fromEntries(this.dimensions.map((name, n) => [name, values[n]]));
  }
}

const PIECE = 4096; // samples that are pushed at once

class Stream {
  constructor(model, window, hop, normalisation) {
    const memory = this.memory = new Memory(model.module), mode = NORMALISATIONS.indexOf(normalisation);
    if (mode < 0) throw new TypeError(`normalisation is $${normalisation}, expected $${NORMALISATIONS.join(' or ')}`);
    const [samples, step] = [window, hop].map((seconds) => Math.round(seconds * model.samplingRate));
    this.model = model;
    this.size = memory.calls.w2s_stream_bytes(mode, samples, step);
    if (!this.size) check(-5);
    this.state = memory.take(this.size);
    this.scratchBytes = memory.constant(mode ? 2 : 3);
    this.scratch = memory.take(this.scratchBytes);
    this.values = memory.take(4 * model.dimensions.length);
    this.piece = memory.take(4 * PIECE);
    check(memory.calls.w2s_stream_init(this.state, this.size, mode, samples, step));
  }
  /** Push any number of samples; what is not finite counts as 0. */
  push(samples) {
    for (let at = 0; at < samples.length; at += PIECE) {
      const some = samples.subarray(at, at + PIECE), push = this.memory.give(some, this.piece, 'w2s_stream_push');
      const code = push(this.state, this.scratch, this.scratchBytes, this.piece, some.length);
      if (code !== -4) check(code);
    }
  }
  /** The values now, or null while it is too early. */
  read() {
    const code = this.memory.calls.w2s_stream_read(this.state, this.scratch, this.scratchBytes, this.values);
    if (code === TOO_EARLY) return null;
    check(code);
    return this.model.name(this.memory, this.values);
  }
  reset() { check(this.memory.calls.w2s_stream_reset(this.state)); }
  /** The whole state, as bytes, which restore takes back: here, or in another stream of the same model and settings. */
  save() { return this.memory.bytes(this.state, this.size).slice(); }
  restore(bytes) {
    if (bytes.length !== this.size) check(-6);
    this.memory.bytes(this.state, this.size).set(bytes);
  }
}
