"""The command line in one process: exit codes, no traceback, Ctrl-C, output that breaks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import tomli_w

from kdcore import cli
from kdcore.cli.doing import show_report


def kd(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    "command", [[], *([c] for c in cli.kd.commands), ["plugin", "new"], ["plugin", "check"]]
)
def test_every_help_works(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert kd(*command, "--help") == 0
    assert "Usage: kd" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["runn"],
        ["run"],
        ["run", "x", "--seed", "one"],
        ["list", "--nope"],
        ["plugin", "nwe"],
        ["compare", "x", "--seeds", "1"],
        ["show", "zzz"],
        ["show", "kd", "--kind", "lss"],
        ["schema", "--component", "zzz"],
        ["schema", "--kind", "teacher"],
        ["resume", "nowhere"],
        ["export", "nowhere"],
        ["bench", "nowhere"],
    ],
)
def test_wrong_arguments_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kd(*arguments) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.err.strip()
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_told_from_one_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kd("resume", str(tmp_path / "nosuch")) == 2
    assert "no such folder" in capsys.readouterr().err
    assert kd("resume", str(tmp_path)) == 2
    assert "no run folder: it has no recipe.lock.toml" in capsys.readouterr().err


def test_a_terminal_is_told_where_the_pictures_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    folder.mkdir()
    (folder / "report.md").write_text("# Title\n\n![curves.png](curves.png)\n", "utf-8")
    show_report("run folder", folder)
    assert "![curves.png](curves.png)" in capsys.readouterr().out  # a file gets the page as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_report("run folder", folder)
    said = click.unstyle(capsys.readouterr().out)
    assert "Picture: run/curves.png" in said
    assert said.splitlines()[-2:] == ["run folder: run", "report with pictures: run/report.html"]


def test_ctrl_c_while_checking_leaves_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdcore import api

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run", stop)
    assert kd("run", "x.toml") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_while_training_saves_and_exits_with_3(
    install: Callable[..., Any],
    write_module: Callable[..., str],
    tiny: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = write_module("""
        import signal
        from kdcore import Augmentation
        class Stop(Augmentation):
            def after_step(self):
                if self.run.step == 3:
                    signal.raise_signal(signal.SIGINT)
    """)
    install(
        "stopper",
        f"""
        from kdcore import Component, hookimpl
        @hookimpl
        def kd_augmentations():
            yield Component("stopper", "{module}:Stop")
    """,
    )
    tiny["augmentation"] = [{"use": "stopper"}]
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(tiny), "utf-8")
    assert kd("run", str(path), "--out", str(tmp_path / "out"), "--quiet") == 3
    assert "the state is saved" in capsys.readouterr().err
    assert list((tmp_path / "out").rglob("step-*3.state"))


def test_json_is_json_and_a_quarantined_plugin_is_shown(
    install: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    install("broken", "print('noise')\nraise RuntimeError('on purpose')")
    assert kd("list", "--json") == 0
    assert {"kind", "name", "summary", "from"} == set(json.loads(capsys.readouterr().out)[0])
    assert kd("plugins", "--json") == 0
    rows = {r["name"]: r["state"] for r in json.loads(capsys.readouterr().out)}
    assert "on purpose" in rows["broken"]
    assert kd("show", "broken") == 2
    assert "quarantine" in capsys.readouterr().err


def test_plugins_says_of_a_name_that_two_offer_how_to_write_it(
    install: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from kdcore import Component, hookimpl\n@hookimpl\ndef kd_losses():\n    yield Component('dup', 'a:b')"
    for distribution in ("kd-plugin-dup", "other-dup"):
        install("dup", code, distribution=distribution)
    assert kd("plugins") == 0
    said = capsys.readouterr().out
    assert "loss 'dup' is offered by 2 plugins: write other-dup:dup for this one's" in said


def test_a_catalogued_plugin_in_quarantine_is_not_called_absent(
    install: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    install("swing", "raise RuntimeError('on purpose')")
    code = kd("show", "swing")
    said = capsys.readouterr()
    assert "on purpose" in said.out + said.err, (code, said.out)


def test_what_a_plugin_says_of_itself_stays_on_its_line(
    install: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from kdcore import Component, hookimpl\n@hookimpl\ndef kd_losses():\n"
    install(
        "rude", f"{code}    yield Component('rude', 'kdcore.losses:kd_loss', 'a\\n\\x1b[2J' + 'long ' * 99)"
    )
    for command in (["list"], ["show", "rude"]):
        assert kd(*command) == 0
        said = capsys.readouterr().out
        assert "a \\x1b[2Jlong long" in said
        assert "\x1b" not in said
        assert command == ["show", "rude"] or max(map(len, said.splitlines())) < 200


def test_kinds_are_kept_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert kd("show", "pld", "--kind", "teacher") == 2
    assert "'pld' is of kind loss, not teacher" in capsys.readouterr().err
    assert kd("show", "classics", "--kind", "router") == 2
    assert kd("show", "classics", "--kind", "loss") == 0
    assert "classics.dkd" in capsys.readouterr().out


def test_nothing_is_not_looked_for_and_unknown_commands_name_the_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert kd("search", " ") == 2
    assert "kd list --all" in capsys.readouterr().err
    assert kd("plugin", "zzz") == 2
    assert "There are: new, check" in capsys.readouterr().err


def test_show_names_a_parameters_type_bounds_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert kd("show", "taid") == 0
    said = capsys.readouterr().out
    assert "  t_start: float >= 0 and < 1 = 0.4" in said
    assert "  variant: Literal['paper', 'released'] = 'paper'" in said
    assert "its claim on real data: not shown" in said


def test_show_and_schema_know_names_of_any_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert kd("show", "classics") == 0
    assert kd("show", "classics.dkdd") == 2
    assert "did you mean 'classics.dkd'?" in capsys.readouterr().err
    assert kd("schema", "--component", "module") == 0  # a student and a teacher
    assert '"checkpoint"' in capsys.readouterr().out
    assert kd("schema", "--kind", "teacher") == 2
    assert "--component NAME" in capsys.readouterr().err


def test_a_full_disk_behind_the_output_is_said_in_words() -> None:
    command = [sys.executable, "-m", "kdcore", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
