// Photos of the user: dropped, pasted or chosen, to search in or to add to the gallery.

import { call, imagePath, photoForm } from "./api.js";
import { byId } from "./dom.js";
import * as notices from "./notices.js";
import { count, explain } from "./format.js";

/**
 * Listen for photos.
 * @param on.localize(file) searches in a photo
 * @param on.gallery() returns the gallery to add photos to; on.added() is called afterwards
 */
export function listenForPhotos(on) {
  choose("pick", "pick-file", ([file]) => on.localize(file));
  choose("add", "add-file", (files) => add(files, on.gallery()).then(on.added));
  window.addEventListener("paste", (event) => {
    const files = event.clipboardData?.files;
    if (!files?.length || isText(event)) return;
    event.preventDefault(); // the name of the file is not put into a field
    useFirst(files, on);
  });
  drops(on);
}

const TEXT_FIELDS = "input:not([type=radio], [type=checkbox], [type=range])";

/** Whether a paste of files puts text into a field: office programs copy a picture of the text with
 * it. File managers copy the name of a file with it, which is not meant as text. */
function isText({ target, clipboardData }) {
  const text = clipboardData.getData("text/plain");
  return target.matches(TEXT_FIELDS) && text !== "" && text !== clipboardData.files[0].name;
}

function choose(button, input, use) {
  byId(button).addEventListener("click", () => byId(input).click());
  byId(input).addEventListener("change", ({ target }) => {
    const files = [...target.files];
    target.value = ""; // so that the same file can be chosen again
    if (files.length) use(files);
  });
}

function drops(on) {
  let depth = 0; // enter events minus leave events, because every child of the page fires both
  const dragging = (by) => {
    depth = by ? Math.max(0, depth + by) : 0;
    document.body.classList.toggle("dragging", depth > 0);
  };
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  window.addEventListener("dragenter", (event) => holdsFiles(event) && dragging(1));
  window.addEventListener("dragleave", (event) => holdsFiles(event) && dragging(-1));
  window.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  window.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    dragging(0);
    useFirst(event.dataTransfer.files, on);
  });
}

function useFirst(files, on) {
  if (!files.length) return;
  const photo = [...files].find((file) => file.type.startsWith("image/"));
  if (photo) on.localize(photo);
  else {
    const name = `\u201c${files[0].name}\u201d`;
    notices.say(`${name} is not a photo. Use a JPEG, PNG or WebP file.`, "error");
  }
}

/** Add photos one by one, and show the result of each. */
async function add(files, gallery) {
  const button = byId("add");
  button.disabled = true;
  const failed = [];
  let objects = 0;
  for (const [number, file] of files.entries()) {
    notices.say(`Adding photo ${number + 1} of ${files.length} \u2026`);
    try {
      const added = await call(imagePath(gallery), { form: photoForm(file) });
      objects += added.num_instances;
    } catch (problem) {
      const { title, advice } = explain(problem);
      failed.push(`${file.name}: ${advice || title}`);
    }
  }
  button.disabled = false;
  const photos = `${count(files.length - failed.length, "photo")} added to \u201c${gallery}\u201d`;
  const done = `${photos}, with ${count(objects, "object")}.`;
  notices.say([done, ...failed].join(" "), failed.length ? "error" : "plain");
}
