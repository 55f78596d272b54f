// Contrast of each visible piece of text with the colors behind it; large text needs 3, other text 4.5 (WCAG AA).
(() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const seen = new Map();
  const rgba = color => {
    if (!seen.has(color)) {
      context.clearRect(0, 0, 1, 1);
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
      seen.set(color, [r, g, b, a / 255]);
    }
    return seen.get(color);
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] > 0) layers.push(color);
      if (color[3] >= 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  // In a figure: the shapes that a pointer at the text's center would meet.
  const within = (text, page) => {
    text.scrollIntoView({block: "center", inline: "center", behavior: "instant"});
    const box = text.getBoundingClientRect();
    const met = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    return met.filter(e => e instanceof SVGElement && !e.closest("text")).reverse().reduce((color, shape) => {
      const style = getComputedStyle(shape);
      if (style.fill === "none" || shape.tagName === "svg" || shape.tagName === "g") return color;
      const [r, g, b, a] = rgba(style.fill);
      return over([r, g, b, a * style.fillOpacity * style.opacity], color);
    }, page);
  };
  const luminance = color => {
    const [r, g, b] = color.slice(0, 3).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const poor = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName) || element.closest("[aria-hidden=true]:not(svg)")) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize), svg = element.closest("svg");
    const page = behind(element), back = svg ? within(element, page) : page, front = over(rgba(svg ? style.fill : style.color), back);
    const [light, dark] = [luminance(front), luminance(back)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) {
      const key = `${element.tagName.toLowerCase()}.${element.className.baseVal ?? element.className} ${ratio.toFixed(2)}`;
      if (!poor.has(key)) poor.set(key, text.slice(0, 40));
    }
  }
  return [...poor].map(([key, text]) => `${key}: ${text}`);
})()
