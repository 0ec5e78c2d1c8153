"use strict";
(() => {
  let fresh = {}; // data of a served page that are newer than those it came with
  const read = (id) => fresh[id] || JSON.parse(document.getElementById(id).textContent);
  const say = (text) => { document.getElementById("said").textContent = text; };
  // One listener for all elements of a kind, those of later updates included.
  const on = (kind, selector, act) => document.addEventListener(kind, (event) => {
    const node = event.target.closest(selector);
    if (node) act(node, event);
  });

  // ---- Pictures -----------------------------------------------------------------------------------------------------
  // A picture is drawn from its data, the switches' settings, the contenders hidden, and the theme's colours;
  // any change draws it anew from these.
  let pictures = new Map();
  const load = () => {
    const unread = { chosen: [], drawn: false, open: false };
    pictures = new Map(read("figures").map((figure) => {
      const { chosen, drawn, open } = pictures.get(figure.id) || unread;
      return [figure.id, { ...figure, chosen: [...chosen], drawn, open }];
    }));
  };
  const hidden = new Map(); // section -> set of names
  const touch = matchMedia("(pointer: coarse)");

  const merge = (base, change) => {
    if (change === null || typeof change !== "object" || Array.isArray(change)) return change;
    const merged = base !== null && typeof base === "object" && !Array.isArray(base) ? { ...base } : {};
    for (const [name, value] of Object.entries(change)) merged[name] = merge(merged[name], value);
    return merged;
  };

  const painted = (value, colour) => {
    if (typeof value === "string") return value.startsWith("var(") ? colour(value.slice(4, -1)) : value;
    if (Array.isArray(value)) return value.length && typeof value[0] === "object" ? value.map((item) => painted(item, colour)) : value;
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, colour)]));
  };

  const themeColour = () => {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(name).trim();
  };

  const composed = (picture) => {
    const section = picture.id.replace(/-[a-z]+$/, "");
    const names = hidden.get(section) || new Set();
    const keys = [...document.querySelectorAll(`.key button[data-section="${section}"]`)];
    const gone = new Set(keys.filter((key) => names.has(key.dataset.name)).map((key) => Number(key.dataset.slot)));
    let layout = picture.layout;
    let data = picture.data.map((trace) => ({ ...trace, visible: !gone.has(trace.meta) }));
    picture.switches.forEach((choices, index) => {
      const option = choices.options[picture.chosen[index] || 0] || choices.options[0];
      layout = merge(layout, option.layout);
      for (const axis of ["x", "y"]) {
        if (option[axis]) data = data.map((trace, number) => ({ ...trace, [axis]: option[axis][number] }));
      }
    });
    // on a touch screen a drag must scroll the page, not zoom into the plot
    if (touch.matches) layout = { ...layout, dragmode: false };
    const colour = themeColour();
    return { data: painted(data, colour), layout: painted(layout, colour) };
  };

  const draw = (picture) => {
    const node = document.getElementById(picture.id);
    if (!node) return;
    const { data, layout } = composed(picture);
    picture.drawn = true;
    node.style.minHeight = "";
    Plotly.react(node, data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: touch.matches ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"],
    });
  };
  const drawAll = () => pictures.forEach(draw);
  const redraw = (picture) => { if (picture.drawn) draw(picture); };

  // A long race has a hundred pictures: each is drawn when the reader comes near it.
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (!entry.isIntersecting) return;
    seen.unobserve(entry.target);
    draw(pictures.get(entry.target.id));
  }), { rootMargin: "800px" });
  const watch = () => pictures.forEach((picture) => {
    const node = document.getElementById(picture.id);
    if (node && !picture.drawn) seen.observe(node);
  });

  on("change", "fieldset[data-plot]", (fieldset, event) => {
    const picture = pictures.get(fieldset.dataset.plot);
    picture.chosen[Number(fieldset.dataset.switch)] = Number(event.target.value);
    redraw(picture);
  });

  // The numbers of a picture as a table, made when it is asked for.
  const numbersOf = (picture) => {
    const plain = document.createElement("textarea"); // turns the entities of plotly's texts into characters
    const rows = composed(picture).data.filter((trace) => trace.visible && trace.hoverinfo !== "skip")
      .flatMap((trace) => (trace.x || []).map((x, index) => [trace.name, x, trace.y[index]])).filter((row) => row[2] !== null);
    const table = document.createElement("table");
    table.createCaption().textContent = picture.title;
    const head = table.createTHead().insertRow();
    for (const text of ["Contender", "across", "up"]) { const th = document.createElement("th"); th.scope = "col"; th.textContent = text; head.append(th); }
    const body = table.createTBody();
    for (const [name, ...numbers] of rows) {
      const row = body.insertRow();
      const th = document.createElement("th");
      th.scope = "row";
      plain.innerHTML = name;
      th.textContent = plain.value;
      row.append(th);
      for (const number of numbers) row.insertCell().textContent = number === null ? "–" : String(number);
    }
    const holder = document.createElement("div");
    holder.className = "scroll numbers-table";
    holder.tabIndex = 0;
    holder.append(table);
    return holder;
  };
  const showNumbers = (button) => {
    const picture = pictures.get(button.dataset.plot);
    const figure = button.closest("figure");
    button.setAttribute("aria-expanded", String(picture.open));
    figure.querySelectorAll(".numbers-table").forEach((table) => table.remove());
    if (picture.open) figure.append(numbersOf(picture));
  };
  on("click", "button.numbers", (button) => {
    const picture = pictures.get(button.dataset.plot);
    picture.open = !picture.open;
    showNumbers(button);
  });

  const press = (button) => {
    const gone = hidden.get(button.dataset.section);
    button.setAttribute("aria-pressed", String(!gone || !gone.has(button.dataset.name)));
  };
  on("click", ".key button", (button) => {
    const { section, name } = button.dataset;
    if (!hidden.has(section)) hidden.set(section, new Set());
    const gone = hidden.get(section);
    if (!gone.delete(name)) gone.add(name);
    press(button);
    pictures.forEach((picture) => { if (picture.id.startsWith(`${section}-`)) redraw(picture); });
  });

  on("click", ".save", (button) => {
    const { data, layout } = composed(pictures.get(button.dataset.plot));
    const background = themeColour()("--card");
    const alone = { ...layout, showlegend: true, paper_bgcolor: background, plot_bgcolor: background };
    Plotly.downloadImage({ data, layout: alone }, { format: "svg", width: 900, height: layout.height + 80, filename: button.dataset.plot });
  });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => pictures.forEach(redraw));
  // Paper is light and of another width than the screen.
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("paper");
    document.querySelectorAll("details:not([open])").forEach((node) => { node.dataset.folded = "yes"; node.open = true; });
    drawAll();
    pictures.forEach((picture) => {
      const node = document.getElementById(picture.id);
      if (node) Plotly.relayout(node, { autosize: false, width: 680 });
    });
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("paper");
    document.querySelectorAll("details[data-folded]").forEach((node) => { delete node.dataset.folded; node.open = false; });
    pictures.forEach((picture) => {
      const node = document.getElementById(picture.id);
      if (node) Plotly.relayout(node, { autosize: true, width: null });
    });
    drawAll();
  });

  // ---- Copy ---------------------------------------------------------------------------------------------------------
  // The clipboard interface is missing or refused in some browsers for files opened from disk; the old way still works there.
  const copyTheOldWay = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return copyTheOldWay(text);
    }
  };
  on("click", "button.copy", async (button) => {
    const code = button.parentElement.querySelector("code");
    const done = await copy(code.textContent);
    if (!done) getSelection().selectAllChildren(code);
    const word = done ? "Copied" : "Selected: press Ctrl+C";
    button.textContent = word;
    button.focus();
    say(word);
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });

  // ---- Downloads ----------------------------------------------------------------------------------------------------
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    let text = Array.isArray(value) ? value.join(" ") : typeof value === "object" ? JSON.stringify(value) : String(value);
    // a spreadsheet would run a text that begins like a formula
    if (/^[=+\-@\t\r]/.test(text) && !/^-?(inf|nan)$/.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (rows) => `${rows.map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;

  // Tables come with the page; those of raw data are columns, each a path into the study.
  const at = (item, path) => path.split(".").reduce((value, name) => (value === null || value === undefined ? value : value[name]), item);
  const items = {
    standings: (study) => study.results.flatMap((task) => task.standings.map((standing) => ({ task, standing }))),
    runs: (study) => study.records,
    curves: (study) => study.records.flatMap((run) => run.curve.step.map((_, index) => (
      { ...run, curve: Object.fromEntries(Object.entries(run.curve).map(([name, values]) => [name, values[index]])) }))),
  };
  const tableOf = (kind) => {
    if (!(kind in items)) { const table = read("tables")[kind]; return [table.columns, ...table.rows]; }
    const columns = read("columns")[kind];
    return [columns.map(([name]) => name), ...items[kind](read("study")).map((item) => columns.map(([, path]) => at(item, path)))];
  };

  const save = (text, filename, type) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = filename;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  on("click", "button.download", (button) => {
    const { kind } = button.dataset;
    if (kind === "json") save(`${JSON.stringify(read("study"), null, 1)}\n`, "piste-race.json", "application/json");
    else save(csv(tableOf(kind)), `piste-${kind}.csv`, "text/csv");
  });

  // ---- Content ------------------------------------------------------------------------------------------------------
  // What is new in `made` is put into `node`, and what is the same stays the same element: nothing flickers, scrolls
  // or loses the focus. What the reader has changed is kept, and put right by `arrange`.
  const OF_THE_READER = new Set(["aria-expanded", "aria-pressed", "checked", "hidden", "open"]);
  const morph = (node, made) => {
    if (node.nodeName !== made.nodeName || node.id !== made.id) { node.replaceWith(made); return; }
    if (node.nodeType !== Node.ELEMENT_NODE) { if (node.data !== made.data) node.data = made.data; return; }
    if (node.classList.contains("plot")) { node.setAttribute("aria-label", made.getAttribute("aria-label")); return; }
    const names = new Set([...node.getAttributeNames(), ...made.getAttributeNames()]);
    for (const name of names) {
      if (OF_THE_READER.has(name) || node.getAttribute(name) === made.getAttribute(name)) continue;
      if (made.hasAttribute(name)) node.setAttribute(name, made.getAttribute(name));
      else node.removeAttribute(name);
    }
    const [olds, news] = [[...node.childNodes], [...made.childNodes]];
    news.forEach((child, index) => { if (index < olds.length) morph(olds[index], child); else node.append(child); });
    olds.slice(news.length).forEach((child) => child.remove());
  };

  const arrange = () => {
    load();
    document.querySelectorAll("button.copy, button.download, button.save, button.numbers").forEach((button) => { button.hidden = false; });
    document.querySelectorAll(".key button").forEach(press);
    document.querySelectorAll("fieldset[data-plot]").forEach((fieldset) => {
      const chosen = pictures.get(fieldset.dataset.plot).chosen[Number(fieldset.dataset.switch)] || 0;
      fieldset.querySelectorAll("input").forEach((input) => { input.checked = Number(input.value) === chosen; });
    });
    document.querySelectorAll("button.numbers").forEach(showNumbers);
    watch();
  };

  document.addEventListener("piste-content", ({ detail }) => {
    fresh = detail;
    const made = new DOMParser().parseFromString(detail.body, "text/html");
    for (const part of ["header", "main"]) morph(document.querySelector(part), made.querySelector(part));
    document.title = `${detail.title} · piste`;
    arrange();
    pictures.forEach(redraw);
  });

  arrange();
  document.documentElement.dataset.ready = "yes";
})();
