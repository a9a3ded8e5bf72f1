collect_ignore = ["run.py", "make_corpus.py"]  # scripts: one needs atheris
