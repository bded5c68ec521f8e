// Opens evaluation reports in a real browser and says what is wrong with them.
//
//   node check.mjs [--screenshots FOLDER] [--visits NAME,NAME] REPORT_FOLDER...
//
// Each folder holds a report.html and may hold an expected.json: {"figures": [captions], "shown": [texts], "hidden": [texts behind a click]}.
// Exit code: 0 all is well, 1 something is wrong (a line each), 77 there is nothing to check with (the reason is printed).
// The browser is $RLHF_CHROMIUM or the first of chromium, chromium-browser and google-chrome on the path.

import { accessSync, constants, existsSync, mkdirSync, readFileSync } from "node:fs";
import { basename, delimiter, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { inspectPage } from "./inspect.mjs";

const NOTHING_TO_CHECK_WITH = 77;
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const MORE_FLAGS = ["--disable-component-update", "--disable-sync"];
// A sheet of A4 without its margins, at the 96 pixels an inch of CSS.
const PAPER = { width: 718, height: 1047 };
// Of a screenshot, in pixels.
const SLICE = 2000;
const MOST_SLICES = 12;
const TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];

const VISITS = [
  // The accessibility check takes most of the time: each width and each scheme is held to it once.
  { name: "380-light", width: 380, scheme: "light", accessibility: true },
  { name: "380-dark", width: 380, scheme: "dark" },
  { name: "1400-light", width: 1400, scheme: "light" },
  { name: "1400-dark", width: 1400, scheme: "dark", accessibility: true },
  { name: "380-without-scripts", width: 380, scheme: "light", scripts: false },
  { name: "print", width: PAPER.width, scheme: "light", print: true },
  // Paper is white whatever the screen was.
  { name: "print-from-dark", width: PAPER.width, scheme: "dark", print: true },
];

function cannot(reason) {
  console.log(reason);
  process.exit(NOTHING_TO_CHECK_WITH);
}

function findBrowser() {
  if (process.env.RLHF_CHROMIUM) return process.env.RLHF_CHROMIUM;
  const names = ["chromium", "chromium-browser", "google-chrome"];
  const folders = (process.env.PATH ?? "").split(delimiter).filter(Boolean);
  for (const path of names.flatMap((name) => folders.map((folder) => join(folder, name)))) {
    try {
      accessSync(path, constants.X_OK);
      return path;
    } catch {
      // Not here.
    }
  }
  return cannot(`there is no browser: none of ${names.join(", ")} is on the path, and RLHF_CHROMIUM is not set`);
}

async function readPackages() {
  try {
    const [{ chromium }, { default: axe }] = await Promise.all([import("playwright-core"), import("axe-core")]);
    return { chromium, axe };
  } catch (error) {
    return cannot(`the packages of tests/browser are missing (npm ci --prefix tests/browser): ${error.message}`);
  }
}

