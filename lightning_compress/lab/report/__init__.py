"""From a run folder to pictures, tables and one self-contained HTML page.

`loading` reads `results.json` and `curves.csv`; `tables`, `plots` and `wording` turn them into
rows, SVG figures and sentences; `page` puts these into one file; `grids` draws sample images.
Nothing here imports Lightning, and a run is never needed again once its folder exists.
"""
