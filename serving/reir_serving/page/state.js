// The state of a search as a plain object: to and from the address, and to its request.

/** Weights of "more like this" and "not this"; the weight of the sentence is 1. */
const WEIGHTS = { more: 1, not: -0.5 };
const PAGE_SIZE = 12;

/** Choices of each filter, and the condition that a choice adds to `where`. */
export const CHOICES = {
  size: { small: "area < 0.03", medium: "area >= 0.03 and area < 0.2", large: "area >= 0.2" },
  horizontal: { left: "cx < 0.5", right: "cx > 0.5" },
  vertical: { top: "cy < 0.5", bottom: "cy > 0.5" },
};

export const EMPTY_STATE = Object.freeze({
  gallery: "", sentence: "", terms: [],
  size: "", horizontal: "", vertical: "", presence: 0, where: "", perPhoto: 1, draw: "boxes",
  zoom: false,
});

const FILTERS = ["size", "horizontal", "vertical", "presence", "where", "perPhoto"];

/** Number of filters that are set. */
export const numFilters = (state) =>
  FILTERS.filter((name) => state[name] !== EMPTY_STATE[name]).length;

/** Whether the state has anything to search for. */
export const hasQuery = (state) =>
  state.sentence !== "" || state.terms.some((term) => term.kind === "more");

/** The part of the address behind "#". */
export function toHash(state) {
  const fields = new URLSearchParams();
  for (const name of Object.keys(EMPTY_STATE)) {
    if (name !== "terms" && state[name] !== EMPTY_STATE[name]) fields.set(name, state[name]);
  }
  for (const term of state.terms) fields.append(term.kind, term.id);
  return fields.toString();
}

/** The state of an address; unknown fields are ignored. */
export function fromHash(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  const state = { ...EMPTY_STATE, terms: [] };
  for (const name of ["gallery", "sentence", "where"]) state[name] = fields.get(name) ?? "";
  for (const [name, words] of Object.entries(CHOICES)) {
    if (Object.hasOwn(words, fields.get(name) ?? "")) state[name] = fields.get(name);
  }
  state.presence = Math.min(Math.max(Number(fields.get("presence")) || 0, 0), 1);
  state.perPhoto = Math.min(Math.max(Math.trunc(Number(fields.get("perPhoto"))) || 1, 1), 1000);
  if (fields.get("draw") === "masks") state.draw = "masks";
  state.zoom = fields.get("zoom") === "true";
  for (const [kind, id] of fields) if (Object.hasOwn(WEIGHTS, kind)) state.terms.push({ kind, id });
  return state;
}

/** A state with one more term; replaces an earlier term with the same instance. */
export function withTerm(state, kind, id) {
  return { ...state, terms: [...state.terms.filter((term) => term.id !== id), { kind, id }] };
}

/** A state without the term of an instance. */
export const withoutTerm = (state, id) =>
  ({ ...state, terms: state.terms.filter((term) => term.id !== id) });

/** Options that every kind of search shares. */
export function options(state, cursor = "") {
  const conditions = Object.entries(CHOICES).map(([name, words]) => words[state[name]]);
  const where = [...conditions, state.where.trim()].filter(Boolean);
  return {
    gallery: state.gallery,
    k: PAGE_SIZE,
    per_image: state.perPhoto,
    where: where.length > 1 ? where.map((each) => `(${each})`).join(" and ") : where[0] ?? null,
    min_presence: state.presence,
    explain: true,
    // The server opens photos only for these three; for the first one, if a color is named.
    verify: state.sentence !== "",
    // Zooming in needs a sentence to look for.
    zoom: state.zoom && state.sentence !== "",
    localize: state.draw === "masks",
    cursor,
  };
}

/** [path, body] of the request for a state. */
export function toRequest(state, cursor) {
  const asTerm = ({ kind, id }) => ({ instance_id: id, weight: WEIGHTS[kind] });
  const body = { ...options(state, cursor), expression: state.sentence || null };
  const like = state.terms.find((term) => term.kind === "more");
  body.also = state.terms.filter((term) => term !== like).map(asTerm);
  return like ? ["v1/search/similar", { ...body, instance_id: like.id }] : ["v1/search", body];
}
