// What is in an upload: zip files and NumPy arrays, read and written in the browser, and the pictures in them. So an upload
// shows its own pictures, and files that cannot be used can be left out, without asking the gateway for anything.

const LOCAL = 0x04034b50, CENTRAL = 0x02014b50, END = 0x06054b50;
const STORED = 0, DEFLATED = 8;
const UTF8 = 0x800; // general purpose flag: the name is UTF-8
const LONGEST_END = 22 + 0xffff; // the end record with the longest comment

let table;

/** CRC-32 of bytes, as zip files have it. */
function crc32(bytes) {
  table ??= Uint32Array.from({ length: 256 }, (_, at) => {
    for (let bit = 0; bit < 8; bit++) at = at & 1 ? (at >>> 1) ^ 0xedb88320 : at >>> 1;
    return at;
  });
  let crc = ~0;
  for (const byte of bytes) crc = table[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/**
 * The entries of a zip: [{name, method, crc, size, packed, data() → Promise<Uint8Array> as packed, bytes() → unpacked}].
 * Throws if this is no zip, or one of more than 4 GB, which uploads never are.
 */
async function readZip(blob) {
  const tail = new DataView(await blob.slice(Math.max(0, blob.size - LONGEST_END)).arrayBuffer());
  let at = tail.byteLength - 22;
  while (at >= 0 && tail.getUint32(at, true) !== END) at--;
  if (at < 0) throw new Error("not a zip file");
  const [count, size, start] = [tail.getUint16(at + 10, true), tail.getUint32(at + 12, true), tail.getUint32(at + 16, true)];
  const directory = await blob.slice(start, start + size).arrayBuffer();
  const view = new DataView(directory);
  const entries = [];
  for (let index = 0, place = 0; index < count && view.getUint32(place, true) === CENTRAL; index++) {
    const lengths = [28, 30, 32].map((offset) => view.getUint16(place + offset, true));
    const name = new TextDecoder().decode(new Uint8Array(directory, place + 46, lengths[0]));
    const [crc, packed, unpacked] = [16, 20, 24].map((offset) => view.getUint32(place + offset, true));
    const entry = { name, method: view.getUint16(place + 10, true), crc, packed, size: unpacked };
    const header = view.getUint32(place + 42, true);
    entry.data = () => content(blob, header, packed);
    entry.bytes = async () => (entry.method === DEFLATED ? inflate(await entry.data()) : entry.data());
    if (!name.endsWith("/")) entries.push(entry);
    place += 46 + lengths[0] + lengths[1] + lengths[2];
  }
  return entries;
}

async function content(blob, header, packed) {
  const lengths = new DataView(await blob.slice(header + 26, header + 30).arrayBuffer());
  const start = header + 30 + lengths.getUint16(0, true) + lengths.getUint16(2, true);
  return new Uint8Array(await blob.slice(start, start + packed).arrayBuffer());
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Entries for `writeZip` of [{name, file}]: images are compressed already, so they are stored as they are. */
export function entriesOf(files) {
  return files.map(({ name, file }) => {
    const data = async () => new Uint8Array(await file.arrayBuffer());
    return { name, method: STORED, size: file.size, packed: file.size, data, bytes: data };
  });
}

/** A zip of entries, whose packed bytes are taken over as they are. */
export async function writeZip(entries) {
  const parts = [], directory = [];
  let offset = 0;
  for (const entry of entries) {
    const data = await entry.data(), name = new TextEncoder().encode(entry.name);
    const crc = entry.crc ?? crc32(data);
    const shared = [20, UTF8, entry.method, 0, 0x21]; // version, flags, method, time, date: 1 January 1980
    const head = record(LOCAL, shared, [crc, data.length, entry.size], [name.length, 0]);
    const central = record(CENTRAL, [20, ...shared], [crc, data.length, entry.size], [name.length, 0, 0, 0, 0], [0, offset]);
    parts.push(head, name, data);
    directory.push(central, name);
    offset += head.length + name.length + data.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = record(END, [0, 0, entries.length, entries.length], [size, offset], [0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** A signature, then groups of 16-bit and 32-bit numbers in turn. */
function record(signature, ...groups) {
  const bytes = [];
  const push = (value, width) => { for (let at = 0; at < width; at++) bytes.push((value >>> (8 * at)) & 0xff); };
  push(signature, 4);
  groups.forEach((group, at) => group.forEach((value) => push(value, at % 2 ? 4 : 2)));
  return Uint8Array.from(bytes);
}

const KINDS = {
  u1: Uint8Array, i1: Int8Array, u2: Uint16Array, i2: Int16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array,
  f8: Float64Array, i8: BigInt64Array, u8: BigUint64Array, b1: Uint8Array,
};

/** The array in an .npy: {shape, values}. Throws for what it cannot read: Fortran order, big endian, objects. */
function readNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const wide = bytes[6] > 1;
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const start = (wide ? 12 : 10) + length;
  const header = new TextDecoder("latin1").decode(bytes.subarray(start - length, start));
  const [, order, kind] = /'descr':\s*'([<>|=])(\w+)'/.exec(header) ?? [];
  const shape = (/'shape':\s*\(([^)]*)\)/.exec(header)?.[1] ?? "").split(",").filter((part) => part.trim()).map(Number);
  const [, text, width] = /^([US])(\d+)$/.exec(kind) ?? [], Kind = text ? { U: Uint32Array, S: Uint8Array }[text] : KINDS[kind];
  if (!Kind || order === ">" || /'fortran_order':\s*True/.test(header)) throw new Error("an array that is not shown here");
  const count = shape.reduce((all, one) => all * one, 1), values = new Kind(bytes.slice(start).buffer, 0, count * (width ?? 1));
  if (!text) return { shape, values };
  const word = (_, at) => String.fromCodePoint(...values.subarray(at * width, (at + 1) * width)).replace(/\0+$/, "");
  return { shape, values: Array.from({ length: count }, word) };
}

const IMAGE = /\.(png|jpe?g|webp|bmp)$/i;
const IGNORED = /(^|\/)(\.[^./][^/]*|__MACOSX|Thumbs\.db|desktop\.ini)(\/|$)/i; // as the gateway ignores them
const ARRAY = /^(images|x|x_train)\.npy$/, LABELS = /^(labels|y|y_train)\.npy$/;
const SIDE = 28; // pixels of the arrays that uploads have

export const isIgnored = (name) => IGNORED.test(name);

/**
 * What an upload shows: {names, entries, classOf(name), url(name)}. `names` are those by which the gateway lists its
 * images: paths in a zip, or indices in an array; `entries` are those of a zip that can be packed anew; `url` gives a
 * promise of a URL for an <img>, or of null where there is nothing to show.
 */
export async function picturesOf(file) {
  try {
    const entries = await readZip(file);
    const array = entries.find((entry) => ARRAY.test(entry.name));
    return array ? await ofArray(array, entries.find((entry) => LABELS.test(entry.name))) : ofFiles(entries);
  } catch {
    return { names: [], entries: null, classOf: () => null, url: async () => null }; // the gateway says what is wrong with it
  }
}

function ofFiles(entries) {
  const images = entries.filter((entry) => IMAGE.test(entry.name) && !isIgnored(entry.name));
  const byName = new Map(images.map((entry) => [entry.name, entry]));
  const url = async (name) => {
    const entry = byName.get(name);
    return entry ? URL.createObjectURL(new Blob([await entry.bytes()])) : null;
  };
  return { names: [...byName.keys()], entries, classOf: (name) => name.split("/").at(-2) ?? null, url: remembered(url) };
}

async function ofArray(entry, labelled) {
  const { shape, values } = readNpy(await entry.bytes());
  const [count, height, width] = shape.length === 2 ? [shape[0], SIDE, SIDE] : shape;
  const size = height * width, names = Array.from({ length: count }, (_, index) => index);
  const labels = labelled ? readNpy(await labelled.bytes()).values : [];
  let most = 0;
  for (const value of values) most = Math.max(most, Number(value));
  const full = values instanceof Uint8Array ? 255 : most > 1 ? 255 : 1; // as the gateway takes floats up to 1 for shares
  const url = async (index) => {
    if (!(index < count) || values.length < count * size) return null;
    return pictureOf(values.subarray(index * size, (index + 1) * size), height, width, 255 / full);
  };
  return { names, entries: null, classOf: (index) => String(labels[index]), url: remembered(url) };
}

/** Grey values as a data URL. */
function pictureOf(values, height = SIDE, width = SIDE, scale = 1) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let at = 0; at < height * width; at++) {
    image.data.fill(Number(values[at]) * scale, 4 * at, 4 * at + 3);
    image.data[4 * at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

/** The 28x28 grey values, 0 to 255, of a picture of that size at a URL. */
export async function pixelsAt(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [SIDE, SIDE];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, SIDE, SIDE);
  const { data } = context.getImageData(0, 0, SIDE, SIDE);
  return Array.from({ length: SIDE }, (_, y) => Array.from({ length: SIDE }, (_, x) => data[4 * (y * SIDE + x)]));
}

function remembered(make) {
  const made = new Map();
  return (name) => {
    if (!made.has(name)) made.set(name, make(name).catch(() => null));
    return made.get(name);
  };
}
