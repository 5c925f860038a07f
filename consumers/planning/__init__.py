"""What a run will need and how long it will take, computed before anything is started.

`facts` (model and data) -> `memory`, `disk`, `traffic`, `timing` (one file per resource) -> `plan` puts them together
-> `report` shows them, `fit` finds what would fit. All of it is arithmetic on the config: no engine, no GPU.
"""
