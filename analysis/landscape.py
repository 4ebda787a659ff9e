"""The loss along directions of the subspace, and what it keeps of LoRA's gradient: `python -m analysis.landscape`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis import command, style, subject
from analysis.spaces import defaults, entries, vectors
from analysis.subject import Batch, Head, Subject
from analysis.training import Trained, train
from experiments import names
from uniproj import Projection
from uniproj.claims import acts_as_isometry

DIRECTIONS, POINTS, BATCHES, LOSS_BATCHES = 2, 9, 4, 2
# Length of the farthest step, in lengths of theta_D.
REACH = 1.0


def gradient_norms(subject: Subject, P: Projection, theta_d: Tensor, head: Head, batches: Sequence[Batch]) -> Tensor:
    """||P^T g|| / ||g|| of the gradient g (D,) of each batch's loss by theta_D, (n,) float64.

    For isometric P it is the cosine between g and the step that training in the subspace makes of it, at most 1.
    """
    with torch.no_grad():
        theta_D = P(theta_d)
    gradients = [subject.gradient(theta_D, head, batch) for batch in batches]
    with torch.no_grad():
        return torch.stack([P.rmatvec(g).norm() / g.norm() for g in gradients])


@torch.no_grad()
def along(
    subject: Subject, P: Projection, theta_d: Tensor, head: Head, batches: Sequence[Batch]
) -> list[dict[str, float]]:
    """Mean loss at theta_D + t ||theta_D|| P u / ||P u|| for 2 random u ~ N(0, I_d) and 9 t in [-1, 1].

    All projections take steps of the same length in theta_D, so that their scales do not decide.
    """
    theta_D, found = P(theta_d.double()), []
    for k, u in enumerate(vectors("landscape", DIRECTIONS, P.d)):
        step = P.matvec(u)
        step *= REACH * theta_D.norm() / step.norm()
        for t in np.linspace(-1.0, 1.0, POINTS):
            loss = sum(float(subject.loss(theta_D + t * step, head, batch)) for batch in batches) / len(batches)
            found.append({"direction": k, "t": float(t), "loss": loss})
    return found


def landscape(
    subject: Subject, chosen: Sequence[tuple[str, Mapping[str, Any]]], d: int, steps: int, lr: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train the subject behind each projection, then measure where it arrived, on 4 batches it did not see (losses: 2).

    (gradients: a row per projection with mean, least and largest ||P^T g|| / ||g|| at the end and its mean at the
    start, beside sqrt(d / D), what a random isometric P gives, and whether P is isometric; losses: as in `along`).
    """
    unseen = subject.batches(BATCHES, skip=steps)
    norms, losses = [], []
    for entry in command.bar(
        entries(chosen, subject.layout, d, subject.setting.seed, subject.base_weights), "landscape"
    ):
        entry, found = entry.attempt(lambda P: _of_training(subject, P, steps, lr, unseen))
        facts, points = found or ({}, [])
        norms.append({**entry.row(), **facts})
        losses += [{"projection": entry.name, "variant": entry.label, **point} for point in points]
    return pd.DataFrame(norms), pd.DataFrame(losses)


def _of_training(
    subject: Subject, P: Projection, steps: int, lr: float, unseen: Sequence[Batch]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    before = gradient_norms(subject, P, P.init_theta(subject.setting.seed), subject.head, unseen)
    trained = train(subject, P, steps, lr)
    points = along(subject, P, trained.theta_d, trained.head, unseen[:LOSS_BATCHES])
    return _norms(subject, P, before, trained, unseen), points


def _norms(
    subject: Subject, P: Projection, before: Tensor, trained: Trained, batches: Sequence[Batch]
) -> dict[str, Any]:
    ratio = gradient_norms(subject, P, trained.theta_d, trained.head, batches)
    return {
        "isometric": acts_as_isometry(P),
        "random": (P.d / P.D) ** 0.5,
        "start": float(before.mean()),
        "mean": float(ratio.mean()),
        "least": float(ratio.min()),
        "largest": float(ratio.max()),
        "n": len(ratio),
        "did_train": trained.did_train,
    }


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """||P^T g|| / ||g|| of every projection beside sqrt(d / D), and the loss along the first direction."""
    norms = tables["gradients"].dropna(subset=["mean"]) if "mean" in tables["gradients"] else pd.DataFrame()
    figure, (above, below) = plt.subplots(2, 1, figsize=(style.COLUMN, 7.4), height_ratios=[3, 2])
    if not len(norms):
        return figure
    place = np.arange(len(norms))
    colours = [style.colour(name) for name in norms["projection"]]
    above.errorbar(
        norms["mean"], place, xerr=[norms["mean"] - norms["least"], norms["largest"] - norms["mean"]],
        fmt="none", ecolor=colours,
    )  # fmt: skip
    # the markers are those of the losses below
    for y, row in zip(place, norms.itertuples(), strict=True):
        look = {"color": style.colour(row.projection), "marker": style.marker(row.projection)}
        above.scatter(row.mean, y, s=14, **look)
    above.scatter([], [], s=14, color="#555555", label=f"measured, n = {int(norms['n'].min())} batches")
    above.scatter(norms["random"], place, marker="|", color="#555555", s=40, label="sqrt(d / D)")
    above.axvline(1.0, color="#555555", linestyle="--", linewidth=0.8)
    labels = [f"{names.method(r.projection)}{'' if r.isometric else ' *'}" for r in norms.itertuples()]
    above.set_yticks(place, labels, fontsize=5.5)
    above.invert_yaxis()
    above.set_xscale("log")
    above.set_xlabel("||P'g|| / ||g||: mean, least and largest\n(* P is not isometric)")
    figure.legend(*above.get_legend_handles_labels(), ncols=2, loc="outside upper center")
    losses = tables["losses"][tables["losses"]["direction"] == 0]
    # in the order of the lines where they end
    for name in losses[losses["t"] == losses["t"].max()].sort_values("loss", ascending=False)["projection"]:
        mine = losses[losses["projection"] == name]
        below.plot(mine["t"], mine["loss"], markersize=3, linewidth=0.8, **style.line(name))
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=5, handlelength=4)
    below.set_xlabel("step along one direction\n(lengths of theta_D)")
    below.set_ylabel(f"loss (nats per row),\nn = {LOSS_BATCHES} batches")
    above.set_title(f"D = {style.span(norms['D'])}, d = {style.span(norms['d'])}", loc="left")
    return figure


def parse() -> argparse.ArgumentParser:
    """The command line."""
    options = command.parser("landscape", (__doc__ or "").split(":")[0] + ".")
    options.add_argument("--d", type=int, default=1024, help="length of theta_d where a method leaves it free")
    subject.add_training(options, 30, "", "theta_d")
    subject.add_options(options)
    return options


def measure(args: argparse.Namespace) -> command.Tables:
    """The tables of one model and task."""
    chosen = command.chosen(args)
    norms, losses = landscape(Subject(subject.from_options(args)), defaults(chosen), args.d, args.steps, args.lr)
    return {"gradients": norms, "losses": losses}


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return command.run("landscape", parse(), measure, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
