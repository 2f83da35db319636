// What people do on the page. Elements are found as people find them: by role and by what is written on them.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

const button = (page, name) => page.getByRole("button", { name, exact: true });
const question = (page) => page.getByRole("textbox", { name: "Question" });
const looks = (page) => page.getByRole("region", { name: "Where the model looked" }).first();
const track = (page) => looks(page).getByRole("slider");
const mark = (page) => looks(page).locator("blockquote mark");
const alert = (page) => page.getByRole("alert");

async function read(page, url, files) {
  await page.goto(`${url}/`);
  await page.locator("#files").setInputFiles(files);
  await page.getByRole("button", { name: /^Read .*\./ }).click();
  await question(page).waitFor();
}

async function ask(page, text, answer) {
  await question(page).fill(text);
  await button(page, "Ask").click();
  await answers(page, answer);
}

async function answers(page, answer) {
  const newest = page.getByRole("status", { name: "Answer" }).first();
  await newest.and(page.locator('[aria-busy="false"]')).waitFor();
  assert.equal((await newest.innerText()).trim(), answer);
}

// No violation of any rule that axe has, best practices included; no text cut off at the right.
async function sound(page, where) {
  await page.evaluate(axe); // not as a script of the page: its policy forbids that
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  const told = found.violations.map((v) => `${v.id}: ${v.help}\n  ${v.nodes.map((n) => n.html).join("\n  ")}`);
  assert.deepEqual(told, [], `axe, ${where}`);
  const [wide, there] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(wide <= there, `${where}: ${wide} px on ${there} px`);
}

// A document, a question, the answer, and the block that holds the fact among those that were selected.
export async function finds(page, { url, file, text, answer, fact }) {
  await page.goto(`${url}/`);
  await sound(page, "at the beginning");
  await page.locator("#files").setInputFiles(file);
  await sound(page, "a document chosen");
  await page.getByRole("button", { name: /^Read .*\./ }).click();
  await page.getByRole("progressbar").waitFor();
  await sound(page, "while it reads");
  await question(page).waitFor();
  await ask(page, text, answer);
  for (const told of [/ of [\d,]+ tokens reused/, /\d+ written/, /s in all/]) await page.getByText(told).waitFor();

  // Of the blocks selected most often, one in which the answer stands.
  await mark(page).locator("strong").waitFor();
  assert.match(await mark(page).innerText(), new RegExp(fact), "the block that is shown first holds the fact");
  assert.equal(await mark(page).locator("strong").innerText(), answer);
  const block = await mark(page).getAttribute("data-block");
  const strip = looks(page).locator(`.lane [data-block="${block}"]`);
  assert.ok((await strip.count()) >= 1, "it is on the strip");
  assert.equal(await track(page).getAttribute("aria-valuenow"), block);
  await sound(page, "with an answer");

  // Another one by a click on the strip, the same again by its place in the list.
  const other = looks(page).locator(`.lane [data-block]:not([data-block="${block}"])`).last();
  await other.scrollIntoViewIfNeeded();
  const box = await other.boundingBox();
  await page.mouse.click(box.x + box.width / 2, box.y + box.height / 2);
  await page.waitForFunction((was) => document.querySelector("blockquote mark").dataset.block !== was, block);
  await looks(page).locator(`.ranking [data-block="${block}"]`).click();
  await page.waitForFunction((was) => document.querySelector("blockquote mark").dataset.block === was, block);

  // By token and by layer: fewer on the strip, and only in the lane of the layer.
  const blocks = () => looks(page).locator(".lane [data-block]").count();
  const choose = async (name, place) => {
    const group = looks(page).getByRole("group", { name });
    await group.getByRole("radio").nth(place).check({ force: true }); // its label is what is seen
  };
  const all = await blocks();
  await choose("Answer", 2);
  const one = await blocks();
  await choose("Sparse layer", 1);
  assert.equal(await looks(page).locator(".lane:has([data-block])").count(), 1);
  assert.ok(all > one && one > (await blocks()) && (await blocks()) > 0);
  await sound(page, "one token, one layer");
  return { block: Number(block) };
}

