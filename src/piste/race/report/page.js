"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const say = (text) => { document.getElementById("said").textContent = text; };
  const reveal = (selector) => document.querySelectorAll(selector).forEach((node) => { node.hidden = false; });

  // ---- Pictures -----------------------------------------------------------------------------------------------------
  // A picture is drawn from its data, the switches' settings, the contenders hidden, and the theme's colours;
  // any change draws it anew from these.
  const pictures = new Map(read("figures").map((figure) => [figure.id, { ...figure, chosen: [], drawn: false }]));
  const hidden = new Map(); // section -> set of slots
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
    const gone = hidden.get(picture.id.replace(/-[a-z]+$/, "")) || new Set();
    let layout = picture.layout;
    let data = picture.data.map((trace) => ({ ...trace, visible: !gone.has(trace.meta) }));
    picture.switches.forEach((choices, index) => {
      const option = choices.options[picture.chosen[index] || 0];
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
  const watch = () => {
    const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
      if (!entry.isIntersecting) return;
      seen.unobserve(entry.target);
      draw(pictures.get(entry.target.id));
    }), { rootMargin: "800px" });
    pictures.forEach((picture) => { const node = document.getElementById(picture.id); if (node) seen.observe(node); });
  };

  document.querySelectorAll("fieldset[data-plot]").forEach((fieldset) => {
    fieldset.addEventListener("change", (event) => {
      const picture = pictures.get(fieldset.dataset.plot);
      picture.chosen[Number(fieldset.dataset.switch)] = Number(event.target.value);
      redraw(picture);
    });
  });

  // The numbers of a picture as a table, made when it is asked for.
  document.querySelectorAll("button.numbers").forEach((button) => {
    button.addEventListener("click", () => {
      const figure = button.closest("figure");
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      if (open) { figure.querySelector(".numbers-table").remove(); return; }
      const picture = pictures.get(button.dataset.plot);
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
      figure.append(holder);
    });
  });

  document.querySelectorAll(".key button").forEach((button) => {
    button.addEventListener("click", () => {
      const { section, slot } = button.dataset;
      if (!hidden.has(section)) hidden.set(section, new Set());
      const gone = hidden.get(section);
      const show = gone.delete(Number(slot));
      if (!show) gone.add(Number(slot));
      button.setAttribute("aria-pressed", String(show));
      pictures.forEach((picture) => { if (picture.id.startsWith(`${section}-`)) redraw(picture); });
    });
  });

  document.querySelectorAll(".save").forEach((button) => {
    button.addEventListener("click", () => {
      const { data, layout } = composed(pictures.get(button.dataset.plot));
      const background = themeColour()("--card");
      const alone = { ...layout, showlegend: true, paper_bgcolor: background, plot_bgcolor: background };
      Plotly.downloadImage({ data, layout: alone }, { format: "svg", width: 900, height: layout.height + 80, filename: button.dataset.plot });
    });
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
  document.querySelectorAll("button.copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      const done = await copy(code.textContent);
      if (!done) getSelection().selectAllChildren(code);
      const word = done ? "Copied" : "Selected: press Ctrl+C";
      button.textContent = word;
      button.focus();
      say(word);
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
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
  document.querySelectorAll("button.download").forEach((button) => {
    button.addEventListener("click", () => {
      const { kind } = button.dataset;
      if (kind === "json") save(`${JSON.stringify(read("study"), null, 1)}\n`, "piste-race.json", "application/json");
      else save(csv(tableOf(kind)), `piste-${kind}.csv`, "text/csv");
    });
  });

  reveal("button.copy, button.download, button.save, button.numbers");
  watch();
  document.documentElement.dataset.ready = "yes";
})();
