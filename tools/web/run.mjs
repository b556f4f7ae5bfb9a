// Runs a model in onnxruntime-web (wasm) under Node: node run.mjs MODEL.onnx FEEDS.json [REPEATS]
//
// FEEDS.json: {"input": {"type": "int64", "dims": [1, 8], "data": [...]}}.
// Prints one JSON document: {"outputs": {name: {dims, data}}, "load_ms", "run_ms": median of REPEATS runs}.
import { existsSync, readFileSync } from "node:fs";
import { basename } from "node:path";
import * as ort from "onnxruntime-web/wasm";

const [modelPath, feedsPath, repeats = "1"] = process.argv.slice(2);
if (feedsPath === undefined) {
  console.error("usage: node run.mjs MODEL.onnx FEEDS.json [REPEATS]");
  process.exit(2);
}

ort.env.wasm.numThreads = 1;
const arrays = { int64: BigInt64Array, int32: Int32Array, float32: Float32Array };
const feeds = {};
for (const [name, { type, dims, data }] of Object.entries(JSON.parse(readFileSync(feedsPath, "utf8")))) {
  const values = type === "int64" ? data.map(BigInt) : data;
  feeds[name] = new ort.Tensor(type, arrays[type].from(values), dims);
}

const dataPath = `${modelPath}.data`;
const externalData = existsSync(dataPath) ? [{ path: basename(dataPath), data: readFileSync(dataPath) }] : [];
const begin = performance.now();
const session = await ort.InferenceSession.create(readFileSync(modelPath), {
  executionProviders: ["wasm"],
  externalData,
  logSeverityLevel: 3,
});
const loaded = performance.now();

let outputs;
const times = [];
for (let i = 0; i < Number(repeats); i++) {
  const start = performance.now();
  outputs = await session.run(feeds);
  times.push(performance.now() - start);
}
times.sort((a, b) => a - b);

const plain = {};
for (const [name, tensor] of Object.entries(outputs)) {
  plain[name] = { dims: tensor.dims, data: Array.from(tensor.data, Number) };
}
console.log(JSON.stringify({ outputs: plain, load_ms: loaded - begin, run_ms: times[times.length >> 1] }));
