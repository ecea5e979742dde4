// What a user drops or chooses, as one file that the gateway takes.

import { entriesOf, writeZip } from "./archive.js";
import { isIgnored } from "./pictures.js";

const ARCHIVE = /\.(zip|npz)$/i;

/** The file to upload for what was dropped: a zip or npz as it is, folders as a zip. */
export async function fileOfDrop(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const roots = items.map((item) => item.webkitGetAsEntry?.()).filter(Boolean); // only until the handler ends
  if (!roots.some((entry) => entry.isDirectory)) return fileOfChoice([...transfer.files]);
  const files = [];
  for (const root of roots) await walk(root, "", files);
  return packed(files);
}

/** Likewise for what was chosen: files of an <input>, perhaps of a whole folder. */
export async function fileOfChoice(files) {
  if (files.length === 1 && ARCHIVE.test(files[0].name)) return files[0];
  if (files.length === 1 && !files[0].webkitRelativePath) {
    throw new Error(`${files[0].name} is neither a folder nor a zip nor an .npz.`);
  }
  return packed(files.map((file) => ({ name: file.webkitRelativePath || file.name, file })));
}

async function walk(entry, path, files) {
  const name = path + entry.name;
  if (entry.isFile) {
    files.push({ name, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    return;
  }
  const reader = entry.createReader();
  for (;;) { // a reader gives at most 100 entries at a time
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return;
    for (const inner of some) await walk(inner, `${name}/`, files);
  }
}

async function packed(all) {
  let files = all.filter(({ name }) => !isIgnored(name));
  if (!files.length) throw new Error("There are no files in this folder.");
  const [top] = files[0].name.split("/");
  const deep = files.every(({ name }) => name.startsWith(`${top}/`) && name.split("/").length > 2);
  if (deep) files = files.map(({ name, file }) => ({ name: name.slice(top.length + 1), file })); // its folders are the classes
  const zip = await writeZip(entriesOf(files.sort((a, b) => (a.name < b.name ? -1 : 1))));
  return new File([zip], `${deep ? top : "images"}.zip`, { type: "application/zip" });
}
