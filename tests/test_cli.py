"""The command line, as a user meets it: in processes of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from echorl_nemo.cli import main
from echorl_nemo.report.logger import read_lines
from echorl_nemo.report.metrics_reference import is_described


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "echorl_nemo", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_from_start_to_report(in_repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli(
        "train", "--config-name", "quickstart", "trainer.steps=3", f"trainer.run_dir={run}", "trainer.eval_every=2",
        "trainer.prompts_per_step=4", "trainer.minibatch_prompts=2", "trainer.micro_batch_size=4",
        "rollout.group_size=4", "logger.rollouts_every=2", cwd=in_repository,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and lines[2].startswith("step 3/3 | reward 0.")
    for word in ("all-one", "all-zero", "clips", "share", "entropy", "grad", "tok/s", "generate", "verify", "score"):
        assert word in lines[0]
    metrics = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [-1, 0, 1, 2]
    assert [("eval.accuracy" in row) for row in metrics] == [True, False, True, True]
    assert [name for row in metrics for name in row if name != "step" and not is_described(name)] == []
    assert metrics[1]["rollout.logprob_gap"] < 1e-5 and metrics[1]["rollout.entropy_gap"] < 1e-4
    rollouts = read_lines(run / "rollouts.jsonl")
    assert sorted({row["step"] for row in rollouts}) == [0, 2] and len(rollouts) == 2 * 4 * 4
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["steps"] == 3
    assert list((run / "tensorboard").glob("events*"))
    checkpoint = run / "checkpoints" / "step-000003"
    exported = load_file(run / "export" / "model.safetensors")
    other = cli(
        "export", str(checkpoint), "--out", str(tmp_path / "again"), "parallel.tensor=1", "parallel.pipeline=2",
        cwd=in_repository,
    )  # fmt: skip
    assert other.returncode == 0, other.stderr
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == exported.keys() and all(torch.equal(again[name], exported[name]) for name in again)
    assert "holds files already" in cli("export", str(checkpoint), "--out", str(run), cwd=in_repository).stderr
    wrong = cli("export", str(run), "--out", str(tmp_path / "x"), cwd=in_repository).stderr
    assert "is not a complete checkpoint: name a folder run_dir/checkpoints/step-NNNNNN" in wrong
    assert "EchoRL run" in (run / "report.html").read_text()
    second = cli("train", "--config-name", "quickstart", f"trainer.run_dir={run}", cwd=in_repository)
    assert second.returncode == 1
    assert second.stderr.startswith("error: trainer.run_dir=") and "Traceback" not in second.stderr


def test_a_learning_run_under_torchrun(in_repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "-m", "echorl_nemo", "train", "--config-name", "quickstart", "trainer.steps=1",
        "parallel=single", "trainer.prompts_per_step=2", "trainer.minibatch_prompts=2", "data.eval=null",
        f"trainer.run_dir={tmp_path / 'run'}", "trainer.micro_batch_size=8",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=in_repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_the_resolved_configuration_is_printed(in_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config-name", "quickstart", "--cfg", "job", "algo=dapo", "echorl.coef=0.3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["algo"]["clip_high"] == 0.28 and printed["echorl"]["coef"] == 0.3


def test_errors_are_one_line_each(in_repository: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["parallel.tensor=3", "data.train=nowhere.jsonl", f"trainer.run_dir={tmp_path / 'run'}"]
    assert main(["train", "--config-name", "quickstart", *overrides]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and all(line.startswith("error: ") for line in lines)
    assert not (tmp_path / "run").exists()


def test_the_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "it has no metrics; name the folder of a run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward": 0.5}) + "\n")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()


def test_evaluation_of_a_folder_and_of_a_checkpoint(in_repository: Path, tiny_chain: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join((tiny_chain / "eval.jsonl").read_text().splitlines(keepends=True)[:24]))
    settings = [
        f"model.path={tiny_chain / 'model'}", f"data.eval={problems}", "data.reward=exact_line", "evaluation.k=[1,2,4]",
        "evaluation.samples=4", "rollout.max_new_tokens=60", "rollout.temperature=1", "rollout.top_p=1",
        "parallel.device=cpu",
    ]  # fmt: skip
    out = tmp_path / "plain.json"
    done = cli("evaluate", *settings, f"evaluation.out={out}", "parallel.tensor=2", "--top", "2", cwd=in_repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrong, reference") + done.stdout.count("wrong (truncated), reference") == 2
    responses = read_lines(tmp_path / "plain.responses.jsonl")
    assert len(responses) == 96 and json.loads((tmp_path / "heartbeat.json").read_text())["phase"] == "done"
    for word in ("24 problems x 4 rollouts", "pass@1", "pass@4", "maj@4"):
        assert word in done.stdout
    plain = json.loads(out.read_text())
    detail = plain["problems_detail"]
    assert plain["problems"] == len(detail) == 24
    share = sum(map(sum, (row["correct"] for row in detail))) / 96
    assert share == sum(row["right"] for row in responses) / 96
    assert plain["scores"]["pass@1"]["value"] == pytest.approx(share, abs=1e-12) and 0.4 < share < 0.95
    assert plain["scores"]["pass@4"]["value"] == sum(any(row["correct"]) for row in detail) / 24
    assert plain["scores"]["pass@1"]["low"] < share < plain["scores"]["pass@1"]["high"]

    run = tmp_path / "run"
    trained = cli(
        "train", "--config-name", "quickstart", "trainer.steps=6", f"trainer.run_dir={run}", "data.eval=null",
        "parallel=single", "parallel.device=cpu", "trainer.export=false", "trainer.lr=1e-3", cwd=in_repository,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    out = tmp_path / "trained.json"
    checkpoint = f"evaluation.checkpoint={run / 'checkpoints' / 'step-000006'}"
    done = cli("evaluate", *settings, f"evaluation.out={out}", checkpoint, cwd=in_repository)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["scores"]["pass@1"]["value"] > share


def test_evaluation_errors(in_repository: Path, tiny_chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"model.path={tiny_chain / 'model'}"
    for overrides, message in (
        ([], "data.eval=null: there are no problems; name a file, or choose a benchmark"),
        (["evaluation.samples=2"], "evaluation.k=[1, 8]: [8] is above evaluation.samples=2"),
        (
            ["data.eval=nowhere.jsonl", "evaluation.checkpoint=/nowhere"],
            "evaluation.checkpoint=/nowhere is not a complete checkpoint",
        ),
        (["evaluation.sample=2"], "did you mean evaluation.samples?"),
        ([f"evaluation.out={tiny_chain}"], f"evaluation.out={tiny_chain}: a folder of that name is there; name a file"),
        (["evaluation.out=/proc/x.json"], "evaluation.out=/proc/x.json: it cannot be written"),
        ([f"evaluation.out={__file__}/x.json"], "is not a folder; name another file"),
    ):
        assert main(["evaluate", model, *overrides]) == 1
        assert message in capsys.readouterr().err


def test_analysis_of_golden_solutions_and_rollouts(in_repository: Path, tiny_chain: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join((tiny_chain / "eval.jsonl").read_text().splitlines(keepends=True)[:16]))
    done = cli(
        "analyze", f"model.path={tiny_chain / 'model'}", f"data.eval={problems}", "data.reward=exact_line",
        "evaluation.samples=8", "evaluation.micro_batch_size=16", "rollout.max_new_tokens=60", "rollout.temperature=1",
        f"analysis.out={tmp_path / 'look'}", "parallel.device=cpu", "parallel.tensor=2", cwd=in_repository,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    profiles = json.loads((tmp_path / "look.json").read_text())["profiles"]
    counts = {name: values["responses"] for name, values in profiles.items()}
    assert counts["golden solutions"] == 16 and counts["right rollouts"] + counts["wrong rollouts"] == 128
    # a wrong line is likelier where the model is uncertain
    assert profiles["wrong rollouts"]["peak_height"]["50%"] > profiles["right rollouts"]["peak_height"]["50%"]
    assert (tmp_path / "look.png").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "ehcorl.coef=1"],
        ["train", "--config-name", "quickstart", "trainer.lr=nan"],
        ["train", "--config-name", "quickstart", "model.path=a[b"],
        ["train", "--config-name", "quickstart", "--cfg", "job"],
        ["plan", "--config-name", "quickstart", "trainer.steps=0"],
        ["evaluate", "model.path=x", "--cfg", "job"],
        ["analyze", "evaluation.samples=many"],
    ],
    ids=" ".join,
)
def test_what_needs_no_library_imports_none(arguments: list[str]) -> None:
    """And so answers at once: torch by itself takes seconds to import."""
    program = (
        "import sys\n"
        "from echorl_nemo.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'megatron', 'datasets', 'numpy'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
