"""The studies' table and JSON writer; it lives in the package, because the demo needs it too."""

from sglang_deepprune.report import Row, print_table, versions, with_ratios, write_json

__all__ = ["Row", "print_table", "versions", "with_ratios", "write_json"]
