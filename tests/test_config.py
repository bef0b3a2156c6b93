"""Configurations: YAML and command line into dataclasses, and one sentence for what is wrong."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from support.scripts import CONFIGS, ROOT, config_class

from latentdiff.options import changeable, compose, group, groups, idle_options, option
from latentdiff.planning.settings import read_settings
from latentdiff.training.command_line import parse_config, run_script, write_config

# Which script reads which of configs/*/.
READERS = {
    **{"clip": "train_clip", "vae": "train_vae", "cache": "cache_latents", "unet": "train_unet"},
    **{"enlarge": "train_vae", "enlarge_cache": "cache_latents", "enlarge_unet": "train_unet"},
    **{"dit": "train_unet", "inpainting": "train_unet"},
    **{"style": "train_unet", "subject": "train_unet"},
    **{"shapes": "distill", "emoji": "distill"},
}


@dataclass(frozen=True)
class Size:
    """A part with a check of its own."""

    width: int = 8
    heads: Sequence[int] = (1, 2)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1")


@dataclass(frozen=True)
class Example:
    """A script's configuration.

    Its second paragraph is not for --help.
    """

    output_dir: Path = Path("runs")
    rate: float = 1e-3
    norm: Literal["l1", "l2"] = "l1"
    cache: Path | None = None
    names: Sequence[str] = ()
    size: Size = field(default_factory=Size)

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate={self.rate} must be positive")


def parse(*args: str) -> dict[str, object]:
    return plain(parse_config(Example, args)[0])


def plain(config: Any) -> dict[str, object]:
    """A configuration's values; lists, which YAML gives, are as good as tuples."""
    return json.loads(json.dumps(asdict(config), default=str))


def flat_values(config: Any) -> dict[str, object]:
    """A configuration's values by the names of its options."""
    values = plain(config)
    flat = {one.name: values.pop(one.name) for one in groups(type(config))}
    for group_values in flat.values():
        assert isinstance(group_values, dict)
        values |= group_values
    return values


@dataclass(frozen=True)
class Loop:
    """A group of options."""

    steps: int = 10
    loop: str = option("here", former_name="whorl")


@dataclass(frozen=True)
class Grouped:
    """A configuration with a group, one of whose options has the group's name."""

    seed: int = option(0, may_change=True)
    loop: Loop = group(Loop, steps=7)


def test_options_of_a_group_are_flat_and_keep_their_own_defaults() -> None:
    config, text = parse_config(Grouped, ["--loop", "there"])
    assert config == Grouped(loop=Loop(7, "there"))
    assert yaml.safe_load(text) == {"seed": 0, "steps": 7, "loop": "there"}
    assert compose(Grouped, {"loop": "there"}) == config
    assert changeable(Grouped) == {"seed"}


def test_a_former_name_is_refused_with_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("whorl: there\n")
    for args in (["--whorl", "there"], ["--config", str(path)]):
        with pytest.raises(ValueError, match=r"^whorl is named loop now$"):
            parse_config(Grouped, args)


def test_no_argument_gives_the_defaults() -> None:
    assert parse() == plain(Example())


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text("rate: 0.5\nnorm: l2\nsize: {width: 4}\nnames: [猫, a cat]\n", encoding="utf-8")
    assert parse("--config", str(path)) == plain(
        Example(rate=0.5, norm="l2", size=Size(4), names=["猫", "a cat"])
    )
    found = parse("--config", str(path), "--rate", "2e-3", "--size.width=6", "--cache", "there")
    assert found == plain(
        Example(rate=2e-3, norm="l2", size=Size(6), names=["猫", "a cat"], cache=Path("there"))
    )


def test_lists_can_be_given_at_the_command_line() -> None:
    assert parse("--names", "[a, b]", "--size.heads", "[3, 4]") == plain(
        Example(names=["a", "b"], size=Size(heads=[3, 4]))
    )