/** What the browser itself complains of or does that a report must not do. */
function listen(page, address, found) {
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) found.push(`console ${message.type()}: ${message.text()}`);
  });
  page.on("pageerror", (error) => found.push(`script error: ${error.message}`));
  page.on("dialog", (dialog) => {
    found.push(`dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  page.on("popup", (popup) => found.push(`window opened: ${popup.url()}`));
  page.on("request", (request) => {
    const url = request.url();
    if (url !== address && !url.startsWith("data:")) found.push(`request: ${url}`);
  });
}

async function checkAccessibility(page, axe, found) {
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate((tags) => window.axe.run({ runOnly: tags }), TAGS);
  for (const { id, help, nodes } of violations) {
    found.push(`accessibility: ${id}: ${help}: ${nodes.length} times, first ${nodes[0].html.slice(0, 200)}`);
  }
}

/** What is offensive shows after a click on its summary, and not before. */
async function checkHidden(page, hidden, found) {
  const missing = async (isWanted) => {
    const text = await page.evaluate(() => document.body.innerText);
    return hidden.filter((expected) => text.includes(expected) !== isWanted);
  };
  for (const text of await missing(false)) found.push(`shown without a click: ${JSON.stringify(text)}`);
  const before = await page.locator("details[open]").count();
  if (before > 0) found.push(`${before} details are open from the start`);
  // One as a person does it, the others at once.
  if (await page.locator("summary").count()) await page.locator("summary").first().click();
  await page.evaluate(() => document.querySelectorAll("details:not([open]) > summary").forEach((summary) => summary.click()));
  for (const text of await missing(true)) found.push(`not shown after a click: ${JSON.stringify(text)}`);
}

async function check(browser, axe, folder, visit, screenshots) {
  const { name, width, scheme, print = false, scripts = true, accessibility = false } = visit;
  const address = pathToFileURL(join(folder, "report.html")).href;
  const described = join(folder, "expected.json");
  const expected = existsSync(described) ? JSON.parse(readFileSync(described, "utf8")) : {};
  const viewport = { width, height: PAPER.height };
  const context = await browser.newContext({ viewport, colorScheme: scheme, javaScriptEnabled: scripts });
  const found = [];
  try {
    const page = await context.newPage();
    listen(page, address, found);
    if (print) await page.emulateMedia({ media: "print" });
    await page.goto(address);
    const wanted = { figures: expected.figures, shown: expected.shown ?? [], isPrint: print };
    found.push(...(await page.evaluate(inspectPage, wanted)));
    if (screenshots) await take(page, join(screenshots, `${basename(folder)}-${name}`), print);
    if (print) await page.pdf({ format: "A4" });
    if (scripts && !print) {
      await checkHidden(page, expected.hidden ?? [], found);
      // What was behind the clicks is held to the same.
      found.push(...(await page.evaluate(inspectPage, wanted)));
      if (accessibility) await checkAccessibility(page, axe, found);
    }
  } finally {
    await context.close();
  }
  return [...new Set(found)].map((what) => `${basename(folder)}, ${name}: ${what}`);
}

/** Writes the page as it looks in slices of a screen or two, as a browser draws no picture of a very long one. */
async function take(page, path, isPrint) {
  mkdirSync(resolve(path, ".."), { recursive: true });
  if (isPrint) await page.pdf({ path: `${path}.pdf`, format: "A4" });
  const { width } = page.viewportSize();
  const height = await page.evaluate(() => document.documentElement.scrollHeight);
  await page.setViewportSize({ width, height: SLICE });
  for (let slice = 0; slice < Math.min(MOST_SLICES, Math.ceil(height / SLICE)); slice += 1) {
    await page.evaluate((top) => window.scrollTo(0, top), slice * SLICE);
    await page.screenshot({ path: `${path}-${slice + 1}.png` });
  }
}

async function main(given) {
  const flags = { "--screenshots": undefined, "--visits": undefined };
  while (given[0] in flags) flags[given[0]] = given.splice(0, 2)[1];
  const wanted = flags["--visits"]?.split(",") ?? VISITS.map(({ name }) => name);
  const visits = VISITS.filter(({ name }) => wanted.includes(name));
  if (given.length === 0 || visits.length !== wanted.length) {
    console.log("usage: node check.mjs [--screenshots FOLDER] [--visits NAME,NAME] REPORT_FOLDER...");
    console.log(`visits: ${VISITS.map(({ name }) => name).join(", ")}`);
    return 2;
  }
  const { chromium, axe } = await readPackages();
  const browser = await chromium.launch({ executablePath: findBrowser(), args: [...FLAGS, ...MORE_FLAGS] });
  try {
    let isGood = true;
    for (const folder of given.map((folder) => resolve(folder))) {
      for (const visit of visits) {
        for (const line of await check(browser, axe, folder, visit, flags["--screenshots"])) {
          isGood = false;
          console.log(line);
        }
      }
    }
    return isGood ? 0 : 1;
  } finally {
    await browser.close();
  }
}

process.exitCode = await main(process.argv.slice(2));
