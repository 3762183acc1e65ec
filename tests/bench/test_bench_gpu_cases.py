"""What ``bench on-gpu`` asks: its lists, the choice of part B, right and wrong, the document for the README."""

import json
import signal

import numpy as np
import pytest
from click.testing import CliRunner

from bench import gpu_items, gpu_rehearsal, gpu_results, gpu_smoke, on_gpu, report
from bench.cases import Case
from bench.cli import main
from bench.gpu_cases import HEADLINE, KERNELS, PROBES, SMOKE, Smoke, from_dict, small, variants
from bench.probe import MEASUREMENTS
from bench.results_file import load
from gpurnn.backends.cuda import schedules

# ---- what is asked, and the choice of part B


def record(item, status, **more):
    base = {"run": "1", "part": "A", "rehearsal": False, "group": item.group, "name": item.name, "status": status}
    return base | {"parameters": item.parameters, "seconds": 1.0} | more


def all_records(**changed):
    items = [item for item in gpu_items.part_a(False)[0] if item.group in ("smoke", "headline")]
    return [record(item, changed.get(item.group, "right")) for item in items]


def test_the_lists_are_what_they_should_be():
    assert len(SMOKE) == 35 and {(case.cell, case.kernel) for case in SMOKE[:24]} == {
        (cell, kernel) for cell in ("lstm", "gru") for kernel in KERNELS
    }
    assert any(case.norm and case.I == 3 and case.H == 32 for case in SMOKE)
    assert any(case.ragged and case.dtype == "bfloat16" for case in SMOKE) and any(case.bidirectional for case in SMOKE)
    assert len(HEADLINE) == len(set(HEADLINE)) == 32 and set(PROBES) <= set(MEASUREMENTS)
    for case in (*SMOKE, *HEADLINE):
        assert from_dict(json.loads(json.dumps(case.as_dict()))) == case
        assert small(case).H < 60
        assert gpu_smoke.problems(case)
    items, ends, _ = gpu_items.part_a(False)
    assert list(dict.fromkeys(item.group for item in items)) == list(ends)


def test_part_b_follows_part_a():
    items, ends, decision = gpu_items.part_b(False, all_records())
    assert decision == "everything was right in part A" and not any(item.group == "headline" for item in items)
    assert {"ablation", "profile", "tune", "tests"} == {item.group for item in items} <= ends.keys()
    items, _, decision = gpu_items.part_b(False, [])
    assert "THERE IS NO PART A" in decision and len([item for item in items if item.group == "headline"]) == 32
    rows = all_records(headline="left out")
    rows[5]["status"] = "wrong"
    items, ends, decision = gpu_items.part_b(False, rows)
    assert decision.startswith("1 not right in part A") and SMOKE[5].name in decision
    groups = [item.group for item in items]
    assert groups[:2] == ["sanitizer"] * 2 and groups[-32:] == ["headline"] * 32 and set(groups) <= ends.keys()
    assert 5 <= groups.count("variants") <= 12


def test_a_wrong_large_case_is_looked_for_in_every_kernel():
    rows = all_records()
    rows[-5]["status"] = "timed out"
    items, _, _ = gpu_items.part_b(False, rows)
    looked = {from_dict(item.parameters).kernel for item in items if item.group == "variants"}
    assert looked == set(KERNELS)


def test_variants_change_one_thing():
    case = Smoke("lstm", "grid", "bfloat16", ragged=True)
    for other in variants(case):
        different = {key for key, value in other.as_dict().items() if value != case.as_dict()[key]}
        assert len(different) == 1, different
    assert variants(Smoke("gru", "step recorded", "float32"))[0].kernel == "step"


def test_part_b_reads_only_its_own_kind(tmp_path):
    with open(tmp_path / on_gpu.RESULTS, "w") as file:
        for row in all_records(smoke="wrong"):
            file.write(json.dumps(row) + "\n")
    seen = []
    choose = lambda rehearsal, before: (seen.append(before), ([], {}, ""))[1]  # noqa: E731
    for rehearsal in (False, True):
        on_gpu.run_part("B", 0.2, tmp_path, rehearsal, choose)
    for number in on_gpu.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    assert [len(before) for before in seen] == [67, 0]


