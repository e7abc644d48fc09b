"""The commands as a user meets them: in a process of their own where exit status, streams and imports matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

from scaletrain import catalog
from scaletrain.cli import app
from scaletrain.errors import Interrupted, UserError

TEXT = "# Tiny.\nobjective: {type: image_classification, size: 28}\ndata: {train: rows.csv}\n"
COMMANDS = ["ls", "show", "cp", "validate", "run", "sample", "chat", "evaluate", "verify", "inspect", "export"]
COMMANDS += ["quantize"]
COMMANDS += ["schema"]


def scaletrain(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "scaletrain", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        timeout=60,
    )


def call(*words):
    return CliRunner().invoke(app, list(words), catch_exceptions=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "lm").mkdir(parents=True)
    (tmp_path / "recipes" / "start.yaml").write_text(TEXT)
    (tmp_path / "recipes" / "lm" / "lora.yaml").write_text(TEXT.replace("Tiny.", "Tunes.\n#\n# needs: a model"))
    monkeypatch.setattr(catalog, "RECIPES", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """Stand in for the trainer; returns what it was called with."""
    calls = []
    module = types.ModuleType("scaletrain.runs")
    module.train = lambda recipe, name, root, fresh, extend: calls.append((recipe, name, root, fresh, extend))
    monkeypatch.setitem(sys.modules, "scaletrain.runs", module)
    return calls


def test_help_lists_the_commands_with_examples():
    done = scaletrain("--help")
    assert done.returncode == 0
    assert all(f"\n  {command}  " in done.stdout for command in COMMANDS)
    assert "scaletrain run quickstart" in done.stdout
    for command in ("run", "validate", "sample", "evaluate"):
        assert f"scaletrain {command} " in call(command, "--help").stdout.split("Examples:")[1]


@pytest.mark.parametrize(
    "words", [["--help"], ["ls"], ["ls", "--json"], ["schema"], ["show", "nothing"], ["run", "r.yaml", "a=1"]]
)
def test_light_commands_import_nothing_heavy(tmp_path, words):
    (tmp_path / "r.yaml").write_text(TEXT)
    code = (
        "import sys; from scaletrain.cli import app\n"
        "try: app()\n"
        "finally: print([m for m in ('torch', 'numpy', 'accelerate') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "[]"


def test_ls(folder):
    done = call("ls")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["name", "lm/lora", "start"]
    assert json.loads(call("ls", "--json").stdout) == [
        {"name": "lm/lora", "family": "lm", "summary": "Tunes.", "needs": "a model"},
        {"name": "start", "family": "start", "summary": "Tiny."},
    ]


def test_show_prints_the_file_and_cp_copies_it(folder):
    assert call("show", "start").stdout == TEXT
    assert call("cp", "start", "mine.yaml").exit_code == 0
    assert (folder / "mine.yaml").read_text() == TEXT
    (folder / "mine.yaml").write_text("edited")
    again = call("cp", "start", "mine.yaml")
    assert (again.exit_code, (folder / "mine.yaml").read_text()) == (2, "edited")
    assert "mine.yaml exists already" in again.stderr
    assert "cannot be written" in call("cp", "start", "no/mine.yaml").stderr


def test_schema_is_json():
    assert json.loads(call("schema").stdout)["properties"]["objective"]


def test_a_mistake_is_one_message_and_status_2(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT)
    done = scaletrain("run", str(tmp_path / "r.yaml"), "trian.duration=1", "--root", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: `trian`: there is no such key. Did you mean `train`? (on the command line)\n"
    assert not (tmp_path / "out").exists()
    assert scaletrain("run", str(tmp_path / "r.yaml"), "trian.duration=1", RANK="1").stderr == ""
    told = scaletrain("run", str(tmp_path / "r.yaml"), "trian.duration=1", "-v").stderr
    assert told.startswith("Traceback")
    assert told.endswith(done.stderr)


def test_run_hands_over_what_was_asked_for(folder, trained):
    assert call("run", "lm/lora", "train.global_batch=4").exit_code == 0
    assert call("run", "start", "--run", "mine", "--root", "there", "--fresh", "seed=3").exit_code == 0
    assert call("run", "start", "--extend").exit_code == 0
    (first, *plain), (second, *named), (_, *extended) = trained
    assert (first.train.global_batch, second.seed) == (4, 3)
    assert [(n, str(r), f, e) for n, r, f, e in (plain, named, extended)] == [
        ("lm-lora", "checkpoints", False, False),
        ("mine", "there", True, False),
        ("start", "checkpoints", False, True),
    ]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("row 3 is empty"), 2, "error: row 3 is empty\n"),
        (Interrupted("saved at step 5"), 3, "interrupted: saved at step 5\n"),
    ],
)
def test_exit_statuses(folder, monkeypatch, error, status, message):
    def train(*_, **__):
        raise error

    module = types.ModuleType("scaletrain.runs")
    module.train = train
    monkeypatch.setitem(sys.modules, "scaletrain.runs", module)
    done = call("run", "start")
    assert (done.exit_code, done.stderr) == (status, message)


def test_a_fault_of_ours_is_not_swallowed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "scaletrain.runs", None)
    done = call("run", "start")
    assert done.exit_code == 1
    assert isinstance(done.exception, ImportError)


def test_verify_fails_when_a_checkpoint_does(folder, monkeypatch):
    run = folder / "checkpoints" / "a"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(TEXT)
    empty = call("verify", "a")
    assert (empty.exit_code, empty.stderr) == (2, "error: checkpoints/a has no checkpoints.\n")
    (run / "step-00000007").mkdir()
    done = call("verify", "a")
    assert done.exit_code == 1
    assert "step-00000007: DAMAGED" in done.stdout
    assert call("verify", "checkpoints/a").exit_code == 1
    unknown = call("verify", "b")
    assert unknown.exit_code == 2
    assert "There is no run b here or in checkpoints." in unknown.stderr


def test_names_are_completed():
    done = scaletrain(_SCALETRAIN_COMPLETE="complete_bash", COMP_WORDS="scaletrain run quick", COMP_CWORD="2")
    shipped = [name for name in catalog.names() if name.startswith("quick")]
    assert done.stdout.split() == shipped
