// Characters that are drawn as the box of a missing glyph.
(() => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 40, height: 40});
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.font = "24px " + getComputedStyle(document.body).fontFamily;
  const drawn = character => {
    context.clearRect(0, 0, 40, 40);
    context.fillText(character, 4, 30);
    return context.getImageData(0, 0, 40, 40).data.join();
  };
  const missing = drawn("\u{10FFFE}");
  return [...new Set(document.body.textContent)].filter(c => !/[\s\p{Cf}\p{Co}\p{Cn}]/u.test(c) && drawn(c) === missing);
})()
