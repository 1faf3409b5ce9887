"""LongBench (Bai et al. 2023, arXiv 2308.14508): tasks, prompts, metrics and averages, with no model in sight.

`prompts` and `tasks` say what is asked, `metrics` how an answer is scored, `averages` what is put together.
"""