// Everything of `finds` without a mouse, and always with something in focus that can be seen.
export async function keyboard(page, { url, file, text, answer, fact }) {
  const chooser = page.waitForEvent("filechooser"); // now: Chromium is told to hand it over, which takes a moment
  await page.goto(`${url}/`);
  const seen = async () => {
    const [what, outline] = await page.evaluate(() => {
      const at = document.activeElement;
      const shown = at.matches(".pick input, .option input") ? at.nextElementSibling : at;
      return [`${at.tagName} ${at.textContent.slice(0, 30)}`, getComputedStyle(shown).outlineStyle];
    });
    assert.ok(outline !== "none" || what.startsWith("BODY"), `nothing shows that ${what} has the focus`);
  };
  const tabTo = async (locator) => {
    for (let i = 0; i < 60; i++) {
      await page.keyboard.press("Tab");
      await seen();
      if (await locator.evaluate((element) => element === document.activeElement).catch(() => false)) return;
    }
    assert.fail(`Tab does not come to ${locator}`);
  };
  await tabTo(page.locator("#files"));
  await page.keyboard.press("Enter");
  await (await chooser).setFiles(file);
  await page.getByRole("button", { name: /^Read .*\./ }).waitFor();
  await tabTo(page.getByRole("button", { name: /^Read .*\./ }));
  await page.keyboard.press("Enter");
  await question(page).waitFor();
  await page.waitForFunction(() => document.activeElement.id === "question"); // no Tab: a question is next
  await page.keyboard.type(text);
  await page.keyboard.press("Enter");
  await answers(page, answer);
  await mark(page).waitFor();
  await tabTo(track(page));
  await page.keyboard.press("Home");
  const places = new Set();
  let found = false;
  for (let last = null; ; ) {
    const now = await track(page).getAttribute("aria-valuenow");
    if (now === last) break;
    places.add(now);
    last = now;
    await page.waitForFunction((at) => document.querySelector("blockquote mark").dataset.block === at, now);
    found ||= (await mark(page).innerText()).match(fact) !== null;
    assert.match(await track(page).getAttribute("aria-valuetext"), /tokens [\d,]+ to [\d,]+, selected \d+ times? by layer/);
    await page.keyboard.press("ArrowRight");
  }
  assert.ok(found && places.size > 5, "the arrow keys go through what was selected, past the fact");
  await tabTo(button(page, "Where the model looked").last());
  return { passages: places.size };
}

// A folder: what has no text is left out, with the reason; the passage says whose it is.
export async function folder(page, { url, folder, text, answer, whose }) {
  await page.goto(`${url}/`);
  await page.locator("#folder").setInputFiles(folder);
  const status = page.getByRole("region", { name: "Documents to read" }).getByRole("status");
  assert.match(await status.innerText(), /^3 documents, .*, 3 left out$/);
  await page.getByText("Left out", { exact: true }).click();
  for (const reason of [/\.hidden\.txt: hidden/, /image\.bin: looks like a binary file/, /nothing\.txt: empty/]) {
    await page.getByText(reason).waitFor();
  }
  await sound(page, "a folder chosen");
  await button(page, "Read 3 documents").click();
  await question(page).waitFor();
  await ask(page, text, answer);
  await mark(page).waitFor();
  assert.match(await looks(page).locator("figcaption").innerText(), new RegExp(`${whose}, tokens`));
}

// What is dropped is taken as what is chosen.
export async function drop(page, { url, text }) {
  await page.goto(`${url}/`);
  const region = page.getByRole("region", { name: "Choose documents" });
  const transfer = await page.evaluateHandle((text) => {
    const made = new DataTransfer();
    made.items.add(new File([text], "note.txt", { type: "text/plain" }));
    made.items.add(new File(["caf\u00e9"], "menu.md"));
    return made;
  }, text);
  await region.dispatchEvent("dragover", { dataTransfer: transfer });
  await region.dispatchEvent("drop", { dataTransfer: transfer });
  await button(page, "Read 2 documents").waitFor();
}

// Short documents are read as a whole, and the page says so.
export async function short(page, { url, file, text, answer }) {
  await read(page, url, file);
  await ask(page, text, answer);
  await looks(page).getByText("At everything").waitFor();
  await sound(page, "a short document");
}

