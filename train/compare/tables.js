// The table of runs, sorted by a click.
function sortBy(button) {
  const table = at("runs-table"), body = table.tBodies[0], column = Number(button.dataset.column);
  const head = button.closest("th");
  const down = head.getAttribute("aria-sort") === "ascending";
  const value = (row) => {
    const key = row.cells[column].dataset.key;
    return key === undefined ? null : key !== "" && Number.isFinite(Number(key)) ? Number(key) : key;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a) < String(b) ? -1 : String(a) > String(b) ? 1 : 0);
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null); // what is not known is last, either way
    return down ? compare(y, x) : compare(x, y);
  });
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}

at("runs-table").tHead.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) sortBy(button);
});
