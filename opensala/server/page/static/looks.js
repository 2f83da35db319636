// Where the model looked: a strip over the document with the blocks that the sparse layers selected.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { call } from "/page/api.js";
import { html } from "/page/html.js";
import { Trouble } from "/page/trouble.js";
import { count, plural } from "/page/words.js";

const BEST = 5; // passages that are listed
const SEARCHED = 16; // and looked through for the answer
const AROUND = 48; // tokens shown on both sides of a passage

export function Looks({ response, context, begun, answer }) {
  const [shown, setShown] = useState(begun);
  const [found, setFound] = useState(null);
  const [places, setPlaces] = useState([]);
  const [error, setError] = useState(null);
  useEffect(() => {
    if (!shown || found) return;
    call("GET", `/v1/selections/${response}`).then(setFound, setError);
    if (context.documents.length > 1) {
      call("GET", `/v1/contexts/${context.id}/documents`).then((told) => setPlaces(told.data), () => {});
    }
  }, [shown]);
  return html`
    <section class="looks" aria-label="Where the model looked">
      <button class="quiet" aria-expanded=${shown} onClick=${() => setShown(!shown)}>Where the model looked</button>
      ${shown && html`<${Trouble} error=${error} />`}
      ${shown && found && (found.tokens.some((token) => token.chosen)
        ? html`<${Strip} found=${found} places=${places} context=${context} answer=${answer} />`
        : html`<p class="note">At everything: a text of this length is read as a whole for every word of an answer.</p>`)}
    </section>`;
}

// How often each block was selected, by layer, for some tokens of the answer.
function tally(found, layer, token) {
  const rows = found.layers.map(() => new Map());
  found.tokens.forEach(({ chosen }, number) => {
    if (!chosen || (token !== "all" && token !== number)) return;
    chosen.forEach((heads, at) => {
      if (layer !== "all" && layer !== at) return;
      for (const head of heads) for (const block of head) rows[at].set(block, (rows[at].get(block) ?? 0) + 1);
    });
  });
  const sum = new Map();
  for (const row of rows) for (const [block, times] of row) sum.set(block, (sum.get(block) ?? 0) + times);
  const ranked = [...sum].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const heads = found.tokens.find((one) => one.chosen).chosen[0].length;
  const layers = layer === "all" ? found.layers.length : 1;
  const tokens = token === "all" ? found.tokens.filter((one) => one.chosen).length : 1;
  return { rows, sum, ranked, places: [...sum.keys()].sort((a, b) => a - b), most: heads * layers * tokens };
}

function Strip({ found, places, context, answer }) {
  const [layer, setLayer] = useState("all");
  const [token, setToken] = useState("all");
  const [picked, setPicked] = useState(null);
  const told = useMemo(() => tally(found, layer, token), [found, layer, token]);
  const size = found.block_size;
  const blocks = Math.ceil(found.document_tokens / size);
  const holding = useHolding(found, told, context, answer);
  const block = told.sum.has(picked) ? picked : told.sum.has(holding) ? holding : told.ranked[0]?.[0];
  const inside = found.tokens.filter((one) => one.chosen).length;
  return html`
    <${Choice} name="Answer" value=${token} onChange=${setToken} tokens
      options=${[["all", "all of it"], ...found.tokens.map((one, n) => [n, one.text])]} />
    <${Choice} name="Sparse layer" value=${layer} onChange=${setLayer}
      options=${[["all", "all"], ...found.layers.map((number, n) => [n, String(number)])]} />
    <${Track} found=${found} told=${told} blocks=${blocks} block=${block} onPick=${setPicked} places=${places} />
    ${block === undefined
      ? html`<p class="note">Nothing but the beginning and the end of the text was selected.</p>`
      : html`
        <div class="under">
          <${Passage} context=${context} block=${block} found=${found} told=${told} places=${places} answer=${answer} />
          <${Ranking} told=${told} block=${block} size=${size} onPick=${setPicked} places=${places} />
        </div>`}
    <p class="note">
      For each token of the answer every sparse layer selects ${plural(perToken(found), "block")} of ${size} tokens by
      score, out of ${count(blocks)}. It always reads the beginning, and
      the ${plural(found.always.last_blocks, "block")} up to the token: these are not shown.
      ${found.truncated && ` Only the first ${count(inside)} tokens of this answer were watched.`}
    </p>`;
}

// The first of the blocks selected most often in which the answer's words stand: the one to show before another is picked.
function useHolding(found, told, context, answer) {
  const [texts, setTexts] = useState(new Map());
  const best = told.ranked.slice(0, SEARCHED).map(([block]) => block);
  useEffect(() => {
    if (answer.trim().length < 2) return; // `marks` takes no such words
    const stop = new AbortController();
    for (const block of best.filter((one) => !texts.has(one))) {
      passage(context, found, block, 0, stop.signal).then(
        ({ text }) => setTexts((known) => new Map(known).set(block, text)),
        () => {}, // then the one selected most often is shown, and why there is no text of it
      );
    }
    return () => stop.abort();
  }, [best.join()]);
  return best.find((block) => marks(texts.get(block) ?? "", answer) >= 0);
}

function passage(context, found, block, around, signal) {
  const start = block * found.block_size;
  const end = Math.min(start + found.block_size, found.document_tokens);
  return call("GET", `/v1/contexts/${context.id}/text?start=${start}&end=${end}&around=${around}`, undefined, signal);
}

const perToken = (found) => Math.max(...found.tokens.flatMap((one) => one.chosen ?? []).flat().map((head) => head.length));