// Kept, reopened, forked, pinned, extended, deleted.
export async function library(page, { url, file, more, text, answer }) {
  await read(page, url, file);
  const list = page.getByRole("navigation", { name: "Documents" });
  const kept = () => list.getByRole("listitem").count();
  const before = await kept();
  const first = page.url();
  await page.goto(`${url}/`);
  await page.goto(first);
  await page.reload();
  await ask(page, text, answer);
  await button(page, "Pin").click();
  await page.getByText("pinned: kept until deleted").waitFor();
  await button(page, "Fork").click();
  await page.waitForURL((now) => now.href !== first);
  assert.equal(await kept(), before + 1);
  await button(page, "Add documents").click();
  await sound(page, "adding");
  await page.locator("#files").setInputFiles(more.file);
  const forked = page.url();
  await page.getByRole("button", { name: /^Add .*\./ }).click();
  await page.waitForURL((now) => now.href !== forked);
  assert.equal(await kept(), before + 2);
  await ask(page, more.text, more.answer);
  for (let left = 2; left > 0; left--) {
    await button(page, "Delete").click();
    await button(page, "Keep").click();
    await button(page, "Delete").click();
    await button(page, "Delete for good").click();
    await page.getByRole("heading", { name: "Read documents" }).waitFor();
    await page.waitForFunction((n) => document.querySelectorAll("nav li").length === n, before + left - 1);
    if (left > 1) await page.goto(forked);
  }
  await page.goto(forked);
  await alert(page).getByText("not kept any more").waitFor();
}

// A reading that is stopped leaves nothing.
export async function stop(page, { url, file }) {
  await page.goto(`${url}/`);
  await page.getByRole("heading", { name: "Read documents" }).waitFor();
  const kept = () => page.getByRole("navigation", { name: "Documents" }).getByRole("listitem").count();
  const before = await kept();
  await page.locator("#files").setInputFiles(file);
  await page.getByRole("button", { name: /^Read .*\./ }).click();
  await button(page, "Stop").click();
  await page.getByRole("button", { name: /^Read .*\./ }).waitFor();
  await page.reload();
  await page.getByRole("heading", { name: "Read documents" }).waitFor();
  assert.equal(await kept(), before);
}

// A server with keys asks for one, and tells a wrong one; the key is forgotten with the tab.
export async function door(page, { url, key }) {
  await page.goto(`${url}/`);
  const field = page.getByLabel("API key");
  await alert(page).getByText("This server wants an API key.").waitFor();
  await sound(page, "at the door");
  await field.fill("osk-wrong");
  await page.keyboard.press("Enter");
  await alert(page).getByText("The server does not know this API key.").waitFor();
  await field.fill(key);
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "Read documents" }).waitFor();
  await page.reload();
  await page.getByRole("heading", { name: "Read documents" }).waitFor();
  const places = await page.evaluate(() => [localStorage.length, document.cookie, Object.values({ ...sessionStorage })]);
  assert.deepEqual(places, [0, "", [key]]);
  const other = await page.context().newPage();
  await other.goto(`${url}/`);
  await other.getByLabel("API key").waitFor();
  await button(page, "Forget key").click();
  await field.waitFor();
  assert.equal(await page.evaluate(() => sessionStorage.length), 0);
}

// What goes wrong in the server is told in the page, and another try is possible.
export async function fails(page, { url, file, text, words }) {
  await read(page, url, file);
  await question(page).fill(text);
  await button(page, "Ask").click();
  await alert(page).getByText(words).waitFor();
  await page.getByText("No answer.").waitFor();
  await sound(page, "after an error");
  assert.ok(await button(page, "Ask").isVisible());
}

// Files that the server cannot read, and more than it takes.
export async function refused(page, { url, broken, large }) {
  await page.goto(`${url}/`);
  await page.locator("#files").setInputFiles(broken);
  await page.getByRole("button", { name: /^Read .*\./ }).click();
  await alert(page).getByText(/^broken\.pdf: /).waitFor();
  await page.locator("#files").setInputFiles(large);
  await alert(page).getByText("more than the 64 KB that the server takes").waitFor();
  assert.equal(await page.getByRole("button", { name: /^Read .*\./ }).count(), 0);
  await sound(page, "refused");
}

// The network goes away, and comes back.
export async function lost(page, { url, file, text, answer }) {
  await read(page, url, file);
  await page.context().setOffline(true);
  await question(page).fill(text);
  await button(page, "Ask").click();
  await alert(page).getByText("The server does not answer. Is it still running?").waitFor();
  await page.context().setOffline(false);
  await ask(page, text, answer);
  assert.equal(await alert(page).count(), 0);
  await page.context().setOffline(true);
  await button(page, "Pin").click();
  await alert(page).getByText("The server does not answer. Is it still running?").waitFor();
}

// No folder to keep documents in.
export async function bare(page, { url }) {
  await page.goto(`${url}/`);
  await page.getByText("opensala serve --contexts kept").waitFor();
  await sound(page, "without contexts");
}
