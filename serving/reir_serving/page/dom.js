// Creates elements without HTML strings, so that no answer or file name can inject markup.

/**
 * Make an element. Text children become text nodes.
 * Attributes: a function becomes a listener ("click"), true becomes an empty attribute.
 * Children and attributes that are undefined, null or false are left out.
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.filter(isGiven));
  return element;
}

/** The same within SVG. */
export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

const isGiven = (value) => value !== undefined && value !== null && value !== false;

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (isGiven(value)) element.setAttribute(name, String(value));
  }
}

/** Make a button that does not submit a form. */
export const button = (attributes, ...children) =>
  make("button", { type: "button", ...attributes }, ...children);

/** The element of the page with an id. */
export const byId = (id) => document.getElementById(id);

/** A symbol from index.html; it is decoration, so screen readers skip it. */
export function icon(name) {
  return makeSvg("svg", { class: "icon", "aria-hidden": "true" },
    makeSvg("use", { href: `#icon-${name}` }));
}

/** Show a text in the page's live region, which screen readers read aloud. */
export function announce(text) {
  byId("summary").textContent = text;
}
