// What is kept: the list of it, and what can be done with one of them.
import { useState } from "preact/hooks";
import { call } from "/page/api.js";
import { html } from "/page/html.js";
import { Trouble } from "/page/trouble.js";
import { bytes, count, plural, title, until } from "/page/words.js";

export const Library = ({ contexts, open, onOpen }) => html`
  <nav aria-label="Documents">
    <button class=${open ? "new" : "new here"} aria-current=${open ? undefined : "page"} onClick=${() => onOpen("")}>
      New documents</button>
    ${contexts.length > 0 && html`<h2>Kept</h2>
    <ul>
      ${[...contexts].sort((a, b) => b.created_at - a.created_at).map((context) => html`
        <li key=${context.id}>
          <button class=${context.id === open ? "here" : ""} aria-current=${context.id === open ? "page" : undefined}
            onClick=${() => onOpen(context.id)}>
            <span class="name">${title(context)}</span>
            <span class="about">${count(context.tokens)} tokens${context.pinned ? " · pinned" : ""}</span>
          </button>
        </li>`)}
    </ul>`}
  </nav>`;

const focus = (element) => element?.focus();

export function Context({ context, notes, adding, onAdd, onChanged, onMade, onGone }) {
  const [sure, setSure] = useState(false);
  const [error, setError] = useState(null);
  const place = `/v1/contexts/${context.id}`;
  const doing = (work) => async () => {
    setError(null);
    try {
      await work();
    } catch (failure) {
      setError(failure);
    }
  };
  const pin = doing(async () => { await call("PATCH", place, { pinned: !context.pinned }); await onChanged(); });
  const fork = doing(async () => onMade(await call("POST", `${place}/fork`, {})));
  const remove = doing(async () => { await call("DELETE", place); onGone(); });
  const facts = [
    `${count(context.tokens)} tokens`,
    `${bytes(context.bytes)} on disk`,
    context.expires_at && `kept for ${until(context.expires_at)}`,
    context.pinned && "pinned: kept until deleted",
  ].filter(Boolean);
  const more = context.documents.length > 1;
  return html`
    <section class="context" aria-labelledby="title">
      <h1 id="title">${title(context)}</h1>
      <p class="facts">${facts.map((fact) => html`<span>${fact}</span>`)}</p>
      ${more && html`<details><summary>${plural(context.documents.length, "document")}</summary>
        <ul class="names">${context.documents.map((name) => html`<li>${name}</li>`)}</ul></details>`}
      <${Notes} notes=${notes} />
      <p class="actions">
        <button aria-expanded=${adding} onClick=${onAdd}>Add documents</button>
        <button onClick=${fork}>Fork</button>
        <button aria-pressed=${context.pinned} onClick=${pin}>${context.pinned ? "Unpin" : "Pin"}</button>
        ${sure
          ? html`<span role="group" aria-label="Delete these documents?">
              <button class="danger" onClick=${remove}>Delete for good</button>
              <button ref=${focus} onClick=${() => setSure(false)}>Keep</button></span>`
          : html`<button onClick=${() => setSure(true)}>Delete</button>`}
      </p>
      <${Trouble} error=${error} />
    </section>`;
}

const Notes = ({ notes }) => notes?.length > 0 && html`
  <ul class="notes" aria-label="Remarks">${notes.map((note) => html`<li>${note}</li>`)}</ul>`;
