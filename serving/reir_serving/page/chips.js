// What a search has beside its sentence: instances to be like or unlike, and a photo to look in.

import { call } from "./api.js";
import { byId, icon, make } from "./dom.js";
import { photoFrame } from "./photo.js";
import { fileName } from "./words.js";

const seen = new Map(); // instance id -> hit or instance that the page has shown
const NAMES = { more: "like", not: "not" };

/** Remember instances, so that a chip can show them. */
export function remember(instances) {
  for (const each of instances) seen.set(each.instance_id, each);
}

/**
 * Show the terms of a state, and the photo that is looked at.
 * @param upload {file, box} or null
 * @param on.drop(id), on.dropPhoto()
 */
export function showChips({ gallery, terms }, upload, on) {
  const photo = upload && chip(upload.box ? "like" : "in photo", upload.file.name || "photo",
    thumbnail(upload.file, upload.box), on.dropPhoto);
  byId("chips").replaceChildren(...[photo, ...terms.map((term) => termChip(gallery, term, on))].filter(Boolean));
}

function termChip(gallery, { kind, id }, on) {
  const known = seen.get(id);
  const made = chip(NAMES[kind], known ? fileName(known.uri) : "an object",
    known && thumbnail(known.thumbnail_url, known.box), () => on.drop(id));
  made.classList.add(kind);
  if (!known) look(gallery, id).then((found) => found && made.replaceWith(termChip(gallery, { kind, id }, on)));
  return made;
}

/** Look up an instance that came with the address; false where the gallery has none such. */
async function look(gallery, id) {
  const imageId = id.slice(0, id.lastIndexOf("#"));
  try {
    const photo = await call(`v1/galleries/${encodeURIComponent(gallery)}/images/${encodeURIComponent(imageId)}`);
    remember(photo.instances.map((each) => ({ ...each, uri: photo.uri, thumbnail_url: photo.thumbnail_url })));
  } catch {
    return false; // the chip stays nameless; the search itself says what is wrong
  }
  return seen.has(id);
}

function chip(word, name, picture, drop) {
  return make("li", { class: "chip" }, picture, make("span", {}, make("b", {}, word), " ", name),
    make("button", { type: "button", class: "drop", "aria-label": `Remove: ${word} ${name}`, click: drop }, icon("close")));
}

const thumbnail = (source, box) =>
  photoFrame({ source, crop: box, marks: box ? [{ box }] : [], aspect: 1 });
