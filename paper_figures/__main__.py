"""Every table and figure from the committed results: `python -m paper_figures`, or `make figures`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import uniproj
from analysis import intrinsic_dimension, landscape, spectrum, style
from analysis.reconstruction.figure import ENERGIES
from analysis.report import cards
from experiments.errors import ExperimentError
from experiments.files import write_text
from paper_figures import comparison, published, tables
from paper_figures.charts import cost, curves, differences, energy, fastfood, gram, parts, scores, sizes
from paper_figures.comparison import Comparison
from paper_figures.paper import COMPARISONS
from paper_figures.sources import NOT_RUN, Results, Sweep
from paper_figures.table import Table
from uniproj import console

OUT = Path(__file__).with_name("out")
Product = Table | Figure
# columns of the tables that an analysis's own picture needs
SPECTRUM = {
    "spectrum": ("projection", "variant", "D", "d", "delta_W_stable_rank"),
    "values": ("projection", "variant", "place", "sigma"),
}
LANDSCAPE = {
    "gradients": ("projection", "D", "d", "mean", "least", "largest", "random", "isometric", "n"),
    "losses": ("projection", "direction", "t", "loss"),
}


class Book:
    """The tables and figures, each made from what is at hand when it is asked for."""

    def __init__(self, results: Results):
        self.results = results
        self.published = published.read()

    @cached_property
    def cards(self) -> list[dict]:
        return [{**cards.describe(name), "verdicts": cards.verdicts(cards.instance(name)).to_dict("records")}
                for name in uniproj.names()]  # fmt: skip

    @cached_property
    def model(self) -> pd.DataFrame | None:
        return self.results.table(
            "overhead/overhead-model.csv",
            "base",
            "method",
            "trained",
            "step_ratio",
            "step_ratio_low",
            "step_ratio_high",
            "step_pairs",
            "peak_bytes",
            "peak_bytes_per_coordinate_beyond_lora",
            "file_bytes",
        )

    @cached_property
    def budget(self) -> Sweep | None:
        return self.results.sweep("glue_budget")

    @cached_property
    def sweeps(self) -> list[Sweep]:
        return self.results.sweeps()

    @cached_property
    def gaps(self) -> pd.DataFrame:
        return pd.DataFrame() if self.budget is None else self.budget.differences(differences.REFERENCE)

    def compared(self, spec: Comparison) -> Sequence[Product]:
        """A table, and a figure where there is a number to draw."""
        rows = comparison.rows(spec, self.published, self.results)
        table = comparison.table(spec, rows, self.published)
        return [table, scores.draw(spec, rows)] if scores.drawn(rows) else [table]

    def properties(self) -> Sequence[Product]:
        return [tables.properties(self.cards, cards.SPACE)]

    def measured(self) -> Sequence[Product]:
        verdicts = self.results.table("isometry/isometry-verdicts.csv", "variant", "verdict", "sigma_min", "coherence")
        columns = self.results.table(
            "sharing/sharing-columns.csv", "variant", "modules_per_column", "n_min", "row_mean"
        )
        return [tables.measured(verdicts, columns)]

    def energy(self) -> Sequence[Product]:
        found = self.results.table("reconstruction/reconstruction-energy.csv", "projection", "random", *ENERGIES, "D")
        return [energy.draw(found)]

    def ablations(self) -> Sequence[Product]:
        found = tables.ablations(self.budget, self.gaps, differences.ABLATIONS, differences.REFERENCE)
        return found, differences.draw(self.budget, self.gaps)

    def fastfood(self) -> Sequence[Product]:
        return tables.fastfood(self.budget, self.model, fastfood.METHODS), fastfood.draw(self.budget, self.model)

    def against_d(self) -> Sequence[Product]:
        sweep = self.results.sweep("score_against_d")
        title = "Score against d"
        found = tables.scan("score_against_d", title, "trained", "trained numbers", self.published, sweep)
        return found, sizes.against_d(self.published, sweep)

    def against_r(self) -> Sequence[Product]:
        sweep = self.results.sweep("score_against_r")
        found = tables.scan("score_against_r", "Score against the rank", "r", "r", self.published, sweep)
        return found, sizes.against_r(self.published, sweep)

    def against_rows(self) -> Sequence[Product]:
        sweep = self.results.sweep("score_against_rows")
        title = "Score against the number of training rows"
        found = tables.scan("score_against_rows", title, "train_size", "training rows", self.published, sweep)
        return found, sizes.against_rows(sweep)

    def intrinsic_dimension(self) -> Sequence[Product]:
        sweep = self.results.sweep("score_against_d")
        if sweep is None:
            return tables.intrinsic(None), parts.missing(f"intrinsic dimension: {NOT_RUN}")
        found = intrinsic_dimension.summary(sweep.finished)
        return tables.intrinsic(found["d90"]), intrinsic_dimension.draw(found)

    def spectrum(self) -> Sequence[Product]:
        return [self._drawn("spectrum", spectrum.draw, SPECTRUM)]

    def landscape(self) -> Sequence[Product]:
        return [self._drawn("landscape", landscape.draw, LANDSCAPE)]

    def _drawn(
        self, name: str, draw: Callable[[Mapping[str, pd.DataFrame]], Figure], needed: Mapping[str, Sequence[str]]
    ) -> Figure:
        """The picture of an analysis from its committed tables."""
        found = {key: self.results.table(f"{name}/{name}-{key}.csv", *columns) for key, columns in needed.items()}
        at_hand = {key: table for key, table in found.items() if table is not None}
        return draw(at_hand) if len(at_hand) == len(needed) else parts.missing(f"{name}: {NOT_RUN}")

    def training_cost(self) -> Sequence[Product]:
        return tables.training_cost(self.published, self.model), cost.training(self.published, self.model)

    def stored_bytes(self) -> Sequence[Product]:
        return [sizes.stored(self.sweeps)]

    def gram(self) -> Sequence[Product]:
        return [gram.draw({name: cards.gram(cards.instance(name)) for name in uniproj.names()}, cards.SPACE)]

    def floor(self) -> Sequence[Product]:
        return [
            cost.floor(self.results.table("overhead/overhead-kernel.csv", "case", "method", "both_per_copy", "rounds"))
        ]

    def learning_curves(self) -> Sequence[Product]:
        return [curves.draw(self.sweeps)]

    def jobs(self) -> dict[str, Callable[[], Sequence[Product]]]:
        """What can be asked for, by the name of its files."""
        compared = {spec.name: partial(self.compared, spec) for spec in COMPARISONS}
        return {
            "properties": self.properties, "measured_properties": self.measured, **compared,
            "fastfood": self.fastfood, "ablations": self.ablations, "score_against_d": self.against_d,
            "score_against_r": self.against_r, "score_against_rows": self.against_rows,
            "intrinsic_dimension": self.intrinsic_dimension, "training_cost": self.training_cost,
            "score_against_bytes": self.stored_bytes, "gram": self.gram, "bandwidth_floor": self.floor,
            "captured_energy": self.energy, "spectrum": self.spectrum, "landscape": self.landscape,
            "learning_curves": self.learning_curves,
        }  # fmt: skip


def write(book: Book, names: Sequence[str], out: Path) -> None:
    """The files of these tables and figures, once all of them are made; of every name, tables.md too.

    tables.md holds every table and published claim.
    """
    products: list[tuple[str, Product]] = []
    with style.use():
        for name in names:
            products += [(name, product) for product in book.jobs()[name]()]
    for name, product in products:
        if isinstance(product, Table):
            product.write(out)
        else:
            style.save(product, out / name)
    # an earlier call may have had something to draw
    for name in set(names) - {name for name, product in products if isinstance(product, Figure)}:
        for kind in ("png", "pdf"):
            (out / f"{name}.{kind}").unlink(missing_ok=True)
    if set(names) != set(book.jobs()):
        return
    pages = [product.markdown() for _, product in products if isinstance(product, Table)]
    said = "## What is reported of the paper without numbers\n\n" + "".join(f"- {c}\n" for c in published.claims())
    write_text(out / "tables.md", "\n".join(["# Tables\n", *pages, said]))


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of committed results")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tables and figures by name")
    args = parser.parse_args(argv)
    try:
        book = Book(Results(args.results))
        names = args.only or list(book.jobs())
        if unknown := sorted(set(names) - set(book.jobs())):
            raise ExperimentError(f"figures: {unknown} must be names of {', '.join(book.jobs())}.")
        write(book, names, args.out)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Tables and figures: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
