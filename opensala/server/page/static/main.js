// The page as a whole: what is kept, what is open, and who may use the server.
import { render } from "preact";
import { useCallback, useEffect, useState } from "preact/hooks";
import { call, hasKey, useKey } from "/page/api.js";
import { Asking } from "/page/asking.js";
import { Context, Library } from "/page/contexts.js";
import { html } from "/page/html.js";
import { Reader } from "/page/reading.js";
import { Trouble } from "/page/trouble.js";
import { count } from "/page/words.js";

const named = () => location.hash.slice(1);

function Page() {
  const [server, setServer] = useState(null);
  const [contexts, setContexts] = useState([]);
  const [open, setOpen] = useState(named());
  const [adding, setAdding] = useState(false);
  const [error, setError] = useState(null);
  const [notes, setNotes] = useState({}); // by context: what is missing of the documents just read
  const [fresh, setFresh] = useState(null); // the context that was read last
  const [answers, setAnswers] = useState({}); // by context, for as long as the page is open

  const refresh = useCallback(async () => {
    try {
      const told = await call("GET", "/v1/server");
      setServer(told);
      setContexts(told.contexts ? (await call("GET", "/v1/contexts")).data : []);
      setError(null);
    } catch (failure) {
      setError(failure);
    }
  }, []);
  useEffect(() => {
    refresh();
    const follow = () => { setOpen(named()); setAdding(false); };
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);

  const show = (id) => { location.hash = id; };
  const made = async (context) => {
    setNotes((all) => ({ ...all, [context.id]: context.notes }));
    await refresh();
    setFresh(context.id);
    show(context.id);
  };
  const gone = async () => {
    show("");
    await refresh();
    document.getElementById("main").focus();
  };
  const signIn = (value) => { useKey(value); refresh(); };
  if (error?.status === 401) return html`<${Door} error=${error} onKey=${signIn} />`;
  if (!server) return error ? html`<${Broken} error=${error} onRetry=${refresh} />` : null;
  const context = contexts.find((one) => one.id === open);
  const keep = (id, change) => setAnswers((all) => ({ ...all, [id]: change(all[id] ?? []) }));
  return html`
    <${Head} server=${server} onLeave=${() => signIn("")} />
    <div class="columns">
      <${Library} contexts=${contexts} open=${context?.id} onOpen=${show} />
      <main id="main" tabindex="-1">
        <${Trouble} error=${error} />
        ${!server.contexts && html`<${Bare} />`}
        ${server.contexts && !context && html`
          ${open && html`<p class="trouble" role="alert">These documents are not kept any more.</p>`}
          <h1>Read documents</h1>
          <p class="under-title">They are read once and kept. Then ask about them, and see where the model looked.</p>
          <${Reader} key="new" server=${server} onMade=${made} />`}
        ${context && html`
          <${Context} key=${context.id} context=${context} notes=${notes[context.id]} adding=${adding} onAdd=${() => setAdding(!adding)}
            onChanged=${refresh} onMade=${made} onGone=${gone} />
          ${adding && html`<${Reader} key="more" server=${server} base=${context} onMade=${made} />`}
          <${Asking} key=${`ask ${context.id}`} server=${server} context=${context}
            eager=${fresh === context.id} answers=${answers[context.id] ?? []} onAnswers=${(change) => keep(context.id, change)} />`}
      </main>
    </div>`;
}

const Head = ({ server, onLeave }) => html`
  <header>
    <a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); document.getElementById("main").focus(); }}>
      Skip to the documents</a>
    <p class="brand"><a href="#">OpenSALA</a></p>
    <p class="about">${server.model}<span> · up to ${count(server.max_model_len)} tokens</span></p>
    ${hasKey() && html`<button class="quiet" onClick=${onLeave}>Forget key</button>`}
  </header>`;

function Door({ error, onKey }) {
  const [value, setValue] = useState("");
  const submit = (e) => { e.preventDefault(); if (value.trim()) onKey(value.trim()); };
  return html`
    <main class="door">
      <h1>OpenSALA</h1>
      <p role="alert">${error.message}</p>
      <form onSubmit=${submit}>
        <label for="key">API key</label>
        <input id="key" type="password" autocomplete="off" spellcheck=${false} value=${value}
          onInput=${(e) => setValue(e.target.value)} />
        <button class="main">Use this key</button>
      </form>
      <p class="note">It is kept in this tab only, and forgotten when the tab is closed.</p>
    </main>`;
}

const Broken = ({ error, onRetry }) => html`
  <main class="door">
    <h1>OpenSALA</h1>
    <p role="alert">${error.message}</p>
    <button class="main" onClick=${onRetry}>Try again</button>
  </main>`;

const Bare = () => html`
  <h1>No place for documents</h1>
  <p>This server answers requests, but keeps no documents. Start it with a folder to keep them in, and reload this
    page:</p>
  <pre>opensala serve --contexts kept</pre>`;

render(html`<${Page} />`, document.getElementById("page"));
