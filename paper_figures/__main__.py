"""Every table and figure from the committed results: `python -m paper_figures`, or `make figures`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.errors import ExperimentError
from experiments.files import write_text
from paper_figures import published, style
from paper_figures.committed import Committed
from paper_figures.registry import Maker, Product, makers
from paper_figures.typesetting import Table
from uniproj import ProjectionError, console, plugins

OUT = Path(__file__).with_name("out")


def write(committed: Committed, chosen: Mapping[str, Maker], out: Path) -> list[Table]:
    """The files of these tables and figures, once all of them are made."""
    with style.use():
        made = {name: _products(name, make(committed)) for name, make in chosen.items()}
    for name, products in made.items():
        if not any(isinstance(product, Figure) for product in products):
            # an earlier call may have had something to draw
            for kind in ("png", "pdf"):
                (out / f"{name}.{kind}").unlink(missing_ok=True)
        for product in products:
            if isinstance(product, Table):
                product.write(out / name)
            else:
                style.save(product, out / name)
    return [product for products in made.values() for product in products if isinstance(product, Table)]


def _products(name: str, found: Product | Sequence[Product]) -> list[Product]:
    """What a figure's function returned, alone or in a sequence. Raises ExperimentError for anything else."""
    products = list(found) if isinstance(found, Sequence) else [found]
    if other := [type(product).__name__ for product in products if not isinstance(product, Product)]:
        raise ExperimentError(f"figures: {name} must return tables and figures, got a {other[0]}. Repair it.")
    return products


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of committed results")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tables and figures by name")
    plugins.add_option(parser, "+")
    args = parser.parse_args(argv)
    try:
        plugins.load(args.plugins)
        committed, known = Committed(args.results), makers()
        names = args.only or list(known)
        if unknown := sorted(set(names) - set(known)):
            raise ExperimentError(f"figures: {unknown} must be names of {', '.join(known)}.")
        tables = write(committed, {name: known[name] for name in names}, args.out)
        if set(names) == set(known):
            # every table and every published claim on one page
            pages = [table.markdown() for table in tables]
            said = "".join(f"- {claim}\n" for claim in published.claims())
            heading = "## What is reported of the paper without numbers\n\n"
            write_text(args.out / "tables.md", "\n".join(["# Tables\n", *pages, heading + said]))
    except (ExperimentError, ProjectionError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Tables and figures: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
