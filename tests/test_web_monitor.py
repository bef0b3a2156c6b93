"""The monitor of `latentdiff web`: what it reads of run folders."""

from pathlib import Path

from support.web import make_run

from latentdiff.web.monitor import as_html, runs


def test_the_monitor_reads_a_run_that_is_being_written(tmp_path: Path) -> None:
    make_run(tmp_path / "emoji" / "<b>unet")
    assert list(runs(tmp_path)) == ["emoji/<b>unet"]
    shown = as_html(runs(tmp_path)["emoji/<b>unet"])
    assert "Step 30</strong>" in shown
    assert "<b>" not in shown
    assert 'src="data:image/png;base64,' in shown


def test_the_monitor_says_of_how_many_steps(tmp_path: Path) -> None:
    for number, text in enumerate(("max_steps: 1200", "max_steps: many", "- 1", "a: [")):
        run = tmp_path / str(number)
        make_run(run)
        (run / "config.yaml").write_text(text)
        assert ("Step 30 of 1,200<" if number == 0 else "Step 30<") in as_html(run)
