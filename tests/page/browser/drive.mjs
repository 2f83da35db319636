// Drives Chromium for test_browser.py: scenarios come as lines of JSON on stdin, their outcomes go to stdout.
//
// In every scenario the page may speak to its own server only, and nothing may go wrong in it that it does not
// say itself: errors of scripts, messages in the console, violations of its policy.
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";
import * as scenarios from "./scenarios.mjs";

const root = process.getuid?.() === 0 ? ["--no-sandbox"] : []; // Chromium's sandbox refuses root
const browser = await chromium.launch({ executablePath: process.argv[2], args: root });

async function run({ name, url, width = 1100, scheme = "light", told = [], ...given }) {
  // Without motion: a colour on its way to another one has a contrast that nobody sees.
  const look = { colorScheme: scheme, reducedMotion: "reduce" };
  const context = await browser.newContext({ viewport: { width, height: 800 }, ...look });
  context.setDefaultTimeout(20_000);
  const page = await context.newPage();
  const wrong = [];
  const expected = (text) => told.some((part) => text.includes(part));
  page.on("pageerror", (error) => wrong.push(`script: ${error.stack}`));
  page.on("console", (message) => {
    if (!expected(message.text())) wrong.push(`console: ${message.text()}`);
  });
  page.on("request", (request) => {
    const to = request.url();
    if (!to.startsWith(`${url}/`) && !to.startsWith("blob:")) wrong.push(`request to ${to}`);
  });
  try {
    const result = await scenarios[name](page, { url, ...given });
    if (wrong.length) throw new Error(wrong.join("\n"));
    return { ok: true, result };
  } catch (error) {
    const seen = await page.locator("body").innerText().catch(() => "");
    return { ok: false, error: `${error.stack}\n${wrong.join("\n")}\n--- the page says:\n${seen}` };
  } finally {
    await context.close();
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(await run(JSON.parse(line)))}\n`);
}
await browser.close();
