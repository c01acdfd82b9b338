// The page works without this: a sign in the chart is a link to its sample. With it, the sample appears beside the
// chart, and its signs, lines and cards are marked.
(() => {
  const chosen = document.getElementById("chosen");
  let marked = [];

  function mark(index) {
    for (const part of marked) part.classList.remove("chosen");
    marked = [...document.querySelectorAll(`[data-sample="${Number(index)}"]`)];
    for (const part of marked) {
      part.classList.add("chosen");
      if (part.matches("path.sample")) part.parentNode.insertBefore(part, part.parentNode.lastElementChild);
    }
  }

  function show(card) {
    const copy = card.cloneNode(true);
    copy.removeAttribute("id");
    const note = document.createElement("p");
    const link = document.createElement("a");
    link.href = `#${card.id}`;
    link.textContent = "Show it in its gallery";
    note.append(link);
    chosen.replaceChildren(copy, note);
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-sample]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const index = link.dataset.sample;
    const card = document.getElementById(`sample-${index}`);
    mark(index);
    if (chosen && card && link.closest("svg")) {
      event.preventDefault();
      show(card);
    }
  });

  function follow() {
    const [, index] = /^#sample-(\d+)$/.exec(location.hash) ?? [];
    if (index) mark(index);
  }
  addEventListener("hashchange", follow);
  follow();
})();
