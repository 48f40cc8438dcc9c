"""No command line ends in a traceback, or in an exit code other than 0 and 2, while nothing is run."""

from __future__ import annotations

import contextlib
import io
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longspan.scripts.cli import main
from longspan.scripts.compose import group_options
from longspan.training.config_keys import keys
from longspan.training.schema import RunRequest

_PATHS = [key.path.replace("<i>", "0").replace("<name>", "full") for key in keys(RunRequest) if "spec." not in key.path]
_WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
_VALUES = st.one_of(
    st.integers(-3, 300).map(str),
    st.sampled_from(
        ["null", "true", "1e-3", "nan", "inf", "[]", "{}", "[1,2]", "{a: 1}", "[{kind: files}]", "auto", "''"]
    ),
    st.sampled_from(
        ["${name}", "${nope}", "${", "a,b", "1e999", "(", "'", "\\", "$", "[[[", "1_0", "0x10", "-", "???"]
    ),
    st.sampled_from(["full", "local", "cosine", "rope", "sdpa", "gpt-tiny", "llama-tiny", "files", "bytes", "fsdp"]),
    _WORDS,
)


@st.composite
def _arguments(draw: st.DrawFn) -> str:
    path = draw(st.sampled_from(_PATHS))
    if draw(st.integers(0, 4)) == 0:  # a misspelling: one letter lost
        cut = draw(st.integers(0, len(path) - 1))
        path = path[:cut] + path[cut + 1 :]
    group = draw(st.sampled_from(sorted(group_options("train"))))
    return draw(
        st.one_of(
            _VALUES.map(lambda value: f"{path}={value}"),
            _VALUES.map(lambda value: f"{group}={value}"),
            st.sampled_from(["+", "++", "~"]).map(lambda sign: f"{sign}{path}=1"),
            _WORDS.map(lambda word: f"{word}=1"),
            _WORDS,
        )
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(_arguments(), min_size=1, max_size=4))
def test_any_command_line_is_either_planned_or_refused_in_words(arguments: list[str]) -> None:
    arguments = [word for word in arguments if word not in ("-h", "--help")]
    out, err = io.StringIO(), io.StringIO()
    before = sorted(os.listdir())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", "experiment=tiny", *arguments, "trainer.accelerator=gpu", "dry_run=true"])
    assert code in (0, 2), err.getvalue()
    assert "Traceback" not in err.getvalue()
    assert sorted(os.listdir()) == before
    if code == 2:
        assert out.getvalue() == "" or "trainer.accelerator" in out.getvalue() or "dry_run" in out.getvalue()
        lines = err.getvalue().splitlines()
        assert lines
        assert all(line.startswith("longspan train: ") for line in lines), lines
        assert not any("pydantic" in line or "omegaconf" in line.lower() for line in lines), lines