# ---- right and wrong


def test_a_wrong_result_names_its_first_index():
    rng = np.random.default_rng(0)
    expected = {"output": rng.normal(size=(4, 3, 5)), "dx": rng.normal(size=(4, 3, 2))}
    usual = {name: value * (1 + 1e-7) for name, value in expected.items()}
    got = {name: value.copy() for name, value in expected.items()}
    assert gpu_smoke.judge(got, usual, expected, "float32", 0)["status"] == "right"
    got["output"][2, 1, 3] += 0.01
    got["output"][3, 0, 0] = np.nan
    found = gpu_smoke.judge(got, usual, expected, "float32", 0)
    assert found["status"] == "wrong" and found["first_wrong"]["index"] == [2, 1, 3]
    assert found["first_wrong"]["wrong"] == 2 and found["worst"] == np.inf
    assert "output[2, 1, 3]: expected" in found["reason"] and "2 of 60 wrong" in found["reason"]


def test_results_are_compared_with_torchs(tmp_path):
    case, rng = Case("lstm", 8, 2, 16, 16, what="train"), np.random.default_rng(0)
    arrays = {"output": rng.normal(size=100), "dx": rng.normal(size=100)}
    for name, factor in (("ours", 1 + 1e-7), ("wrong", 1.01), ("nan", np.nan), ("torch", 1)):
        np.savez(tmp_path / f"{name}.npz", **{key: value * factor for key, value in arrays.items()})
    judged = {
        n: gpu_items.compare(case, tmp_path / f"{n}.npz", tmp_path / "torch.npz") for n in ("ours", "wrong", "nan")
    }
    assert [row["status"] for row in judged.values()] == ["right", "wrong", "wrong"]


@pytest.mark.emulated
@pytest.mark.parametrize("kernel", KERNELS)
def test_smoke_cases_take_the_kernel_they_name(kernel, monkeypatch):
    dtype = "bfloat16" if kernel.endswith("mma") else "float32"
    case = Smoke("gru", kernel, dtype, T=4, B=3, I=5, H=40, ragged=True)
    device, loaded = gpu_rehearsal.device(), []
    load = device.load
    monkeypatch.setattr(device, "load", lambda file, *more: loaded.append(file) or load(file, *more))
    found = gpu_smoke.run(case, device)
    assert found["status"] == "right", found
    assert kernel.split()[0] + ".cu" in loaded
    others = {name.split()[0] + ".cu" for name in KERNELS} - {kernel.split()[0] + ".cu"}
    assert not others & set(loaded)
    if kernel == "step recorded":
        assert found["recordings"] and all(row["recorded"] for row in found["recordings"])


@pytest.mark.emulated
def test_a_planted_error_is_found_by_a_smoke_case():
    device = gpu_rehearsal.device()
    right = device.gemm

    def wrong(a, b, out, *how):
        right(a, b, out, *how)
        out *= 1.001

    device.gemm = wrong
    found = gpu_smoke.run(Smoke("gru", "step", "float32", T=4, B=3, I=5, H=8), device)
    assert found["status"] == "wrong" and found["first_wrong"]["array"] == "output", found
    assert found["first_wrong"]["expected"] == pytest.approx(found["first_wrong"]["got"], rel=0.01)


@pytest.mark.emulated
def test_every_smoke_case_has_a_tile_on_a_large_gpu():
    device = gpu_rehearsal.device()
    device.limits = schedules.Device(90, 132, 227 * 1024, 1.7e9, "as an H100 or H200")
    for case in SMOKE:
        chosen = gpu_smoke.chosen(case, gpu_smoke.make_ops(device, case.kernel))
        assert len(chosen) == 2 and all(case.kernel.split()[0] in name for name in chosen), (case.name, chosen)


@pytest.mark.emulated
def test_what_no_kernel_takes_is_left_out():
    found = gpu_smoke.run(Smoke("lstm", "block_mma", "float32", "fma", T=2, B=2, I=3, H=8), gpu_rehearsal.device())
    assert found == {"status": "left out", "reason": "block_mma has no tile for this size"}