function Choice({ name, value, options, onChange, tokens }) {
  const group = useMemo(() => `choice-${crypto.getRandomValues(new Uint32Array(1))[0]}`, []);
  return html`
    <fieldset class=${tokens ? "choice tokens" : "choice"}>
      <legend>${name}</legend>
      <div>
        ${options.map(([key, label]) => html`
          <span class="option" key=${key}>
            <input type="radio" id=${`${group}-${key}`} name=${group} checked=${value === key} onChange=${() => onChange(key)} />
            <label for=${`${group}-${key}`} title=${label}>${visible(label)}</label>
          </span>`)}
      </div>
    </fieldset>`;
}

// Tokens that are blank are shown as signs.
const visible = (text) => text.replace(/\n/g, "⏎").replace(/^ +$/, "␣") || "∅";

function Track({ found, told, blocks, block, onPick, places }) {
  const box = useRef(null);
  const where = (number) => `${(number / blocks) * 100}%`;
  const at = told.places.indexOf(block);
  const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 };
  const press = (e) => {
    const last = told.places.length - 1;
    const to = e.key === "Home" ? 0 : e.key === "End" ? last : at + (steps[e.key] ?? NaN);
    if (Number.isNaN(to) || last < 0) return;
    e.preventDefault();
    onPick(told.places[Math.max(0, Math.min(last, to))]);
  };
  const click = (e) => {
    if (!told.places.length) return;
    const frame = box.current.getBoundingClientRect();
    const aim = ((e.clientX - frame.left) / frame.width) * blocks - 0.5;
    onPick(told.places.reduce((best, one) => (Math.abs(one - aim) < Math.abs(best - aim) ? one : best)));
  };
  return html`
    <div class="strip">
      <div class="labels" aria-hidden="true">${found.layers.map((number) => html`<span>layer ${number}</span>`)}</div>
      <div class="track" ref=${box} tabindex="0" role="slider" aria-label="Selected passages, from the beginning of the text to its end"
        aria-valuemin="0" aria-valuemax=${blocks - 1} aria-valuenow=${block ?? 0}
        aria-valuetext=${block === undefined ? "none" : describe(found, told, block, places)} onKeyDown=${press} onClick=${click}>
        ${found.layers.map((number, row) => html`
          <div class="lane" key=${number}>
            ${[...told.rows[row]].map(([one, times]) => html`
              <i key=${one} data-block=${one} class=${one === block ? "here" : ""}
                style=${{ left: where(one), width: where(1), opacity: 0.3 + 0.7 * (times / Math.max(1, told.most / told.rows.length)) }}></i>`)}
          </div>`)}
        ${places.slice(1).map((place) => html`<b key=${place.start} title=${place.name} style=${{ left: where(place.start / found.block_size) }}></b>`)}
        ${block !== undefined && html`<s style=${{ left: where(block), width: `calc(${where(1)} + 6px)` }}></s>`}
      </div>
      <div class="ends" aria-hidden="true"><span>beginning</span><span>end</span></div>
    </div>`;
}

const nameAt = (places, token) => places.find((place) => token >= place.start && token < place.end)?.name;

function describe(found, told, block, places) {
  const start = block * found.block_size;
  const layers = found.layers.filter((_, row) => told.rows[row].has(block));
  const name = nameAt(places, start);
  return `${name ? `${name}, ` : ""}tokens ${count(start)} to ${count(start + found.block_size - 1)}, selected ` +
    `${plural(told.sum.get(block), "time")} by ${layers.length === 1 ? "layer" : "layers"} ${layers.join(", ")}`;
}

const Ranking = ({ told, block, size, onPick, places }) => html`
  <div class="ranking">
    <h2>Selected most often</h2>
    <ol>
      ${told.ranked.slice(0, BEST).map(([one, times]) => html`
        <li key=${one}>
          <button class=${one === block ? "here" : ""} aria-pressed=${one === block} data-block=${one} onClick=${() => onPick(one)}>
            <span class="name">${nameAt(places, one * size) ?? ""} tokens ${count(one * size)}–${count(one * size + size - 1)}</span>
            <span class="about">${count(times)} of ${count(told.most)} times</span>
          </button>
        </li>`)}
    </ol>
  </div>`;

function Passage({ context, block, found, told, places, answer }) {
  const [text, setText] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    const stop = new AbortController();
    passage(context, found, block, AROUND, stop.signal).then(
      (told) => { setText(told); setError(null); },
      (failure) => failure.name !== "AbortError" && setError(failure),
    );
    return () => stop.abort();
  }, [block]);
  return html`
    <figure class="passage">
      <figcaption><p role="status">${describe(found, told, block, places)}</p></figcaption>
      <${Trouble} error=${error} />
      ${text && html`<blockquote tabindex="0" aria-label="The passage"><p><span class="near">${text.before}</span><mark data-block=${text.start / found.block_size}>${marked(text.text, answer)}</mark><span class="near">${text.after}</span></p></blockquote>`}
    </figure>`;
}

// Where the words of the answer stand in a passage, or -1; a single letter stands everywhere.
function marks(text, answer) {
  const words = answer.trim();
  return words.length > 1 ? text.indexOf(words) : -1;
}

// A passage with the words of the answer in it made strong.
function marked(text, answer) {
  const words = answer.trim();
  const at = marks(text, answer);
  if (at < 0) return text;
  return html`${text.slice(0, at)}<strong>${words}</strong>${text.slice(at + words.length)}`;
}
