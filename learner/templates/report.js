"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const touch = matchMedia("(hover: none)").matches;

  // --- theme -------------------------------------------------------------------------------
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("tessera-theme", root.dataset.theme) } catch (error) { /* storage is off */ }
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

  // --- charts ------------------------------------------------------------------------------
  // Figures name colours by the stylesheet's variables, "var(--c1)" or "var(--c1, .2)".
  const colour = (text) => {
    const found = /^var\((--[a-z0-9]+)(?:, ([.0-9]+))?\)$/.exec(text);
    if (!found) return text;
    const value = getComputedStyle(root).getPropertyValue(found[1]).trim();
    if (!found[2]) return value;
    const part = (at) => parseInt(value.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${found[2]})`;
  };
  const painted = (value) => {
    if (typeof value === "string") return value.startsWith("var(") ? colour(value) : value;
    if (Array.isArray(value)) // numbers, but not a pair of a number and a colour
      return typeof value[0] === "number" && typeof value[1] !== "string" ? value : value.map(painted);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, painted(part)]));
    return value;
  };
  const drawn = new Set();
  const draw = async (place) => {
    try { await drawFigure(place) }
    catch (error) { place.textContent = "This chart cannot be drawn."; drawn.delete(place) }
  };
  const drawFigure = (place) => {
    const figure = painted(data.figures[place.dataset.figure]);
    const axis = { gridcolor: colour("var(--grid)"), zerolinecolor: colour("var(--line)"),
      linecolor: colour("var(--line)"), tickfont: { color: colour("var(--muted)"), size: 11 }, exponentformat: "power" };
    const layout = figure.layout;
    for (const name of ["xaxis", "yaxis"]) {
      layout[name] = { ...axis, ...layout[name] };
      if (layout[name].title) layout[name].title.font = { color: colour("var(--muted)"), size: 11 };
    }
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      dragmode: touch ? false : "zoom",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("var(--ink)") },
      hoverlabel: { bgcolor: colour("var(--panel)"), bordercolor: colour("var(--line)"),
        font: { color: colour("var(--ink)"), size: 12 } },
    });
    if (layout.legend && layout.margin.t) { // above the plot: rows as the width needs them
      const rows = Math.ceil(figure.data.length * 120 / Math.max(place.clientWidth - 60, 120));
      const more = Math.max(24 * rows + 8 - layout.margin.t, 0);
      layout.margin = { ...layout.margin, t: layout.margin.t + more };
      layout.height += more;
    }
    place.style.minHeight = `${layout.height}px`;
    drawn.add(place);
    return Plotly.react(place, figure.data, layout, {
      responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
      modeBarButtonsToRemove: ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
    });
  };
  const redraw = () => drawn.forEach(draw);
  const library = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const charts = async () => {
    const places = [...document.querySelectorAll(".plot")];
    if (!("DecompressionStream" in window)) {
      places.forEach((place) => { place.textContent = "Charts need a browser of 2023 or newer." });
      return;
    }
    await library();
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target) }
    }, { rootMargin: "600px" });
    places.forEach((place) => seen.observe(place));
    addEventListener("beforeprint", () => places.forEach(draw));
  };

  // --- tooltips: on hover, focus and tap -----------------------------------------------------
  const tip = document.getElementById("tip");
  let owner = null;
  const show = (target) => {
    owner = target;
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const at = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(at.left + at.width / 2 - own.width / 2, 6), innerWidth - own.width - 6);
    const above = at.top - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : at.bottom + 8}px`;
  };
  const hide = () => { tip.hidden = true };
  const tipped = (event) => event.target.closest && event.target.closest("[data-tip]");
  for (const kind of ["pointerover", "focusin", "click"])
    document.addEventListener(kind, (event) => { const target = tipped(event); if (target) show(target); else if (kind !== "focusin") hide() });
  for (const kind of ["pointerout", "focusout"])
    document.addEventListener(kind, (event) => { if (tipped(event) && !(kind === "pointerout" && event.pointerType === "touch")) hide() });
  addEventListener("scroll", () => { // focus scrolls an image into view
    if (!tip.hidden && (owner === document.activeElement || owner.matches(":hover"))) show(owner); else hide();
  }, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide() });

  // --- galleries -----------------------------------------------------------------------------
  const made = (name, classes, text) => {
    const element = document.createElement(name);
    if (classes) element.className = classes;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const shown = (value) => value === null ? "–" : Math.abs(value) < 10 ? value.toFixed(3) : value.toPrecision(4);
  const fill = (frame, sheet) => {
    const image = made("img", sheet.art ? "art" : "");
    image.src = sheet.src;
    image.alt = `Images: ${sheet.title}`;
    const cells = sheet.cells, buttons = [];
    if (cells.rows) {
      const names = Object.keys(cells.scores);
      cells.rows.forEach((label, row) => {
        for (let column = 0; column < cells.columns; column++) {
          const scores = names.map((name) => [name, (cells.scores[name][row] || [])[column]])
            .filter(([, value]) => value !== undefined).map(([name, value]) => `${name} ${shown(value)}`);
          const cell = made("button", "cell");
          cell.type = "button";
          cell.dataset.tip = [label, ...scores].join("\n");
          cell.setAttribute("aria-label", `${label}, image ${column + 1}: ${scores.join(", ")}`);
          cell.tabIndex = buttons.length ? -1 : 0;
          Object.assign(cell.style, {
            left: `${100 * (cells.left + column * cells.cell[0]) / sheet.width}%`,
            top: `${100 * (cells.top + row * cells.cell[1]) / sheet.height}%`,
            width: `${100 * cells.cell[0] / sheet.width}%`, height: `${100 * cells.cell[1] / sheet.height}%`,
          });
          buttons.push(cell);
        }
      });
    }
    frame.replaceChildren(image, ...buttons);
    frame.style.maxWidth = `${sheet.width * (sheet.art ? 1.6 : 1)}px`;
  };
  // One cell of a gallery is in the tab order; arrow keys move between them.
  document.addEventListener("keydown", (event) => {
    const cell = event.target;
    if (!cell.classList || !cell.classList.contains("cell")) return;
    const frame = cell.parentElement, all = [...frame.querySelectorAll(".cell")];
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: frame.columns, ArrowUp: -frame.columns }[event.key];
    const next = move && all[all.indexOf(cell) + move];
    if (!next) return;
    event.preventDefault();
    cell.tabIndex = -1; next.tabIndex = 0; next.focus();
  });
  const means = (sheet) => {
    const names = Object.keys(sheet.cells.scores || {});
    return names.map((name) => {
      const values = sheet.cells.scores[name].flat().filter((value) => value !== null);
      return values.length ? `mean ${name} ${shown(values.reduce((a, b) => a + b, 0) / values.length)}` : "";
    }).filter(Boolean).join(" · ");
  };
  const pane = (heading) => {
    const article = made("article", "sheet");
    const title = made("h4", "", heading), frame = made("div", "frame"), note = made("p", "note");
    article.append(title, frame, note);
    const show = (sheet, before) => {
      title.textContent = before + sheet.title;
      note.textContent = means(sheet) || (sheet.cells.rows || before ? "" : "Rewards of single images appear with galleries that have a JSON file beside them.");
      frame.columns = sheet.cells.columns || 1;
      fill(frame, sheet);
      hide();
    };
    return { article, show };
  };
  const galleries = () => {
    const place = document.getElementById("gallery");
    const near = document.getElementById("nearest");
    const of = (gallery, nearest) => gallery.sheets.filter((sheet) => (sheet.step < 0) === nearest);
    if (near) {
      const sheet = data.galleries.flatMap((gallery) => of(gallery, true))[0], one = pane("");
      near.append(one.article);
      one.show(sheet, "");
    }
    if (!place) return;
    const all = data.galleries.map((gallery) => ({ run: gallery.run, sheets: of(gallery, false) })).filter((gallery) => gallery.sheets.length);
    if (!all.length) return;
    const steps = [...new Set(all.flatMap((gallery) => gallery.sheets.map((sheet) => sheet.step)))].sort((a, b) => a - b);
    const several = data.galleries.length > 1;
    if (!several && steps.length > 1) {
      const first = pane("");
      place.append(first.article);
      first.show(all[0].sheets[0], "before: ");
    }
    const panes = all.map((gallery) => ({ ...gallery, pane: pane("") }));
    panes.forEach((each) => place.append(each.pane.article));
    const slider = document.getElementById("step"), output = document.querySelector(".slider output");
    const update = () => {
      const step = steps[Number(slider.value)];
      output.textContent = `${step} of ${steps[steps.length - 1]}`;
      slider.setAttribute("aria-valuetext", `iteration ${step}`);
      for (const each of panes) {
        const fitting = each.sheets.filter((sheet) => sheet.step <= step);
        const sheet = fitting[fitting.length - 1] || each.sheets[0];
        each.pane.show(sheet, several ? `${each.run}: ` : "");
      }
    };
    slider.max = steps.length - 1;
    slider.value = steps.length - 1;
    slider.addEventListener("input", update);
    slider.parentElement.hidden = steps.length < 2;
    update();
  };

  // --- small things ----------------------------------------------------------------------------
  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(button.dataset.copy); button.textContent = "copied" }
    catch (error) { button.textContent = "select it by hand" }
  }));
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.getAttribute("href").slice(1), link]));
  const here = new IntersectionObserver((entries) => {
    for (const entry of entries) links.get(entry.target.id).classList.toggle("here", entry.isIntersecting);
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main > section").forEach((section) => here.observe(section));

  galleries();
  charts().then(() => { root.dataset.ready = "true" });
})();
