/**
 * Says what is wrong with the page that it runs in, a sentence each. Runs within the browser, so it can use nothing from outside of itself.
 */
export function inspectPage({ figures, shown, isPrint }) {
  const found = [];
  const isNumber = (text) => /^[-−+]?[\d.,]+(e[-+]?\d+)?%?$/i.test(text.trim());
  const describe = (element) => element.outerHTML.replace(/\s+/g, " ").slice(0, 120);
  const width = document.documentElement.clientWidth;
  // Text on a screen is legible from about here on.
  const smallestText = 10;

  function checkOverflow() {
    const all = document.scrollingElement;
    if (all.scrollWidth > width) found.push(`overflow: the page is ${all.scrollWidth} pixels wide, the window ${width}`);
    const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
    const isInBox = (element) => element.parentElement?.closest("svg, .scroll, pre") != null;
    for (const element of document.body.querySelectorAll("*")) {
      const box = element.getBoundingClientRect();
      if (box.width > 0 && !isInBox(element) && (box.right > width + 1 || box.left < -1)) {
        found.push(`overflow: from ${box.left} to ${box.right} of ${width} pixels: ${describe(element)}`);
      }
      const isCut = element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0;
      const mayScroll = scrolls(element) && !isPrint;
      if (isCut && !mayScroll && getComputedStyle(element).display !== "inline" && !element.closest("svg, .scroll, pre")) {
        found.push(`overflow: ${element.scrollWidth} pixels in ${element.clientWidth}: ${describe(element)}`);
      }
    }
    if (!isPrint) return;
    for (const element of document.querySelectorAll(".scroll, pre")) {
      if (element.scrollWidth > element.clientWidth + 1) found.push(`cut off on paper: ${describe(element)}`);
    }
  }

  function checkTexts(svg, caption) {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const texts = [...svg.querySelectorAll("text")].map((text) => ({
      text: text.textContent.trim(),
      box: text.getBoundingClientRect(),
      size: parseFloat(getComputedStyle(text).fontSize) * scale,
    }));
    const ticks = texts.filter(({ text }) => isNumber(text));
    if (ticks.length < 4) found.push(`figure "${caption}": ${ticks.length} numbers on its axes`);
    if (texts.length - ticks.length < 2) found.push(`figure "${caption}": its axes have no names`);
    for (const { text, box: at, size } of texts) {
      const isOutside = at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1;
      if (isOutside) found.push(`figure "${caption}": "${text}" does not fit in`);
      if (size < smallestText) found.push(`figure "${caption}": "${text}" is ${size.toFixed(1)} pixels high`);
    }
    texts.forEach((one, index) => {
      for (const other of texts.slice(index + 1)) {
        const across = Math.min(one.box.right, other.box.right) - Math.max(one.box.left, other.box.left);
        const down = Math.min(one.box.bottom, other.box.bottom) - Math.max(one.box.top, other.box.top);
        // Boxes of glyphs are higher than what is drawn.
        if (across > 1 && down > 4) found.push(`figure "${caption}": "${one.text}" and "${other.text}" overlap`);
      }
    });
  }

  function checkFigures() {
    const all = [...document.querySelectorAll("figure")];
    const captions = all.map((figure) => figure.querySelector("figcaption")?.textContent.trim() ?? "");
    if (figures && JSON.stringify(captions) !== JSON.stringify(figures)) {
      found.push(`figures: ${JSON.stringify(captions)} instead of ${JSON.stringify(figures)}`);
    }
    all.forEach((figure, index) => {
      const drawings = [...figure.querySelectorAll("svg, img")];
      if (drawings.length === 0) found.push(`figure "${captions[index]}": nothing is drawn`);
      for (const drawing of drawings) {
        const box = drawing.getBoundingClientRect();
        if (box.width < 200 || box.height < 100) found.push(`figure "${captions[index]}": ${box.width} by ${box.height} pixels`);
        const name = drawing.closest("[role=img]")?.getAttribute("aria-label") ?? drawing.getAttribute("alt");
        if (!name) found.push(`figure "${captions[index]}": a drawing has no name`);
        if (drawing.matches("svg")) checkTexts(drawing, captions[index]);
        else if (!drawing.complete || drawing.naturalWidth === 0) found.push(`figure "${captions[index]}": its image is broken`);
      }
    });
  }

  function checkRest() {
    if (document.scripts.length > 0) found.push(`${document.scripts.length} scripts`);
    if (globalThis.executed) found.push("a text was executed");
    for (const element of document.querySelectorAll("main > section, header, footer, h1, h2, table, figure, article")) {
      if (!element.checkVisibility() || element.getBoundingClientRect().height === 0) found.push(`not visible: ${describe(element)}`);
    }
    const text = document.body.innerText;
    for (const expected of shown) if (!text.includes(expected)) found.push(`not shown: ${JSON.stringify(expected)}`);
    if (!isPrint) return;
    const [red] = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
    if (red < 250) found.push(`paper is printed over: ${getComputedStyle(document.body).backgroundColor}`);
  }

  checkOverflow();
  checkFigures();
  checkRest();
  return found;
}
