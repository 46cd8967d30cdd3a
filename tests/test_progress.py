import pytest

from wina.progress import bar, note, track


def test_notes_go_to_standard_error_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    note("pip install 'wina[gguf]' [/dim] " + "long " * 50)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "pip install 'wina[gguf]' [/dim] " + "long " * 50 + "\n"


def test_track_yields_everything_and_is_silent_where_nobody_watches(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    with bar("steps", 10, 4) as advance:
        advance(6)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == ""
