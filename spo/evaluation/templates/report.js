// Cards of the same prompt by every model: sorted, searched and enlarged.
// The state stands in the URL: #sort=loss&scorer=pickscore&model=NAME&search=cat
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const gallery = document.getElementById("gallery");
  const PAGE = 24; // cards that "show more" adds
  const compared = data.models.length > 1;
  const first = compared ? 1 : 0; // the models that can be sorted by
  const SORTS = {
    prompt: "prompt order",
    gain: compared ? "best gains first" : "highest scores first",
    loss: compared ? "worst losses first" : "lowest scores first",
  };
  const DEFAULTS = {
    sort: "prompt",
    scorer: data.scorers[0].name,
    model: data.models[data.models.length - 1].name,
    search: "",
  };
  let state = readState();
  let count = PAGE;

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function number(value, signed) {
    const size = Math.abs(value);
    const text = size.toFixed(size < 10 ? 3 : size < 100 ? 2 : size < 1000 ? 1 : 0);
    const sign = Number(text) === 0 ? "" : value < 0 ? "\u2212" : "+";
    return (signed ? sign : sign.replace("+", "")) + text;
  }

  function indexOf(list, name) {
    return list.findIndex((each) => each.name === name);
  }

  function readState() {
    const wanted = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    const read = { ...DEFAULTS };
    if (wanted.sort in SORTS) read.sort = wanted.sort;
    if (indexOf(data.scorers, wanted.scorer) >= 0) read.scorer = wanted.scorer;
    if (indexOf(data.models, wanted.model) >= first) read.model = wanted.model;
    if (wanted.search) read.search = wanted.search;
    return read;
  }

  function writeState() {
    const changed = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
    history.replaceState(null, "", "#" + new URLSearchParams(changed));
  }

  // What a model gained over the first by a scorer; of a single model, its score.
  function gain(row, model, scorer) {
    return row.scores[model][scorer] - (compared ? row.scores[0][scorer] : 0);
  }

  function selected() {
    const model = indexOf(data.models, state.model);
    const scorer = indexOf(data.scorers, state.scorer);
    const text = state.search.toLowerCase();
    const rows = data.prompts.filter((row) => row.prompt.toLowerCase().includes(text));
    if (state.sort === "prompt") return rows;
    const direction = state.sort === "gain" ? -1 : 1;
    return rows.sort((a, b) => direction * (gain(a, model, scorer) - gain(b, model, scorer)));
  }

  function picture(row, model) {
    const alt = `${data.models[model].name}: ${row.prompt}`;
    const image = element("img", { src: row.images[model], alt });
    image.addEventListener("load", () => {
      const side = Math.max(image.naturalWidth, image.naturalHeight);
      image.classList.toggle("tiny", side <= data.pixelated);
    });
    return image;
  }

  function scoreTable(row, model) {
    const table = element("table", { className: "scores" });
    data.scorers.forEach((scorer, s) => {
      const line = table.insertRow();
      line.append(element("th", { scope: "row", title: scorer.title }, scorer.title));
      line.append(element("td", {}, number(row.scores[model][s], false)));
      if (!compared) return;
      const difference = model > 0 ? gain(row, model, s) : 0;
      const kind = difference > 0 ? "gain" : difference < 0 ? "loss" : "";
      line.append(element("td", { className: kind }, model > 0 ? number(difference, true) : ""));
    });
    return table;
  }

  function modelName(model) {
    const swatch = element("i", { className: "swatch" });
    swatch.style.background = data.models[model].colour;
    return element("span", { className: "name" }, swatch, data.models[model].name);
  }

  function card(row) {
    const seed = row.seed === null ? "" : ` · seed ${row.seed}`;
    const seen = row.seen ? ` · trained on by ${row.seen}` : "";
    const heading = element(
      "p",
      { className: "prompt" },
      element("span", { className: "quiet" }, `${row.number}${seed}${seen}`),
      element("bdi", {}, row.prompt),
    );
    const figures = data.models.map((_, model) => {
      const properties = { type: "button", className: "picture", title: "enlarge" };
      const button = element("button", properties, picture(row, model));
      button.addEventListener("click", () => enlarge(row, model));
      return element("figure", {}, button, modelName(model), scoreTable(row, model));
    });
    const models = element("div", { className: "models" }, ...figures);
    const made = element("article", { className: "card" }, heading, models);
    made.dataset.number = row.number;
    return made;
  }

  // The arrow keys go from model to model: a difference shows best in one place.
  const dialog = element("dialog");
  function enlarge(row, model) {
    const turn = (by) => enlarge(row, (model + by + data.models.length) % data.models.length);
    const hint = compared ? element("span", { className: "quiet" }, "← → other models") : "";
    const caption = element("p", {}, modelName(model), hint);
    const prompt = element("p", {}, element("bdi", {}, row.prompt));
    dialog.replaceChildren(picture(row, model), caption, prompt);
    dialog.onkeydown = (event) => {
      if (event.key === "ArrowRight") turn(1);
      if (event.key === "ArrowLeft") turn(-1);
    };
    dialog.onclick = () => dialog.close();
    if (!dialog.open) dialog.showModal();
  }

  const cards = element("div", { className: "cards" });
  cards.style.setProperty("--models", data.models.length);
  const status = element("span", { className: "quiet", role: "status" });
  const more = element("button", { type: "button", className: "more" });

  function draw() {
    const rows = selected();
    cards.replaceChildren(...rows.slice(0, count).map(card));
    status.textContent = `${Math.min(count, rows.length)} of ${rows.length} prompts`;
    more.hidden = rows.length <= count;
    more.textContent = `Show ${Math.min(PAGE, rows.length - count)} more`;
  }

  function change(key, value) {
    state[key] = value;
    count = PAGE;
    writeState();
    draw();
  }

  function choice(key, label, options) {
    const select = element("select");
    for (const [value, text] of options) select.append(element("option", { value }, text));
    select.addEventListener("change", () => change(key, select.value));
    return [element("label", { hidden: options.length < 2 }, label, select), select];
  }

  const names = (list, label) => list.map((each) => [each.name, each[label]]);
  const search = element("input", { type: "search", placeholder: "words of the prompt" });
  search.addEventListener("input", () => change("search", search.value));
  const choices = {
    sort: choice("sort", "Order", Object.entries(SORTS)),
    scorer: choice("scorer", "Scorer", names(data.scorers, "title")),
    model: choice("model", "Model", names(data.models.slice(first), "name")),
  };

  function start() {
    state = readState();
    for (const [key, [, select]] of Object.entries(choices)) select.value = state[key];
    search.value = state.search;
    draw();
  }

  more.addEventListener("click", () => {
    count += PAGE;
    draw();
  });
  window.addEventListener("hashchange", start);
  const labels = Object.values(choices).map(([label]) => label);
  const controls = [...labels, element("label", {}, "Search", search), status];
  gallery.replaceChildren(element("form", { className: "controls" }, ...controls), cards, more);
  gallery.firstChild.addEventListener("submit", (event) => event.preventDefault());
  document.body.append(dialog);
  start();
})();