# ---- the document for the README


def finished(tmp_path, rehearsal=False):
    """A folder with the records of a part A, times planted."""
    row = {"run": "1", "part": "A", "rehearsal": rehearsal}
    machine = {"cpu": "a processor", "cpus": 16, "numpy": "2", "blas": "blas", "gpu": {
        "name": "a GPU", "driver": "580", "cuda": 13000, "cupy": "14"}}  # fmt: skip
    rows = [
        row | {"group": "begin", "name": "part A", "status": "done", "started": "2026-01-01T00:00:00Z"},
        row | {"group": "versions", "name": "versions", "status": "done", "environment": machine, "sources": "abc",
               "nvrtc": [13, 0]},
        row | {"group": "torch", "name": "torch", "status": "done", "torch": "2", "torch_cuda": "13", "cudnn": 91000},
        row | {"group": "probe", "name": "hop_all", "status": "right", "probe": {"8 blocks": {"seconds": 1e-6}}},
        row | {"group": "probe", "name": "copy", "status": "right", "probe": {"bytes_per_second": 4e12}},
    ]  # fmt: skip
    for item in gpu_items.part_a(False)[0]:
        if item.group == "smoke":
            rows.append(row | {"group": "smoke", "name": item.name, "status": "right", "parameters": item.parameters})
        if item.group == "headline":
            rivals = {kind: {"setup_s": 1.0, "samples": [{"device_s": s, "host_s": s}] * 3}
                      for kind, s in (("gpurnn", 1e-3), ("torch", 3e-3))}  # fmt: skip
            rows.append(row | {"group": "headline", "name": item.name, "status": "right", "worst": 0.01, "where": "dx",
                               "allowed": 0.1, "parameters": item.parameters, "rivals": rivals})  # fmt: skip
    rows[-1] |= {"status": "failed", "reason": "no luck", "rivals": {}}
    (tmp_path / on_gpu.RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_results_become_a_document_and_a_table(tmp_path):
    finished(tmp_path)
    out = tmp_path / "results" / "gpu.json"
    done = CliRunner().invoke(main, ["on-gpu", "--collect", str(tmp_path), "--to", str(out)])
    assert done.exit_code == 0, done.output
    document = load(out)
    assert document["environment"]["cudnn"] == 91000 and document["environment"]["nvrtc"] == [13, 0]
    assert document["ceilings"]["gpu"]["step"] == {"grid": 1e-6} and len(document["smoke"]) == 35
    page = tmp_path / "page.md"
    marks = ("gpu.json", "gpu.json gpurnn-cuda torch-cuda", "gpu.json probe")
    page.write_text("".join(f"<!-- bench {mark} -->\nold\n<!-- end -->\n" for mark in marks))
    assert CliRunner().invoke(main, ["readme", str(page), "--results", str(out.parent)]).exit_code == 0
    text = page.read_text()
    assert "a GPU, driver 580, CUDA 13000, CuPy 14" in text and "cuDNN 91000" in text and "old" not in text
    assert "35 of 35 layers agree with float64, forward and backward." in text
    assert f"| {HEADLINE[0].name} | 1,000 us" in text and "3,000 us 3.00x" in text and "failed" in text
    assert "| 16, 768 | 3.00" in text and "| hop_all | 8 blocks: 1,000 ns |" in text


def test_a_rehearsal_never_becomes_a_table(tmp_path):
    finished(tmp_path, rehearsal=True)
    done = CliRunner().invoke(main, ["on-gpu", "--collect", str(tmp_path), "--to", str(tmp_path / "x.json")])
    assert done.exit_code == 1 and "rehearsal" in done.output and not (tmp_path / "x.json").exists()
    lines = list(gpu_results.lines(on_gpu.read(tmp_path)))
    assert "REHEARSAL" in lines[0] and not any("us " in line and "1,000" in line for line in lines)
    finished(tmp_path)
    on_gpu.collected(tmp_path, tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(json.loads((tmp_path / "x.json").read_text()) | {"rehearsal": True}))
    with pytest.raises(ValueError, match="rehearsal"):
        report.fill("<!-- bench x.json -->\n<!-- end -->", tmp_path)
