// Documents on their way in: chosen or dropped, looked through, sent, and read by the model.
import { useEffect, useRef, useState } from "preact/hooks";
import { call, events } from "/page/api.js";
import { chosen, dropped, read } from "/page/files.js";
import { html } from "/page/html.js";
import { Trouble } from "/page/trouble.js";
import { bytes, count, plural, seconds } from "/page/words.js";

const SHOWN = 8; // names of a list before it is cut

// `base`: a context that the documents are put behind.
export function Reader({ server, base, onMade }) {
  const [found, setFound] = useState(null);
  const [progress, setProgress] = useState(null);
  const [error, setError] = useState(null);
  const [over, setOver] = useState(false);
  const stop = useRef(null);
  useEffect(() => () => stop.current?.abort(), []);

  const take = async (list) => {
    setError(null);
    try {
      setFound(await read(await list));
    } catch {
      setError({ message: "What was dropped could not be read." });
    }
  };
  const start = async () => {
    const documents = found.documents.map(({ bytes: _, ...document }) => document);
    const path = base ? `/v1/contexts/${base.id}/extend` : "/v1/contexts";
    const body = { documents, stream: true, ...(base ? {} : { model: server.model }) };
    const watch = progressOf(setProgress);
    stop.current = new AbortController();
    setError(null);
    watch.begin();
    try {
      for await (const told of events(path, body, stop.current.signal)) {
        if (told.object === "context") return await onMade(told);
        watch.told(told);
      }
    } catch (failure) {
      if (failure.name !== "AbortError") setError(failure);
    } finally {
      watch.end();
    }
  };
  const drop = (e) => { e.preventDefault(); setOver(false); take(dropped(e.dataTransfer)); };
  const drag = (e) => { e.preventDefault(); setOver(true); };

  if (progress) return html`<${Progress} progress=${progress} onStop=${() => stop.current.abort()} />`;
  return html`
    <section class=${`drop ${over ? "over" : ""}`} onDragOver=${drag} onDragLeave=${() => setOver(false)} onDrop=${drop}
      aria-label=${base ? "Add documents" : "Choose documents"}>
      <p class="lead">Drop files or a folder here</p>
      <p class="picks">
        <${Pick} id="files" label="Choose files" multiple onPick=${take} />
        <${Pick} id="folder" label="Choose a folder" webkitdirectory onPick=${take} />
      </p>
      <p class="note">Text, source code, Markdown, PDF. They go to this server and nowhere else.</p>
    </section>
    <${Trouble} error=${error} />
    ${found && html`<${Found} found=${found} server=${server} base=${base} onStart=${start} />`}`;
}

const Pick = ({ id, label, onPick, ...rest }) => html`
  <span class="pick">
    <input type="file" id=${id} ...${rest} onChange=${(e) => onPick(chosen(e.target.files))} />
    <label for=${id}>${label}</label>
  </span>`;

function Found({ found, server, base, onStart }) {
  const { documents, skipped } = found;
  const size = documents.reduce((sum, d) => sum + d.bytes, 0);
  const sent = documents.reduce((sum, d) => sum + (d.data?.length ?? d.bytes * 1.05) + d.name.length + 40, 0);
  const most = server.max_body_bytes;
  return html`
    <section class="found" aria-label="Documents to read">
      <p role="status">${documents.length
        ? html`${plural(documents.length, "document")}, ${bytes(size)}${skipped.length ? `, ${count(skipped.length)} left out` : ""}`
        : "There is no text to read in what was chosen."}</p>
      ${documents.length > 1 && html`<${Names} names=${documents.map((d) => d.name)} />`}
      ${skipped.length > 0 && html`
        <details><summary>Left out</summary>
          <${Names} names=${skipped.map((s) => `${s.path}: ${s.reason}`)} /></details>`}
      ${sent > most && html`<p class="trouble" role="alert">This is more than the ${bytes(most)} that the server takes
        at once. Choose a part of it, and add the rest afterwards.</p>`}
      ${documents.length > 0 && sent <= most && html`
        <button class="main" onClick=${onStart}>
          ${base ? "Add" : "Read"} ${documents.length > 1 ? plural(documents.length, "document") : documents[0].name}
        </button>`}
    </section>`;
}

const Names = ({ names }) => html`
  <ul class="names">
    ${names.slice(0, SHOWN).map((name) => html`<li>${name}</li>`)}
    ${names.length > SHOWN && html`<li>and ${count(names.length - SHOWN)} more</li>`}
  </ul>`;

// Turns events of a reading into what is shown; asks every second what memory the server uses.
function progressOf(show) {
  const begun = performance.now();
  let state = { read: 0, tokens: 0, rate: 0, memory: 0, curve: [], left: null };
  let last = null, timer = null;
  const set = (change) => { state = { ...state, ...change }; show(state); };
  const memory = () => call("GET", "/v1/server").then((s) => timer && set({ memory: s.memory.process_bytes }), () => {});
  return {
    begin() { set({}); timer = setInterval(memory, 1000); memory(); },
    told({ read_tokens: read, tokens }) {
      const now = (performance.now() - begun) / 1000;
      if (last && read > last.read && now - last.now > 0.15) {
        const rate = (read - last.read) / (now - last.now);
        const smooth = state.rate ? 0.7 * state.rate + 0.3 * rate : rate;
        set({ rate: smooth, curve: [...state.curve, [read, rate]], left: (tokens - read) / smooth });
        last = { read, now };
      }
      last ??= { read, now };
      set({ read, tokens });
    },
    end() { clearInterval(timer); timer = null; show(null); },
  };
}

function Progress({ progress, onStop }) {
  const { read, tokens, rate, memory, curve, left } = progress;
  const button = useRef(null);
  useEffect(() => button.current.focus(), []); // what was pressed is gone
  const share = tokens ? read / tokens : 0;
  const quarter = Math.floor(share * 4) * 25;
  const facts = [
    tokens > 0 && `${count(read)} of ${count(tokens)} tokens`,
    rate > 0 && `${count(Math.round(rate))} tokens/s`,
    left > 1 && read < tokens && `about ${seconds(left)} left`,
    memory > 0 && `${bytes(memory)} of memory in use`,
  ].filter(Boolean);
  const doing = !tokens ? "Sending" : read < tokens ? "Reading" : "Keeping what was read";
  return html`
    <section class="progress" aria-label="Reading">
      <p class="lead" id="doing">${doing}</p>
      <progress aria-labelledby="doing" max="1" value=${tokens ? share : undefined}></progress>
      <p class="facts">${facts.map((fact) => html`<span>${fact}</span>`)}</p>
      <${Curve} points=${curve} tokens=${tokens} />
      <p class="away" role="status">${doing}${quarter && quarter < 100 ? `, ${quarter} percent` : ""}</p>
      <button ref=${button} onClick=${onStop}>Stop</button>
    </section>`;
}

// Reading speed over the place in the text.
function Curve({ points, tokens }) {
  if (points.length < 4) return null;
  const top = Math.max(...points.map(([, rate]) => rate)) * 1.15;
  const line = points.map(([at, rate]) => `${((at / tokens) * 300).toFixed(1)},${(48 - (rate / top) * 48).toFixed(1)}`);
  return html`
    <figure class="curve">
      <svg viewBox="0 0 300 48" preserveAspectRatio="none" aria-hidden="true"><polyline points=${line.join(" ")} /></svg>
      <figcaption>tokens/s along the text, from 0 to ${count(Math.round(top))}</figcaption>
    </figure>`;
}
