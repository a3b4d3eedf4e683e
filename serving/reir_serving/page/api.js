// Requests to the server of this page. Knows API keys and errors, but not what the page shows.

const KEY = "reir-key";

/** An error: the fields of RFC 9457, or status 0 if there was no answer. */
export class Problem extends Error {
  constructor(fields, retryAfter) {
    const { type = "", status = 0, title = "", detail = "", errors = [], request_id = "" } = fields;
    super(detail || title);
    Object.assign(this, { type, status, title, detail, errors, requestId: request_id, retryAfter });
  }
}

/** The first character that no key has. */
export const foreignTo = (key) => key.match(/\W/u)?.[0];

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** Keep the API key until the tab is closed; null deletes it. */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/**
 * Send a request and return the JSON of its answer.
 * @param path relative to the address of the page
 * @param options.json body; options.form a FormData; options.method; options.signal;
 *   options.idempotencyKey by which the server recognizes a request that is sent again
 * @throws Problem, or the AbortError of the signal
 */
export async function call(path, { json, form, method, signal, idempotencyKey } = {}) {
  const headers = idempotencyKey ? { "Idempotency-Key": `"${idempotencyKey}"` } : {};
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const body = json === undefined ? form : JSON.stringify(json);
  const verb = method ?? (body ? "POST" : "GET");
  return contentOf(await send(path, { method: verb, headers, body, signal }));
}

async function contentOf(response) {
  try {
    const text = await response.text();
    return text ? JSON.parse(text) : null;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // The connection has ended too early, or something in between has answered with a page.
    throw new Problem({ title: "The answer of the server cannot be read" });
  }
}

/** Path of one photo of a gallery, or of all its photos if the id is empty. */
export const imagePath = (gallery, id = "") =>
  `v1/galleries/${encodeURIComponent(gallery)}/images${id && `/${encodeURIComponent(id)}`}`;

/** A form with a photo, for the endpoints that take one. */
export function photoForm(file, fields = {}) {
  const form = new FormData();
  form.append("image", file, file.name || "photo");
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return form;
}

/**
 * Load a picture and return its <img>, decoded.
 * With a key it is fetched, because the request of an <img> cannot carry the key.
 * @param source address, or a Blob
 */
export async function loadImage(source, signal) {
  const blob = source instanceof Blob ? source
    : hasKey() ? await (await send(source, { signal })).blob() : null;
  const image = new Image();
  const address = blob ? URL.createObjectURL(blob) : new URL(source, document.baseURI).href;
  try {
    image.src = address;
    await image.decode();
  } finally {
    if (blob) URL.revokeObjectURL(address);
  }
  return image;
}

async function send(path, { headers = {}, ...options }) {
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { headers, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ title: "The server does not answer" });
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  let fields = {};
  try {
    fields = await response.json();
  } catch {
    // a proxy in between answers in another format; the status has to be enough
  }
  const requestId = fields.request_id ?? response.headers.get("X-Request-ID") ?? "";
  return new Problem({ ...fields, request_id: requestId, status: response.status }, retryAfter);
}
