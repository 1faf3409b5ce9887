"""RULER's thirteen kinds of questions (Hsieh et al. 2024, arXiv 2404.06654), made anew for any tokenizer and text.

`words` draws names and values, `needles`, `lists` and `documents` build the kinds, `tasks` lists them, `score` judges.
Sizes, counts and the questions' wording are the paper's (Table 2, Appendices B and D). Ours: contexts come from text
that the user gives instead of one author's essays, nouns and adjectives are the text's own words, the length is
measured on the whole prompt.
"""
