"""What the command line prints and how it ends: for people, for scripts, and when it is interrupted."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import scipy.sparse

import functional_lstsq as fl
from functional_lstsq import errors
from functional_lstsq.cli import main, solve
from functional_lstsq.cli.output import Output, Progress
from functional_lstsq.cli.words import line_of
from functional_lstsq.solvers.watching import Step


@pytest.fixture
def tall(tmp_path):
    scipy.io.mmwrite(tmp_path / "A.mtx", scipy.sparse.coo_array(np.vander(np.arange(1.0, 6.0), 3)), precision=17)
    scipy.io.mmwrite(tmp_path / "b.mtx", np.arange(5.0)[:, None] ** 2, precision=17)
    return [f"{tmp_path}/A.mtx", f"{tmp_path}/b.mtx"]


def test_json_is_one_object_with_stable_keys(tall, capsys):
    assert main(["solve", *tall, "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert list(told) == [
        *("command", "matrix", "rows", "columns", "entries", "right_hand_sides", "status", "method", "tried"),
        *("iterations", "residual", "optimality", "forward_error", "condition", "rank", "seconds"),
        *("weights", "robust", "threshold", "damp", "lower", "upper", "solution", "gradient"),
    ]
    assert (told["rows"], told["columns"], told["rank"], told["status"]) == (5, 3, 3, "converged")
    assert isinstance(told["forward_error"], float)
    assert told["solution"] is None
    assert printed.err == ""


def test_what_is_not_finite_is_null(capsys):
    Output(json=True).record(a=float("nan"), b=[float("-inf"), 1], c={"d": float("inf")})
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1], "c": {"d": null}}\n'


@pytest.mark.parametrize("place", ["before", "behind"])
def test_options_stand_before_the_command_or_behind_it(tall, capsys, place):
    arguments = ["--quiet", "solve", *tall] if place == "before" else ["solve", *tall, "--quiet"]
    assert main(arguments) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["solve", "none.mtx"], 2, "cannot read none.mtx: no such file"),
        (["solve"], 2, "arguments are required: A.mtx"),
        (["sovle"], 2, "invalid choice: 'sovle'"),
        ([], 2, "arguments are required: COMMAND"),
        (["solve", "A.mtx", "--dampen", "1"], 2, "unrecognized arguments: --dampen 1"),
        (["solve", "{}/ones.mtx"], 1, "rank 1, not full rank 2"),
    ],
)
def test_errors_are_a_line_and_for_scripts_an_object_too(tmp_path, capsys, arguments, status, message):
    scipy.io.mmwrite(tmp_path / "ones.mtx", scipy.sparse.coo_array(np.ones((4, 2))))
    arguments = [argument.format(tmp_path) for argument in arguments]
    for how in ([], ["--quiet"], ["--json"]):
        assert main([*how, *arguments]) == status
        printed = capsys.readouterr()
        assert printed.err.startswith("functional_lstsq: ")
        assert printed.err.count("\n") == 1
        assert message in printed.err
        if how == ["--json"]:
            assert json.loads(printed.out) == {"error": printed.err[len("functional_lstsq: ") : -1], "exit": status}
        else:
            assert printed.out == ""


def test_quiet_and_json_exclude_each_other(tall, capsys):
    assert main(["solve", *tall, "--quiet", "--json"]) == 2
    assert main(["--quiet", "solve", *tall, "--json"]) == 2
    assert "not allowed with" in capsys.readouterr().err


class _Terminal:
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "environment", "option", "coloured"),
    [
        (True, {}, [], True),
        (True, {"NO_COLOR": "1"}, [], False),
        (True, {"TERM": "dumb"}, [], False),
        (True, {}, ["--no-color"], False),
        (False, {}, [], False),
    ],
)
def test_colour_is_for_terminals_that_want_it(tall, capsys, monkeypatch, terminal, environment, option, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if terminal:
        monkeypatch.setattr(sys, "stdout", _Terminal(sys.stdout))
    assert main(["solve", *tall, *option]) == 0
    assert ("\x1b[32mconverged\x1b[0m" in capsys.readouterr().out) is coloured


def test_progress_is_for_terminals(capsys, monkeypatch):
    for terminal, quiet, shown in ((False, False, False), (True, True, False), (True, False, True)):
        with monkeypatch.context() as patch:
            if terminal:
                patch.setattr(sys, "stderr", _Terminal(sys.stderr))
            with Progress(Output(quiet=quiet)) as progress:
                progress.bar.delay = 0
                progress.step(Step("solve", 1, None, 0.5))
                progress.bar.refresh()
        assert ("gradient" in capsys.readouterr().err) is shown


def test_interrupted_is_130_without_a_traceback(tall, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(solve, "solved", interrupt)
    assert main(["solve", *tall]) == 130
    assert capsys.readouterr().err == "functional_lstsq: interrupted\n"


def test_advice_is_in_the_words_of_the_command_line(tmp_path, capsys):
    """No name of a Python argument where a person types options."""
    A = np.diag([1.0, 1e-4, 1e-8]) @ np.linalg.qr(np.vander(np.arange(1.0, 4.0), 3))[0]
    scipy.io.mmwrite(tmp_path / "A.mtx", scipy.sparse.coo_array(A), precision=17)
    scipy.io.mmwrite(tmp_path / "ones.mtx", scipy.sparse.coo_array(np.ones((4, 2))))
    for arguments in (["A.mtx"], ["ones.mtx"], ["ones.mtx", "--minimum-norm"]):
        assert main(["solve", f"{tmp_path}/{arguments[0]}", *arguments[1:], "--solver", "cgls"]) == 1
        line = capsys.readouterr().err
        assert "--" in line
        for word in ("solver=", "throw=", "max_iterations", "rank_deficient=", "refine="):
            assert word not in line, line


@pytest.mark.parametrize("command", [[], ["solve"], ["info"], ["plot"], ["bench"], ["demo"]])
def test_help_has_examples_and_exit_statuses(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "exit status: 0 done" in printed
    if command:
        assert printed.count(f"  functional-lstsq {command[0]}") >= 2
        for option in ("--quiet", "--json", "--no-color"):
            assert option in printed


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == fl.__version__


def test_a_pipe_that_is_closed_is_no_error():
    """`... | head -1`, as the shell does it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "functional_lstsq", "demo"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "")


def test_every_advice_of_the_library_has_words_for_the_command_line():
    """Each advice that names an argument of a function has words of its own, or none where there is no such option."""
    advice = [text for name, text in vars(errors).items() if name.isupper()]
    advice += [errors.other_start("x0"), errors.nearer_start("x0")]
    assert errors.DAMP in advice
    for text in advice:
        line = line_of(fl.ConvergenceError("it failed", text, "scale it"))
        assert line.startswith("it failed. Try: ")
        assert line.endswith("scale it")
        assert not re.search(r"[a-z]+=|\w\(|_|x0", line), line
