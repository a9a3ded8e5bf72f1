"""Report of run folders: figures, tables and one self-contained HTML page.

`loading` reads `results.json` and `curves.csv`; `tables`, `plots` and `wording` turn them into
rows, SVG figures and sentences; `page` assembles one file; `sample_grids` draws sample images.
Nothing here imports Lightning or runs a model.
"""
