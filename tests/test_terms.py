"""The repository uses the standard terms: private words of earlier versions do not come back."""

import re

import pytest

from benchmarks.reading import ROOT, tracked

# What was used before: what to use instead. Words with an ordinary meaning are not in the list.
TERMS = {
    r"draw_orders": "sample_permutations",
    r"draw_samples|draw_one|distribution\.draw|\bdrawn_\w+": "sample",
    r"\binformed\b": "cond (logits)",
    r"\bShaping\b|\bshaping\b": "SamplingParams",
    r"\bBeyond\.|class Beyond|--beyond\b": "PositionExtension, --position_extension",
    r"\bPlaces\b": "GridPositions",
    r"laid_over": "aligned_positions",
    r"size_in_cells": "--latent_dim",
    r"\bby_cell\b|bits_by_cell|\bcells?\b": "latent position",
    r"\bunforeseen\b": "later_known_mask",
    r"--keep\b": "--mask",
    r"\bRecorder\b": "CUDAGraphCapture",
    r"\bsettle[ds]?\b": "resolve_defaults",
    r"\bIDLE\b": "unused options",
    r"\bCURE\b": "usage hint",
    r"\bRESTARTS\b": "supports_reset",
    r"reviv(e|es|ed|al|als|ing)\b|revive_below": "reset, dead_code_threshold",
    r"codebook_rescue": "--reset_codebook_on_collapse",
    r"badly_represented": "sample_by_error",
    r"\bautopilot\b": "adaptive discriminator schedule",
    r"\bbearings?\b": "baseline evaluation",
    r"\bslowness\b": "ramp factor",
    r"stands? still": "frozen generator",
    r"\badd_gradients\b": "forward_backward",
    r"\.obeyed\b|def obeyed": "StopSignals",
    r"bad_evaluations": "evaluations_without_improvement",
    r"progress\.exhausted|def exhausted": "should_stop",
    r"\bOutbox\b|\boutbox\b": "async queue",
    r"\bJournal\b|\bjournal\b": "event log",
    r"how_to_look": "ui_hint",
    r"group\.(first|largest|leave)\b": "is_main, all_reduce_max, shutdown",
    r"\bJudge\b|\bjudge[ds]?\b": "SampleEvaluator",
    r"\btaught\b|\bteach(es|ing)?\b": "train_classifier, trained",
    r"\bSeen\b": "Features",
    r"most usual|\bstrangest\b": "highest, lowest likelihood",
    r"refuse_idle": "reject_unused_flags",
    r"cli\.build\b": "build_or_error",
    r"codes_alone": "decoded_codes",
    r"joined batch": "global batch",
    r"circle of imports|circular path": "cycle",
    r"code search|look for the nearest code": "codebook lookup",
    r"\bis no (matrix|CSV)\b": "must be 2-D, is not a valid",
    r"makes? no difference to": "has no effect with",
    r"(does|do) not go with": "cannot be combined with",
    r"Did anybody try": "How this is tested",
    r"bit for bit": "bitwise identical",
    r"\bspoilt\b": "corrupted",
}
# These name what was renamed, or the cells of a notebook.
HISTORY = ("tests/test_terms.py", "CHANGELOG.md", "tests/test_notebook.py")
# Terms that still occur. To be emptied while the restructuring goes on.
EXEMPT: set[str] = set()


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    paths = [path for path in tracked(".py") + tracked(".md") if path not in HISTORY]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}


@pytest.mark.parametrize("term", TERMS)
def test_term_is_gone(term: str, texts: dict[str, str]) -> None:
    found = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in texts.items()
        for match in re.finditer(term, text)
    ]
    if term in EXEMPT:
        pytest.skip(f"not yet: {len(found)} places")
    assert not found, f"use {TERMS[term]}: " + "; ".join(found)
