// A table whose headings sort it; until one is clicked, rows stay in their order. Columns: label, value (what is sorted by), show (text or node), number, wrap.

function sortable(holder, columns, rows, start, empty) {
  let { column, ascending } = start;
  const draw = () => {
    if (!rows.length) {
      holder.replaceChildren(element("p", {}, empty));
      return;
    }
    const heads = columns.map((each, i) => head(each, i));
    const ordered = column === null ? rows : [...rows].sort((a, b) => compare(a, b, columns[column], ascending));
    holder.replaceChildren(
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)),
        element("tbody", {}, ...ordered.map((row) => line(columns, row)))),
    );
  };
  const head = (each, i) => {
    const button = element("button", { type: "button", title: each.title || `Sort by ${each.label}` }, each.label);
    button.addEventListener("click", () => {
      ascending = i === column ? !ascending : !each.number || Boolean(each.up);
      column = i;
      draw();
      holder.querySelectorAll("th button")[i].focus();
    });
    const order = i === column ? (ascending ? "ascending" : "descending") : "none";
    return element("th", { scope: "col", "aria-sort": order, class: each.number ? "number" : "" }, button);
  };
  draw();
  return (changed) => {
    rows = changed;
    draw();
  };
}

// what has no value, and what is not ranked, stays below whatever the order
function compare(a, b, column, ascending) {
  const [x, y] = [column.value(a), column.value(b)];
  const missing = (v) => v === null || v === undefined;
  if (missing(x) || missing(y)) return missing(x) - missing(y);
  const order = typeof x === "string" ? x.localeCompare(y, "en") : x - y;
  return ascending ? order : -order;
}

function line(columns, row) {
  const cells = columns.map((each) => {
    const kind = [each.number ? "number" : "", each.wrap ? "wrap" : ""].join(" ").trim();
    return element("td", kind ? { class: kind } : {}, each.show(row));
  });
  return element("tr", row.ranked === false ? { class: "unranked" } : {}, ...cells);
}
