from unified_lm.cli.demo import demo


def test_the_demo_runs_to_its_last_line(tmp_path, capsys):
    """On a tiny random model: the table, the searches, an answer, and the paths of plot and export."""
    demo(["model=tiny_random", "max_steps=2", f"run_dir={tmp_path}/run", "logging.progress=false"])
    out = capsys.readouterr().out
    assert "retrieval nDCG@10, bidirectional" in out
    assert "answer loss, causal" in out
    assert out.count("search among") == 1
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "export" / "modules.json").is_file()
    assert "document_then_query: first token after" in out
    assert "document_cache: first token after" in out
    assert (tmp_path / "run" / "index" / "index.json").is_file()
