"""Tables 1 to 6 and Figure 1 of the paper: their rows, published figures, and runs.

Figures are those of the arXiv edition (1612.03144v2), on minival unless a table says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from fpn_plugin.errors import UserError

__all__ = ["RUNS", "SCALES", "TABLES", "Row", "Run", "Table", "needed_runs", "select_rows"]

SCALES = ("mini", "paper")


@dataclass(frozen=True)
class Run:
    """One training; its config is ``<scale>/<name>.yaml`` in a folder of the configs.

    Attributes:
        name: of the run, its config and its folder.
        proposals_from: the run whose RPN's proposals it reads; None if it reads none.
        weights_from: the run that it starts from; None for the weights in its config.
        folder: of its config in the package.
    """

    name: str
    proposals_from: str | None = None
    weights_from: str | None = None
    folder: str = ""

    def config_name(self, scale: str) -> str:
        """Name of its config in the package."""
        return str(PurePosixPath(self.folder, scale, f"{self.name}.yaml"))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        key: its name on the command line, for example ``"1c"``.
        title: the paper's name of it.
        run: the run of its figures; None if there are only published figures.
        published: the paper's figures by metric.
        against: key of the row that it is compared with; None for no comparison.
    """

    key: str
    title: str
    run: str | None
    published: dict[str, float]
    against: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of the paper, or a figure whose designs are compared in a table.

    Attributes:
        number: in the paper; "figure1" for a figure.
        title: what it compares.
        task: of the metrics, in Detectron2's results.
        metrics: the paper's column to the key in Detectron2's results.
        main: the column that orders the rows.
        rows: in the paper's order.
        note: what a reader must know to compare the two columns; may be "".
        costs: whether the report has what each row costs, and a chart of ``main`` over seconds.
    """

    number: int | str
    title: str
    task: str
    metrics: dict[str, str]
    main: str
    rows: tuple[Row, ...]
    note: str = ""
    costs: bool = False

    @property
    def name(self) -> str:
        """As the paper calls it, "Table 1"."""
        figure = str(self.number).removeprefix("figure")
        return f"Table {figure}" if figure == str(self.number) else f"Figure {figure}"


_RUNS = (
    Run("table1_a_C4"),
    Run("table1_b_C5"),
    Run("table1_c_FPN"),
    Run("table1_c_FPN_unshared"),
    Run("table1_d_bottom_up"),
    Run("table1_d_bottom_up_unshared"),
    Run("table1_e_no_lateral"),
    Run("table1_f_P2"),
    # Table 2: proposals are fixed, those of Table 1 (c).
    *(
        Run(f"table2_{row}", proposals_from="table1_c_FPN")
        for row in ("a_C4", "b_C5", "c_FPN", "d_bottom_up", "e_no_lateral", "f_P2")
    ),
    # Table 3: proposals of the same kind as the detector.
    *(Run(f"table3_{row}", proposals_from=f"table1_{row}") for row in ("a_C4", "b_C5")),
    Run("table4_R_101_rpn"),
    Run("table4_R_101_FPN", proposals_from="table4_R_101_rpn"),
    # Table 5: 4-step training; steps 1 and 2 are the rows without sharing.
    Run("table5_R_50_step3_rpn", weights_from="table2_c_FPN"),
    Run("table5_R_50_shared", "table5_R_50_step3_rpn", "table5_R_50_step3_rpn"),
    Run("table5_R_101_not_shared", proposals_from="table4_R_101_rpn"),
    Run("table5_R_101_step3_rpn", weights_from="table5_R_101_not_shared"),
    Run("table5_R_101_shared", "table5_R_101_step3_rpn", "table5_R_101_step3_rpn"),
    # Table 6: each row adds to the one before it, from the third on.
    *(Run(f"table6_{row}") for row in ("5x5", "7x7", "5x5_7x7", "28x28", "2x")),
    # Figure 1: proposals and detector are trained jointly.
    *(
        Run(f"figure1_{design}", folder="figure1")
        for design in ("a_image_pyramid", "b_C4", "b_C5", "c_SSD", "c_bottom_up", "d_FPN")
    ),
)
RUNS = {run.name: run for run in _RUNS}

_AR = {
    "AR100": "AR@100", "AR1k": "AR@1000", "AR1k s": "ARs@1000", "AR1k m": "ARm@1000",
    "AR1k l": "ARl@1000",
}  # fmt: skip
# Table 6 has no AR100: it is shown last.
_SEGMENT_AR = {
    "AR1k": "AR@1000", "AR1k s": "ARs@1000", "AR1k m": "ARm@1000", "AR1k l": "ARl@1000",
    "AR100": "AR@100",
}  # fmt: skip
_AP = {name: name for name in ("AP50", "AP", "APs", "APm", "APl")}


def _rows(
    metrics: dict[str, str], against: str, *rows: tuple[str, str, str | None, tuple[float, ...]]
) -> tuple[Row, ...]:
    """Rows that are compared with the same one; figures are of the first metrics, in order."""
    return tuple(
        Row(key, title, run, dict(zip(metrics, figures, strict=False)), against)
        for key, title, run, figures in rows
    )


_TABLE_1 = _rows(
    _AR,
    "1c",
    ("1a", "(a) C4", "table1_a_C4", (36.1, 48.3, 32.0, 58.7, 62.2)),
    ("1b", "(b) C5", "table1_b_C5", (36.3, 44.9, 25.3, 55.5, 64.2)),
    ("1c", "(c) FPN", "table1_c_FPN", (44.0, 56.3, 44.9, 63.4, 66.2)),
    ("1c-unshared", "(c) FPN, heads not shared", "table1_c_FPN_unshared", ()),
    ("1d", "(d) bottom-up pyramid", "table1_d_bottom_up", (37.4, 49.5, 30.5, 59.9, 68.0)),
    ("1d-unshared", "(d) bottom-up pyramid, heads not shared", "table1_d_bottom_up_unshared", ()),
    ("1e", "(e) top-down, w/o lateral", "table1_e_no_lateral", (34.5, 46.1, 26.5, 57.4, 64.7)),
    ("1f", "(f) only finest level", "table1_f_P2", (38.4, 51.3, 35.1, 59.7, 67.6)),
)
_TABLE_2 = _rows(
    _AP,
    "2c",
    ("2a", "(a) C4, conv5 head", "table2_a_C4", (54.7, 31.9, 15.7, 36.5, 45.5)),
    ("2b", "(b) C5, 2fc head", "table2_b_C5", (52.9, 28.8, 11.9, 32.4, 43.4)),
    ("2c", "(c) FPN", "table2_c_FPN", (56.9, 33.9, 17.8, 37.7, 45.8)),
    ("2d", "(d) bottom-up pyramid", "table2_d_bottom_up", (44.9, 24.9, 10.9, 24.4, 38.5)),
    ("2e", "(e) top-down, w/o lateral", "table2_e_no_lateral", (54.0, 31.3, 13.3, 35.2, 45.3)),
    ("2f", "(f) only finest level", "table2_f_P2", (56.3, 33.4, 17.3, 37.3, 45.6)),
)
_TABLE_3 = _rows(
    _AP,
    "3c",
    ("3-He", "(*) C4, of He et al.", None, (47.3, 26.3)),
    ("3a", "(a) C4, conv5 head", "table3_a_C4", (53.1, 31.6, 13.2, 35.6, 47.1)),
    ("3b", "(b) C5, 2fc head", "table3_b_C5", (51.7, 28.0, 9.6, 31.9, 43.1)),
    ("3c", "(c) FPN", "table2_c_FPN", (56.9, 33.9, 17.8, 37.7, 45.8)),
)
_TABLE_5 = (
    *_rows(
        _AP,
        "5-R50-no",
        ("5-R50-no", "ResNet-50, not shared", "table2_c_FPN", (56.9, 33.9)),
        ("5-R50-yes", "ResNet-50, shared", "table5_R_50_shared", (57.2, 34.3)),
    ),
    *_rows(
        _AP,
        "5-R101-no",
        ("5-R101-no", "ResNet-101, not shared", "table5_R_101_not_shared", (58.0, 35.0)),
        ("5-R101-yes", "ResNet-101, shared", "table5_R_101_shared", (58.2, 35.2)),
    ),
)
_TABLE_6 = _rows(
    _SEGMENT_AR,
    "6-5x5",
    ("6-DeepMask", "DeepMask, image pyramid", None, (37.1, 15.8, 50.1, 54.9)),
    ("6-SharpMask", "SharpMask, image pyramid", None, (39.8, 17.4, 53.1, 59.1)),
    ("6-InstanceFCN", "InstanceFCN, image pyramid", None, (39.2,)),
    ("6-5x5", "FPN, single MLP 5 x 5", "table6_5x5", (43.4, 32.5, 49.2, 53.7)),
    ("6-7x7", "FPN, single MLP 7 x 7", "table6_7x7", (43.5, 30.0, 49.6, 57.8)),
    ("6-dual", "FPN, dual MLP 5 x 5 and 7 x 7", "table6_5x5_7x7", (45.7, 31.9, 51.5, 60.8)),
    ("6-28x28", "+ masks of 28 x 28", "table6_28x28", (46.7, 31.7, 53.1, 63.2)),
    ("6-2x", "+ twice the schedule", "table6_2x", (48.1, 32.6, 54.2, 65.6)),
)
_FIGURE_1 = _rows(
    _AP,
    "figure1d",
    ("figure1a", "(a) featurized image pyramid", "figure1_a_image_pyramid", ()),
    ("figure1b-C4", "(b) single map C4, conv5 head", "figure1_b_C4", ()),
    ("figure1b-C5", "(b) single map C5, 2fc head", "figure1_b_C5", ()),
    ("figure1c-SSD", "(c) pyramidal hierarchy, SSD's levels", "figure1_c_SSD", ()),
    ("figure1c", "(c) pyramidal hierarchy, row (d) of Table 2", "figure1_c_bottom_up", ()),
    ("figure1d", "(d) FPN", "figure1_d_FPN", ()),
)
_TABLES = (
    Table(
        1, "RPN: region proposals", "box_proposals", _AR, "AR1k", _TABLE_1,
        "The paper names the variants whose heads are not shared, without figures: (c) similar, "
        "(d) still degraded (section 5.1).",
    ),
    Table(2, "Fast R-CNN on the fixed proposals of Table 1 (c)", "bbox", _AP, "AP", _TABLE_2),
    Table(
        3, "Faster R-CNN, proposals and detector of one kind, features not shared", "bbox", _AP,
        "AP", _TABLE_3,
        "Row (c) is the run of Table 2 (c): its proposals come from its own kind of RPN.",
    ),
    Table(
        4, "ResNet-101, Fast R-CNN step twice as long", "bbox", _AP, "AP",
        (Row("4", "Faster R-CNN on FPN", "table4_R_101_FPN", {"AP": 35.6}),),
        "The paper's table is on test-dev (AP 36.2) and test-std (35.8), whose labels are not "
        "public; 35.6 is its figure on minival.",
    ),
    Table(
        5, "Features shared by RPN and Fast R-CNN (4-step training)", "bbox",
        {"AP50": "AP50", "AP": "AP"}, "AP", _TABLE_5,
        "Differences are to the same network without sharing. Published seconds an image, on one "
        "M40, with sharing: 0.148 (ResNet-50) and 0.172 (ResNet-101).",
    ),
    Table(
        6, "Segment proposals of objects of any class", "segment_proposals", _SEGMENT_AR, "AR1k",
        _TABLE_6,
        "The paper tests on the first 5k images of COCO's val of 2014. The figures of DeepMask, "
        "SharpMask and InstanceFCN are the paper's; they are not built here. Published seconds an "
        "image of the FPN rows, on one M40: 0.15, 0.19, 0.24, 0.25 and 0.25.",
    ),
    Table(
        "figure1", "Four designs, Faster R-CNN trained jointly", "bbox", _AP, "AP", _FIGURE_1,
        "The paper draws the designs without figures. Its claim: (d) is about as accurate as (a), "
        "and costs about as much as (b).",
        costs=True,
    ),
)  # fmt: skip
TABLES = {table.number: table for table in _TABLES}


def select_rows(names: Iterable[str]) -> dict[int | str, list[Row]]:
    """Rows by their names on the command line, by table.

    Args:
        names: tables ("1", "table1", "figure1"), rows ("1c", "2a", "5-R50-yes", "figure1a") or
            their runs ("table1_c_FPN").

    Raises:
        UserError: an unknown name; lists the known ones.
    """
    wanted = set()
    rows = [(row, str(table.number)) for table in _TABLES for row in table.rows]
    for name in names:
        short = name.lower().removeprefix("table")
        keys = {r.key for r, of in rows if short in (r.key.lower(), of) or name == r.run}
        if not keys:
            tables, known = ", ".join(map(str, TABLES)), ", ".join(row.key for row, _ in rows)
            raise UserError(f"no table or row {name!r}; tables: {tables}; rows: {known}")
        wanted |= keys
    chosen = {table.number: [row for row in table.rows if row.key in wanted] for table in _TABLES}
    return {number: rows for number, rows in chosen.items() if rows}


def needed_runs(rows: Iterable[Row]) -> list[Run]:
    """Runs that rows need, each after those it depends on."""
    ordered: dict[str, Run] = {}

    def visit(name: str | None) -> None:
        if name and name not in ordered:
            run = RUNS[name]
            visit(run.proposals_from)
            visit(run.weights_from)
            ordered[name] = run

    for row in rows:
        visit(row.run)
    return list(ordered.values())
