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

  document.querySelectorAll("fieldset[data-plot]").forEach((fieldset) => {
    fieldset.addEventListener("change", (event) => {
      const picture = pictures.get(fieldset.dataset.plot);
      picture.chosen[Number(fieldset.dataset.switch)] = Number(event.target.value);
      draw(picture);
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
      pictures.forEach((picture) => { if (picture.id.startsWith(`${section}-`)) draw(picture); });
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

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // Paper is light and of another width than the screen.
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("paper");
    drawAll();
    pictures.forEach((picture) => {
      const node = document.getElementById(picture.id);
      if (node) Plotly.relayout(node, { autosize: false, width: 680 });
    });
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("paper");
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

  const standingsTable = (study) => {
    const rows = [];
    for (const task of study.results) {
      for (const standing of task.standings) {
        const { cost, best_hyperparameters: best, ...rest } = standing;
        const row = { task: task.task, metric: task.metric_name, ...rest, lr: best.lr, best_hyperparameters: best, ...cost };
        if (!rows.length) rows.push(Object.keys(row));
        rows.push(Object.values(row));
      }
    }
    return rows;
  };
  const keyColumns = ["task", "contender", "optimizer", "schedule", "steps", "seed", "phase", "device"];
  const keyCells = (run) => [run.id, ...keyColumns.map((name) => run.key[name]), run.key.hyperparameters.lr];
  const runsTable = (study) => {
    const costs = Object.keys((study.records[0] || { cost: {} }).cost);
    const head = ["id", ...keyColumns, "lr", "hyperparameters", "status", "message", "test_loss", "test_metric", ...costs, "created"];
    return [head, ...study.records.map((run) => [...keyCells(run), run.key.hyperparameters, run.status, run.message,
      run.test_loss, run.test_metric, ...costs.map((name) => run.cost[name]), run.created])];
  };
  const curvesTable = (study) => {
    const columns = ["step", "train_seconds", "train_loss", "valid_loss", "valid_metric"];
    return [["id", ...keyColumns, "lr", ...columns], ...study.records.flatMap((run) =>
      run.curve.step.map((_, index) => [...keyCells(run), ...columns.map((name) => run.curve[name][index])]))];
  };
  const makers = { standings: standingsTable, runs: runsTable, curves: curvesTable };

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
      else save(csv(makers[kind](read("study"))), `piste-${kind}.csv`, "text/csv");
    });
  });

  reveal("button.copy, button.download, button.save");
  drawAll();
  document.documentElement.dataset.ready = "yes";
})();
