"""Receipts become pages: report.html, report.md, report.json and verify.py. Computes nothing, only formats.

Every number on a page is a number of a receipt. `receipts` reads the folder, `document` arranges it in the order in
which a sceptic asks, `html` and `markdown` draw that one document, so the pages cannot disagree.
"""

from __future__ import annotations
