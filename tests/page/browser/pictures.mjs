// The pictures in docs/page.md: node pictures.mjs CHROMIUM URL DOCUMENT QUESTION LONG FOLDER (LONG: a document that takes a while)
import { chromium } from "playwright-core";

const [executablePath, url, document, question, long, folder] = process.argv.slice(2);
const root = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
const browser = await chromium.launch({ executablePath, args: root });

async function picture(name, width, height, colorScheme, act) {
  const page = await browser.newPage({ viewport: { width, height }, colorScheme, deviceScaleFactor: 1.5 });
  await page.goto(url);
  await act(page);
  await page.mouse.move(0, 0);
  await page.evaluate(() => window.document.activeElement?.blur());
  await page.waitForTimeout(400);
  await page.screenshot({ path: `${folder}/${name}.png` });
  await page.close();
}

async function read(page, file) {
  await page.locator("#files").setInputFiles(file);
  await page.getByRole("button", { name: /^Read .*\./ }).click();
}

async function ask(page) {
  const kept = page.getByRole("navigation").getByRole("listitem").first().getByRole("button");
  if (await kept.count()) await kept.click();
  else await read(page, document);
  await page.getByRole("textbox").fill(question);
  await page.keyboard.press("Enter");
  await page.locator("blockquote mark strong").waitFor();
}

await picture("page-reading", 1000, 460, "light", async (page) => {
  await read(page, long);
  await page.locator(".curve").waitFor();
  await page.waitForTimeout(1500);
});
await picture("page-answer", 1060, 1130, "light", ask);
await picture("page-phone", 390, 844, "dark", async (page) => {
  await ask(page);
  await page.locator(".answer").first().evaluate((answer) => answer.scrollIntoView());
});
await browser.close();
