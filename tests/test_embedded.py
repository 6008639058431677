from __future__ import annotations

import re

from rankadaptor_optuna.embedded import load_texts


def paragraphs(texts):
    return {" ".join(p.split()) for text in texts for p in re.split(r"\n\s*\n", text) if p.strip()}


def test_no_paragraph_stands_in_two_parts():
    texts = load_texts()
    train, validation, report = (paragraphs(part) for part in (texts.train, texts.validation, texts.report))
    assert not train & validation
    assert not train & report
    assert not validation & report


def test_the_parts_are_eight_to_one_to_one():
    texts = load_texts()
    sizes = [len(part) for part in (texts.train, texts.validation, texts.report)]
    assert min(sizes) >= 10
    assert 0.78 < sizes[0] / sum(sizes) < 0.82
    assert abs(sizes[1] - sizes[2]) <= 1


def test_the_texts_are_the_same_each_time():
    assert load_texts() == load_texts()
