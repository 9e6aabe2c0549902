"""``fpn-plugin reproduce``: which runs it starts and refuses, and what it reports."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from fpn_plugin import UserError, model_zoo
from fpn_plugin.cli.reproduce import reproduce_main
from fpn_plugin.inspection.anatomy import anatomy
from fpn_plugin.mini import ensure_mini
from fpn_plugin.paper import runs, scheduler
from fpn_plugin.paper.report import read_runs, summarize, write_report
from fpn_plugin.paper.runs import Outcome, RunFolder, losses_by_part
from fpn_plugin.paper.scheduler import Task, gpus_of, run_tasks, tasks_for, visible_gpus
from fpn_plugin.paper.tables import RUNS, TABLES, needed_runs, select_rows

# Seconds instead of minutes: few iterations, images of 64 px.
TINY = (
    "SOLVER.MAX_ITER", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "DATALOADER.NUM_WORKERS",
    "0", "MODEL.RPN.POST_NMS_TOPK_TEST", "30", "SOLVER.CHECKPOINT_PERIOD", "1",
    "MODEL.WEIGHTS", "",
)  # fmt: skip


def names(what: list[str]) -> list[str]:
    rows = [row for rows in select_rows(what).values() for row in rows]
    return [run.name for run in needed_runs(rows)]


def test_tables_and_rows_are_found_by_their_names():
    assert [row.key for row in select_rows(["1c", "table1_f_P2"])[1]] == ["1c", "1f"]
    assert select_rows(["Table2"]) == {2: list(TABLES[2].rows)}
    assert set(select_rows(["1", "5-r50-yes"])) == {1, 5}
    assert select_rows(["figure1"]) == {"figure1": list(TABLES["figure1"].rows)}
    assert [row.key for row in select_rows(["Figure1c-SSD"])["figure1"]] == ["figure1c-SSD"]


@pytest.mark.parametrize("name", ["7", "6a", "1g", "c", "", "table"])
def test_an_unknown_row_lists_what_there_is(name):
    with pytest.raises(UserError, match=r"tables: 1, 2, .* 6, figure1; rows: 1a, .*figure1d"):
        select_rows([name])


def test_runs_come_after_what_they_depend_on():
    assert names(["2c"]) == ["table1_c_FPN", "table2_c_FPN"]
    assert names(["3"]) == [
        "table1_a_C4", "table3_a_C4", "table1_b_C5", "table3_b_C5", "table1_c_FPN", "table2_c_FPN",
    ]  # fmt: skip
    assert names(["5-R50-yes"]) == [
        "table1_c_FPN", "table2_c_FPN", "table5_R_50_step3_rpn", "table5_R_50_shared",
    ]  # fmt: skip
    assert names(["3-He"]) == []
    assert len(names(["1", "2", "3", "4", "5", "6", "figure1"])) == len(RUNS)


def test_proposals_are_dumped_only_for_runs_that_are_read(tmp_path):
    folders = [RunFolder(RUNS[n], "mini", s, tmp_path) for s in (0, 1) for n in names(["1", "2c"])]
    dumps = [task for task in tasks_for(folders) if task.dump]
    assert [t.name for t in dumps] == [f"table1_c_FPN seed {seed} proposals" for seed in (0, 1)]
    [reader] = [t for t in tasks_for(folders) if t.name == "table2_c_FPN seed 1"]
    assert reader.after == (dumps[1],)


def test_a_dry_run_lists_and_runs_nothing(tmp_path, capsys):
    reproduce_main(["2c", "3-He", "--output", str(tmp_path), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["to", "run", "table1_c_FPN", "seed", "0", "1000", "iterations"]
    assert lines[-1] == "3 of 3 to run"
    assert not list(tmp_path.iterdir())


def begun(tmp_path: Path) -> RunFolder:
    folder = RunFolder(RUNS["table1_c_FPN"], "mini", 0, tmp_path)
    folder.claim()
    folder.check()  # its own config and code: no error
    return folder


def test_a_folder_of_another_config_is_refused_by_name(tmp_path):
    folder = begun(tmp_path)
    changed = RunFolder(folder.run, "mini", 0, tmp_path, ("SOLVER.BASE_LR", "0.5"))
    with pytest.raises(UserError, match=r"seed0 was made by another config .*SOLVER.BASE_LR 0.014"):
        changed.check()
    with pytest.raises(UserError, match="never mixed"):
        reproduce_main(["1c", "--output", str(tmp_path), "--opts", "SOLVER.BASE_LR", "0.5"])


def test_a_folder_of_other_code_or_no_run_is_refused_by_name(tmp_path, monkeypatch):
    folder = begun(tmp_path)
    monkeypatch.setattr(runs, "code_version", lambda: "0123456789ab")
    with pytest.raises(UserError, match=r"seed0 was made by other code .*0123456789ab now"):
        folder.check()
    (folder.path / "made_by.json").rename(folder.path / "notes.json")
    with pytest.raises(UserError, match=r"made_by.json: it is not a run of this command"):
        folder.check()


def test_the_code_version_changes_with_the_code(tmp_path, monkeypatch):
    package = tmp_path / "fpn_plugin"
    shutil.copytree(Path(runs.fpn_plugin.__file__).parent, package)
    monkeypatch.setattr(runs.fpn_plugin, "__file__", str(package / "__init__.py"))
    version = runs.code_version.__wrapped__
    before = version()
    # Reports and pictures do not change what is trained.
    for name in ("paper/report.py", "fitting/report.py", "visualization/losses.py"):
        with (package / name).open("a") as source:
            source.write("# changed\n")
    assert version() == before
    (package / "modeling" / "levels.py").write_text("# changed\n")
    assert version() != before


def test_what_a_training_and_a_dump_import_counts_as_their_code():
    package = Path(runs.fpn_plugin.__file__).parent
    found = {path.relative_to(package).as_posix() for path in runs.code_files()}
    assert found >= {
        "__init__.py", "config.py", "cli/train.py", "cli/dump_proposals.py", "data/__init__.py",
        "data/proposal_files.py", "engine/trainer.py", "kernels/proposals.py", "modeling/neck.py",
        "utils/pickles.py", "utils/seeding.py",
    }  # fmt: skip
    assert not [name for name in found if name.startswith(("paper/", "fitting/", "visualiz"))]
    loaded = "from fpn_plugin.cli import dump_proposals, train; import sys; print(*(m.__file__ "
    loaded += "for n, m in list(sys.modules.items()) if n.partition('.')[0] == 'fpn_plugin'))"
    done = subprocess.run([sys.executable, "-c", loaded], stdout=subprocess.PIPE, text=True)
    imported = {Path(file).relative_to(package).as_posix() for file in done.stdout.split()}
    assert {name for name in imported if not name.startswith("visualization/")} <= found


@pytest.mark.parametrize(
    ("name", "device", "gpus", "slot", "at_once", "expected"),
    [
        ("paper/table1_c_FPN", "cuda", "01234567", 0, 1, "01234567"),
        ("paper/table1_c_FPN", "cuda", "012345", 0, 1, "0123"),  # 16 images: 6 cannot share them
        ("paper/table1_c_FPN", "cuda", "4567", 1, 2, "67"),
        ("paper/table1_c_FPN", "cuda", "0", 1, 2, "0"),
        ("mini/table1_c_FPN", "cuda", "23", 0, 1, "2"),  # one batch norm over the whole batch
        ("mini/table1_c_FPN", "cuda", "0123", 2, 4, "2"),
        ("mini/table1_c_FPN", "cpu", "0123", 0, 1, ""),
        ("mini/table1_c_FPN", "cuda", "", 0, 1, ""),
    ],
)
def test_gpus_are_shared_as_batches_can_be(name, device, gpus, slot, at_once, expected):
    cfg = model_zoo.get_config(f"{name}.yaml")
    cfg.MODEL.DEVICE = device
    assert "".join(gpus_of(cfg, list(gpus), slot, at_once)) == expected


def test_only_visible_gpus_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert visible_gpus() == ["5", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]


def outcome(scale: float, groups: bool = True) -> Outcome:
    metrics = dict.fromkeys(["AR@100", "AR@1000", "ARs@1000", "ARm@1000", "ARl@1000"], scale)
    by_group = {"digit": scale, "disc": scale + 1} if groups else {}
    return Outcome(metrics, by_group, 0.5, 0.25, {}, [scale / part for part in range(1, 9)])


def test_seeds_are_put_together_by_mean_and_standard_deviation():
    summary = summarize({0: outcome(50), 1: outcome(53), 2: outcome(56)}, TABLES[1].metrics)
    assert summary.mean["AR1k"] == 53
    assert summary.spread["AR1k"] == 3
    assert summary.groups == {"digit": 53, "disc": 54}
    assert summary.losses[:2] == [53, 26.5]
    assert summarize({0: outcome(50)}, TABLES[1].metrics).spread["AR1k"] == 0
    without = dataclasses.replace(outcome(53), losses=[])
    assert summarize({0: outcome(50), 1: without}, TABLES[1].metrics).losses == []


def test_losses_are_reported_by_eighths_of_the_training():
    rows = [{"iteration": i, "total_loss": float(i // 100)} for i in range(19, 800, 20)]
    assert losses_by_part(rows, 800) == list(range(8))
    assert losses_by_part(rows, 801)[-1] == 7  # also where the parts do not come out even
    assert losses_by_part(rows[:-5], 800) == []  # none of the last eighth
    assert losses_by_part([], 800) == []


def test_the_report_has_rows_next_to_the_papers(tmp_path):
    figures = {("1a", 0): 50, ("1a", 1): 52, ("1c", 0): 60, ("1c", 1): 64, ("1f", 0): 63}
    rows = [row for row in TABLES[1].rows if row.key in ("1a", "1c", "1d", "1f")]
    runs_of = {row.key: RUNS[row.run] for row in rows}
    outcomes = {
        RunFolder(runs_of[key], "mini", seed, tmp_path): outcome(figure)
        for (key, seed), figure in figures.items()
    }
    (tmp_path / "mini").mkdir()
    text = write_report({1: rows}, outcomes, tmp_path / "mini").read_text()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.partition("Total loss")[0].splitlines()
        if line.startswith("| (")
    }
    assert "They are not COCO results" in text
    assert cells["(a) C4"][:2] == ["51.0 ± 1.4 (-11.0)", "52.0 ± 1.4 (-11.0)"]  # of the groups
    head = next(line for line in text.splitlines() if line.startswith("| (a) C4"))
    assert "| 0,1     | 51.0 ± 1.4 (-11.0) | 36.1 (-7.9)" in head
    assert "48.3 (-8.0)" in head  # AR1k of the paper, and its difference
    losses = text[text.index("Total loss, mean over each eighth") :]
    assert "| (a) C4                | 51.000 | 25.500 | 17.000 " in losses
    missing = next(line for line in text.splitlines() if line.startswith("| (d)"))
    assert "| -" in missing and "49.5 (-6.8)" in missing
    assert "By AR1k, here: 1f 63.0 > 1c 62.0 > 1a 51.0. Paper: 1c 56.3 > 1f 51.3 > 1a 48.3." in text
    assert "2 of 3 pairs of rows have the paper's order." in text
    assert "1c over 1f in the paper, here +1.0 the other way, less than the" in text
    assert "less than the seeds' spread of 2.8." in text
    content = json.loads((tmp_path / "mini" / "report.json").read_text())
    assert content["tables"]["1"]["1a"]["here"]["mean"]["AR1k"] == 51
    assert content["tables"]["1"]["1d"]["here"] is None
    assert (tmp_path / "mini" / "table1.png").stat().st_size > 10_000


def test_rows_are_trained_reported_skipped_and_resumed(tmp_path, capsys):
    ensure_mini({"train": 6, "val": 4})
    args = ["2c", "--output", str(tmp_path), "--opts", *TINY]
    code = "from fpn_plugin.cli.reproduce import reproduce_main as main; "
    code += "from fpn_plugin.engine import run_tool; run_tool(main)"
    tool = [sys.executable, "-c", code, *args]
    # Cut off while it runs, it leaves a folder that the next call goes on with.
    # A shell in the background ignores interrupts, and so would what it starts.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    cut = subprocess.Popen(tool, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=heed)
    first = tmp_path / "mini" / "table1_c_FPN" / "seed0"
    deadline = time.monotonic() + 120
    while not (first / "train.log").is_file() and time.monotonic() < deadline:
        pass
    cut.send_signal(signal.SIGINT)
    assert b"run the same command to continue" in cut.communicate(timeout=60)[0]
    assert cut.returncode == 130
    reproduce_main(args)
    assert "Table 2. Fast R-CNN" in capsys.readouterr().out
    second = tmp_path / "mini" / "table2_c_FPN" / "seed0"
    results = json.loads((second / "results.json").read_text())["bbox"]
    report = json.loads((tmp_path / "mini" / "report.json").read_text())["tables"]["2"]["2c"]
    assert report["here"]["mean"]["AP50"] == results["AP50"]
    digits = [results[f"AP-{digit}"] for digit in range(10)]
    assert report["here"]["groups"]["digit"] == pytest.approx(sum(digits) / 10, nan_ok=True)
    # The proposals that it read are those of its own RPN.
    config = (second / "config.yaml").read_text()
    assert str(first / "proposals" / "mini_train.pkl") in config
    assert (first / "proposals" / "mini_val.pkl").is_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model_final.pth")}
    assert len(before) == 2
    assert not list(tmp_path.rglob("model_0*.pth"))  # of no use any more
    reproduce_main(args)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    # What another machine reported goes into this one's report, if the same code made it.
    there, here = tmp_path / "mini" / "report.json", tmp_path / "here"
    folder = RunFolder(RUNS["table2_c_FPN"], "mini", 0, here, TINY)
    [(found, recorded)] = read_runs(there, [folder]).items()
    assert found == folder
    assert recorded.metrics == results
    changed = RunFolder(folder.run, "mini", 0, here, (*TINY, "SOLVER.BASE_LR", "0.5"))
    with pytest.raises(UserError, match=r"report.json: table2_c_FPN seed 0 was made by another"):
        read_runs(there, [changed])
    with pytest.raises(UserError, match="no report.json of this command"):
        read_runs(second / "results.json", [folder])
    reproduce_main([*args[:3], "--dry-run", *args[3:]])
    assert "0 of 3 to run" in capsys.readouterr().out


def test_segment_proposals_are_reported_next_to_the_papers(tmp_path, capsys):
    ensure_mini({"train": 6, "val": 4})
    opts = [*TINY, "MODEL.SEGMENT_PROPOSALS.WIDTH", "8"]
    reproduce_main(["6-5x5", "6-DeepMask", "--output", str(tmp_path), "--opts", *opts])
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "mini" / "table6_5x5" / "seed0" / "results.json").read_text())
    found = results["segment_proposals"]
    assert set(found) == {f"AR{size}@{k}" for size in ("", "s", "m", "l") for k in (100, 1000)}
    [ours] = [line.split("|")[1:-1] for line in text.splitlines() if "| FPN, single" in line][:1]
    assert [cell.strip() for cell in ours[2:4]] == [f"{found['AR@1000']:.1f}", "43.4"]
    [theirs] = [line.split("|")[1:-1] for line in text.splitlines() if "| DeepMask" in line][:1]
    assert [cell.strip() for cell in theirs[2:4]] == ["-", "37.1 (-6.3)"]
    assert "of each group of categories" not in text


def test_a_design_of_figure_1_is_reported_with_what_it_costs(tmp_path, capsys):
    ensure_mini({"train": 6, "val": 4})
    reproduce_main(["figure1a", "--output", str(tmp_path), "--opts", *TINY])
    out = capsys.readouterr().out
    assert "## Figure 1. Four designs" in out
    header = next(line for line in out.splitlines() if line.startswith("| row"))
    assert re.search(r"APl +\| s/iter.*\| parameters \(M\) .*\| multiply-adds .*\| peak", header)
    report = json.loads((tmp_path / "mini" / "report.json").read_text())["tables"]["figure1"]
    here = report["figure1a"]["here"]
    folder = RunFolder(RUNS["figure1_a_image_pyramid"], "mini", 0, tmp_path, TINY)
    results = json.loads((folder.path / "results.json").read_text())["bbox"]
    assert here["mean"] == {name: results[name] for name in ("AP50", "AP", "APs", "APm", "APl")}
    cfg = folder.config().clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    adds = sum(part.multiply_adds for part in anatomy(model, (64, 64)).parts)
    assert here["costs"]["multiply-adds (G)"] == adds / 1e9
    assert here["costs"]["parameters (M)"] == sum(p.numel() for p in model.parameters()) / 1e6
    assert here["costs"]["peak memory (MiB)"] > 100
    assert (tmp_path / "mini" / "figure1.png").stat().st_size > 10_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_an_interrupt_meets_while_it_starts_is_ended(number, tmp_path, monkeypatch):
    ensure_mini({"train": 6, "val": 4})
    started = []
    start = subprocess.Popen

    def interrupted(*_, **__):
        started.append(start([sys.executable, "-c", "import time; time.sleep(600)"]))
        os.kill(os.getpid(), number)
        return started[0]

    monkeypatch.setattr(scheduler.subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            reproduce_main(["1c", "--output", str(tmp_path)])
        assert [each.poll() for each in started] == [-signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before)
        for each in started:
            each.kill()
            each.wait()


def test_a_run_that_fails_is_reported_with_its_log(tmp_path):
    ensure_mini({"train": 6, "val": 4})
    folder = RunFolder(RUNS["table1_c_FPN"], "mini", 0, tmp_path)
    with pytest.raises(UserError, match=r"_FPN seed 0 ended with status 2: error: .*NoHead"):
        reproduce_main(["1c", "--output", str(tmp_path), "--opts", "MODEL.RPN.HEAD_NAME", "NoHead"])
    assert (folder.path / "train.log").is_file()


def test_a_run_that_fails_stops_only_those_that_need_it(tmp_path):
    class Program(Task):
        def command(self, num_gpus):
            code = "raise SystemExit('no luck')"
            if self.folder.seed:
                code = f"open({str(self.folder.path / 'results.json')!r}, 'w').write('{{}}')"
            return [sys.executable, "-c", code]

    def program(seed, *after):
        return Program(RunFolder(RUNS["table1_c_FPN"], "mini", seed, tmp_path), False, after)

    fails, other = program(0), program(1)
    needs_it = program(2, fails)
    needs_both = program(3, other, needs_it)
    with pytest.raises(UserError, match="FPN seed 0 ended with status 1: no luck"):
        run_tasks([fails, other, needs_it, needs_both], 1)
    assert other.done
    assert not needs_it.folder.path.exists()
    assert not needs_both.folder.path.exists()
