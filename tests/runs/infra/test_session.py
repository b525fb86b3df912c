"""What a run says while it works."""

from bilevel_jax.runs.infra.session import open_session


def test_a_notebook_gets_plain_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with open_session(tmp_path, progress=False, save_seconds=60) as work:
        work.print_line("one line [of text]")
    assert capsys.readouterr().err == "one line [of text]\n"