def test_the_written_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config, text = parse_config(Example, ["--rate", "0.1", "--names", "[猫]", "--size.width", "3"])
    write_config(text, tmp_path / "run")
    again, same = parse_config(Example, ["--config", str(tmp_path / "run" / "config.yaml")])
    assert again == config
    assert same == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rat", "1"], "^rat is no option; did you mean rate[?]$"),
        (["--zzz", "1"], "^zzz is no option$"),
        (["--size.depth", "1"], "^size.depth is no option"),
        (["stray"], "stray"),
        (["--rate", "fast"], "^rate=fast must be a number$"),
        (["--norm", "l3"], "^norm=l3 must be one of 'l1', 'l2'$"),
        (["--size.width", "wide"], "^size.width=wide must be a whole number$"),
        (["--names", "one"], "^names=one must be a list"),
        (["--names", "[a, 3]"], "^names=3 must be a text, in quotes where it looks like"),
        (["--rate", "-1"], "rate=-1.0 must be positive"),
        (["--size.width", "0"], "width=0 must be at least 1"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--size", "{width: 1, width: 2}"], "^the key 'width' is there twice, in lines 1 and 1;"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat: 1", "^rat is no option; did you mean rate[?]$"),
        ("size: {widht: 1}", "^size.widht is no option; did you mean size.width[?]$"),
        ("size: 3", "^size=3 must be names with values"),
        ("rate: fast", "^rate=fast must be a number$"),
        # PyYAML takes the last of two and says nothing.
        (
            "rate: 1\nnorm: l2\nrate: 2",
            "^example\\.yaml: the key 'rate' is there twice, in lines 1 and 3",
        ),
        (
            "size: {width: 1, width: 2}",
            "^example\\.yaml: the key 'width' is there twice, in lines 1",
        ),
        ("rate: [", "Problems parsing config: .*line 1"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "example.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        parse("--config", str(tmp_path / "example.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("split: on", "split", "on"),
        ("caption_columns: [no, y]", "caption_columns", ["no", "y"]),
        ("exclude: {country: [NO, 2020-01-01]}", "exclude", {"country": ["NO", "2020-01-01"]}),
        ("data: trueish", "data", "trueish"),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("random_flip: true", "random_flip", True),
    ],
)
def test_no_is_a_word_and_1e_3_a_number(
    tmp_path: Path, text: str, option: str, value: object
) -> None:
    """`mixed_precision: no` was false, which "must be one of 'auto', 'no'", and Norway too."""
    (tmp_path / "vae.yaml").write_text(text, encoding="utf-8")
    config, written = parse_config(config_class("train_vae"), ["--config", f"{tmp_path}/vae.yaml"])
    assert flat_values(config)[option] == value
    (tmp_path / "again.yaml").write_text(written, encoding="utf-8")
    again, _ = parse_config(config_class("train_vae"), ["--config", f"{tmp_path}/again.yaml"])
    assert again == config
    assert read_settings(tmp_path / "vae.yaml", {})[option] == value


def test_a_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell expands --data=~/images, none reads YAML, and "~" was made as a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "example.yaml"
    path.write_text("cache: ~/cache\nnames: [~/no path]\n", encoding="utf-8")
    found = parse("--config=~/example.yaml", "--output_dir=~/runs")
    expected = Example(output_dir=tmp_path / "runs", cache=tmp_path / "cache", names=["~/no path"])
    assert found == plain(expected)
    script, text = parse_config(config_class("train_vae"), ["--data=~/images", "--init=~/vae"])
    assert (script.data.data, script.init) == (f"{tmp_path}/images", f"{tmp_path}/vae")
    assert yaml.safe_load(text)["data"] == f"{tmp_path}/images"
    assert parse("--output_dir=~nobody-of-this-name/x")["output_dir"] == "~nobody-of-this-name/x"


def test_help_says_what_the_script_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    assert "A script's configuration." in capsys.readouterr().out


def test_print_config_prints_a_file_to_start_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--rate", "0.25", "--print_config")
    assert caught.value.code == 0
    path = tmp_path / "example.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert parse("--config", str(path)) == plain(Example(rate=0.25))


