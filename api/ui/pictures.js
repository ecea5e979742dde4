// The pictures of an upload, read from the upload itself while the page has it.

import { readNpy, readZip } from "./archive.js";

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
export function pictureOf(values, height = SIDE, width = SIDE, scale = 1) {
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
