// From what was dropped or chosen to documents: text as text, everything else that may be one as bytes.

const TOOLS = new Set(["__pycache__", "node_modules", "venv"]);
const MARKS = [[0xff, 0xfe], [0xfe, 0xff]]; // UTF-16 (and UTF-32) say so at their beginning

// Files below what was dropped, each with its path, in order of name. To be called in the event itself.
export async function dropped(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const entries = items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  const found = [];
  for (const entry of entries) {
    if (entry instanceof File) found.push({ path: entry.name, file: entry }); // it is in no file system
    else if (entry) await walk(entry, found);
  }
  return found;
}

async function walk(entry, found) {
  const path = entry.fullPath.replace(/^\//, "");
  if (entry.isFile) {
    found.push({ path, file: await new Promise((done, failed) => entry.file(done, failed)) });
    return;
  }
  if (passedOver(path)) return void found.push({ path: `${path}/`, file: null });
  const reader = entry.createReader();
  const inside = [];
  for (;;) { // it gives a hundred at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) break;
    inside.push(...some);
  }
  inside.sort((a, b) => (a.name < b.name ? -1 : 1));
  for (const one of inside) await walk(one, found);
}

export const chosen = (list) =>
  [...list]
    .map((file) => ({ path: file.webkitRelativePath || file.name, file }))
    .sort((a, b) => (a.path < b.path ? -1 : 1));

// Why a file of a folder is passed over; a file that was named itself is not hidden.
function passedOver(path) {
  const parts = path.split("/");
  if (parts.length > 1 && parts.slice(1).some((part) => part.startsWith("."))) return "hidden";
  return parts.some((part) => TOOLS.has(part)) ? "in a folder of tools" : "";
}

// Documents as the API takes them, and what was left out and why.
export async function read(found) {
  const documents = [], skipped = [];
  for (const { path, file } of found) {
    const reason = passedOver(path) || (file ? "" : "not a file");
    const document = reason ? { reason } : await one(path, file);
    if (document.reason) skipped.push({ path, reason: document.reason });
    else documents.push(document);
  }
  return { documents, skipped };
}

async function one(path, file) {
  let content;
  try {
    content = new Uint8Array(await file.arrayBuffer());
  } catch {
    return { reason: "cannot be read" };
  }
  if (!content.length) return { reason: "empty" };
  const bytes = content.length, name = path.slice(-500);
  if (isPdf(content) || MARKS.some((mark) => mark.every((byte, i) => content[i] === byte))) {
    return { name, bytes, data: base64(content) };
  }
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(content);
    if (text.includes("\0")) return { reason: "looks like a binary file" };
    return text.trim() ? { name, bytes, text } : { reason: "no text in it" };
  } catch {
    return { reason: content.includes(0) ? "looks like a binary file" : "not UTF-8 text" };
  }
}

const isPdf = (content) => new TextDecoder("latin1").decode(content.subarray(0, 1024)).includes("%PDF-");

function base64(content) {
  let text = "";
  for (let i = 0; i < content.length; i += 0x8000) {
    text += String.fromCharCode(...content.subarray(i, i + 0x8000));
  }
  return btoa(text);
}