@pytest.mark.parametrize(
    "error", [ValueError("size=3 must be even"), OSError(28, "No space left on device")]
)
def test_users_errors_end_in_one_sentence_and_code_2(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupted_script_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first checkpoint it said "go on from the newest checkpoint"."""

    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 130
    expected = "interrupted before the first step; run the same command again\n"
    assert capsys.readouterr().err == expected


def test_programmers_errors_keep_their_traceback() -> None:
    def main() -> None:
        raise AssertionError

    with pytest.raises(AssertionError):
        run_script(main)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_script_parses_its_defaults_and_writes_those_with_an_effect(name: str) -> None:
    cls = config_class(name)
    config, text = parse_config(cls, [])
    assert plain(config) == plain(cls())
    idle = {option for option, _ in idle_options(config)}
    assert "shuffle_buffer" in idle
    written = {option: v for option, v in flat_values(config).items() if option not in idle}
    assert written == yaml.safe_load(text)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_script_reads_the_config_that_a_run_of_it_wrote(tmp_path: Path, name: str) -> None:
    cls = config_class(name)
    config, text = parse_config(
        cls, ["--image_size", "32", "--exclude", '{"group": ["skin tone"]}']
    )
    write_config(text, tmp_path)
    again, same = parse_config(cls, ["--config", str(tmp_path / "config.yaml")])
    assert again == config
    assert yaml.safe_load(same) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs").rglob("*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_every_config_parses_with_its_script(path: Path) -> None:
    name = READERS[path.stem]
    cls = config_class(name)
    _, text = parse_config(cls, ["--config", str(path)])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in written.items():
        found = yaml.safe_load(text)[key]
        expected = {**found, **value} if isinstance(value, dict) else value
        assert found == expected, key
    output_dir = yaml.safe_load(text)["output_dir"]
    assert Path(output_dir) == Path("runs") / path.parent.name / path.stem


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("train_vae", ["--learning_rate", "-1"], "learning_rate=-1.0 must be positive"),
        ("train_unet", ["--ema_decay", "2"], r"ema_decay=2.0 must be in \[0, 1\)"),
        ("train_unet", ["--caption_dropout", "1.5"], "caption_dropout=1.5"),
        ("train_unet", ["--diffusion.schedule", "quadratic"], "schedule.*quadratic"),
        ("train_unet", ["--unet.norm_num_groups", "7"], "norm_num_groups=7"),
        # A part that may be left out: nothing is said of that.
        ("train_unet", ["--dit", "3"], "^dit=3 must be names with values"),
        ("train_unet", ["--dit.patch_size", "0"], "^patch_size=0 must be from 1 to 64$"),
        ("train_unet", ["--dit.patch_size", "a"], "^dit.patch_size=a must be a whole number$"),
        ("train_unet", ["--dit.patch_sze", "2"], "^dit.patch_sze.*did you mean dit.patch_size[?]$"),
        (
            "train_vae",
            ["--compile", "maybe"],
            "^compile=maybe must be true or false or one of 'auto', 'network', 'graph'$",
        ),
        ("train_clip", ["--batch_size", "0"], "batch_size=0 must be at least 1"),
        ("train_clip", ["--image_size", "0"], "image_size=0 must be at least 1"),
        ("train_clip", ["--max_steps", "0"], "max_steps=0 must be at least 1"),
        ("cache_latents", ["--batch_size", "0"], "batch_size=0 must be at least 1"),
        ("cache_latents", ["--image_size", "-2"], "image_size=-2 must be at least 1"),
    ],
)
def test_scripts_refuse_values_of_every_part_of_their_configuration(
    name: str, args: list[str], message: str
) -> None:
    """A script's configuration has three bases, and only the first of their checks was run."""
    with pytest.raises(ValueError, match=message):
        parse_config(config_class(name), args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output_dir="], "output_dir must not be empty"),
        (["--max_steps", "3", "--data", ""], "data must not be empty"),
        (["--data", "caf\udce9"], r"'caf\\udce9' is not valid UTF-8"),
    ],
)
def test_arguments_that_are_empty_or_no_utf8_are_refused(args: list[str], message: str) -> None:
    """`--output_dir=` was the current folder."""
    with pytest.raises(ValueError, match=message):
        parse_config(config_class("train_vae"), args)
